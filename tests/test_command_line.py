"""Both command lines: flags, the YAML file, help, and what is said of mistakes."""

import argparse
from dataclasses import asdict, fields
import importlib
import os
import socket
import subprocess
import sys
import urllib.request

import pytest
import yaml

import compute_fisher
import core_experiment
from residual_fisher.common import program
from residual_fisher.common import text as texts
from residual_fisher.common.options import settings_of
from residual_fisher.common.program import UserError
from residual_fisher.pipeline import settings
from scripts import ROOT

# each script's dataclass of options, and its flags that are none
OPTIONS = {"core_experiment": core_experiment.Settings, "compute_fisher": settings.Settings}


def flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")


def parse(script: str, words: list[str]):
    """The options that the script reads from its command line."""
    return importlib.import_module(script).parse(words)


def other_value(key) -> str:
    """A word that a flag takes and that is not its default."""
    for word in ("3", "true", "last", "compact", "nats", "float64", "word"):
        try:
            if key.metadata["read"](word) != key.default:
                return word
        except argparse.ArgumentTypeError:  # not a word for this flag
            continue
    raise AssertionError(f"no value for {key.name}")


@pytest.mark.parametrize(("script", "name"), [(s, key.name) for s in OPTIONS for key in fields(OPTIONS[s])])
def test_every_option_is_a_flag(script, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "3").touch()  # an empty --config
    (key,) = [key for key in fields(OPTIONS[script]) if key.name == name]
    word = other_value(key)
    value = key.metadata["read"](word)
    expected = {name: (value,) if key.metadata["several"] else value}
    defaults = parse(script, [])
    for words in ([flag(name), word], [f"{flag(name)}={word}"]):
        found = parse(script, words)
        assert asdict(found) == {**asdict(defaults), **expected}


@pytest.mark.parametrize(
    ("script", "name"), [("core_experiment", "require_predicted"), ("compute_fisher", "trust_remote_code")]
)
def test_a_switch_needs_no_word_and_takes_true_and_false(script, name):
    assert getattr(parse(script, [flag(name)]), name) is True
    assert getattr(parse(script, [flag(name), "true"]), name) is True
    assert getattr(parse(script, [flag(name), "false"]), name) is False


@pytest.mark.parametrize("script", OPTIONS)
def test_help_fits_a_screen_names_every_flag_and_does_not_wait_for_torch(script, tmp_path):
    code = (
        f"import runpy, sys; sys.argv = ['{script}.py', '--help']\n"
        f"try:\n    runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = shown.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 120
    for key in fields(OPTIONS[script]):
        assert f"  {flag(key.name)} " in shown
        assert " ".join(key.metadata["help"].replace("%%", "%").split()) in " ".join(shown.split())


def test_a_process_of_its_own_writes_nothing_but_the_line(model_directory, dataset, tmp_path):
    """No library's warning at import, no traceback. Both start at once: most of their time is imports."""
    models = {"core_experiment": ["--model-name"], "compute_fisher": ["--dataset-name", str(dataset), "--model-path"]}
    words = {"core_experiment": ["--layers", "7"], "compute_fisher": ["--hook-layer-name", "7"]}
    running = {
        script: subprocess.Popen(
            [sys.executable, ROOT / f"{script}.py", *models[script], str(model_directory), *words[script]],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for script in OPTIONS
    }  # fmt: skip
    said = {script: (*process.communicate(timeout=120), process.returncode) for script, process in running.items()}
    assert said["core_experiment"] == ("", "core_experiment.py: error: --layers 7: the model has layers 0 to 2\n", 2)
    assert said["compute_fisher"] == (
        "",
        "compute_fisher.py: error: LlamaForCausalLM has no module '7': its layers are model.layers.0 ... "
        "model.layers.2\n",
        2,
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", OPTIONS)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batchsize=8", "unrecognized argument --batchsize: did you mean --batch-size?"),
        ("--batch 8", "unrecognized argument --batch: did you mean --batch-size?"),
        ("--xyzzy", "unrecognized argument --xyzzy\n"),
        ("--batch-size=-1", "argument --batch-size: '-1' is not a positive whole number"),
        ("--seed x", "argument --seed: 'x' is not a whole number, 0 or more"),
        ("--dtype float8", "argument --dtype: 'float8' is none of auto, float64, float32, bfloat16, float16"),
        ("--trust-remote-code maybe", "argument --trust-remote-code: 'maybe' is neither true nor false"),
        ("--output-dir", "argument --output-dir: expected one argument"),
        ("--\x1b[31mred", r"unrecognized argument --\x1b[31mred"),
    ],
)
def test_a_bad_flag_ends_with_one_line_and_code_2(script, words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(script, words.split(" "))
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.startswith(f"{script}.py: error: ") and message.count("\n") == 1
    assert said in message


def test_scales_are_sorted_and_named_by_six_digits():
    assert core_experiment.parse(["--scales", "2", "-1", "0.1234567", "2.0"]).scales == (-1, 0.123457, 2)


# --- text and network ----------------------------------------------------------------------------


def test_excerpts_are_short_printable_and_in_one_line():
    text = "The \x1b[31mzoo\n" + " keeps animals" * 9
    assert texts.excerpt("The\n  zoo", 10) == texts.excerpt_end("The zoo", 10) == "The zoo"
    assert texts.excerpt(text, 20) == r"The \x1b[31mzoo kee…"
    assert texts.excerpt_end(text, 20) == "…imals keeps animals"


def test_a_table_is_aligned_to_the_left_in_its_first_column_and_to_the_right_in_the_others():
    assert texts.table(["layer", "KL"], [["0", "0.25"], ["10", "3"]]).splitlines() == [
        "layer    KL", "0      0.25", "10        3"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "address", "proxies", "offline"),
    [
        ("some/model", False, {}, True),
        ("some/model", True, {}, False),
        ("some/model", False, {"https": "http://proxy"}, False),
        ("smollm2-135m", False, {}, False),
        (str(ROOT), False, {}, False),
    ],
)
def test_the_hubs_libraries_stay_offline_if_a_name_needs_a_hub_without_an_address(
    name, address, proxies, offline, monkeypatch
):
    def look_up(*arguments):
        if not address:
            raise OSError

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    program.go_offline_without_hub("smollm2-135m", name)
    assert ("HF_HUB_OFFLINE" in os.environ) is offline


# --- the pipeline's YAML file --------------------------------------------------------------------


def written(path, text: str):
    path.write_text(text)
    return path


def test_the_bundled_config_gives_every_key_its_default():
    assert yaml.safe_load(settings.CONFIG.read_text()) == settings_of(settings.Settings())
    assert compute_fisher.parse([]) == settings.Settings()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_other_configs_are_valid(path):
    assert settings_of(compute_fisher.parse(["--config", str(path)])) != settings_of(settings.Settings())


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path):
    path = written(tmp_path / "c.yaml", "batch_size: 3\ntop_k_tokens: all\nhook_layer_name: 7\nseed: null\n")
    command = compute_fisher.parse(["--config", str(path), "--batch-size", "5", "--overwrite"])
    found = command
    assert (found.batch_size, found.top_k_tokens, found.hook_layer_name, found.seed) == (5, "all", "7", None)
    assert found.num_prompts == 100 and command.overwrite


BAD_FILES = {
    "batchsize: 8": "unknown key 'batchsize': did you mean batch_size?",
    "completely_else: 8": "unknown key 'completely_else': the keys are model_path",
    "batch_size: eight": "batch_size: 'eight' is not a positive whole number",
    "batch_size: 2.5": "batch_size: '2.5' is not a positive whole number",
    "batch_size: [8]": "batch_size: a single value is wanted",
    "batch_size: null": "batch_size: a single value is wanted, not null",
    "top_k_tokens: some": "top_k_tokens: 'some' is not a positive whole number",
    "dtype: float8": "dtype: 'float8' is none of auto",
    "trust_remote_code: maybe": "neither true nor false",
    "output_dir: ''": "output_dir: it is empty",
    "- batch_size": "should hold keys and values",
    "batch_size: 8\n  dtype: {": "is not valid YAML",
    "a: !!python/object/apply:os.getcwd []": "is not valid YAML",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_the_key(tmp_path, text):
    path = written(tmp_path / "c.yaml", text)
    with pytest.raises(UserError) as caught:
        compute_fisher.parse(["--config", str(path)])
    assert str(path) in str(caught.value) and BAD_FILES[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_said(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        compute_fisher.parse(["--config", str(tmp_path / "c.yaml")])


def test_a_missing_file_is_said():
    with pytest.raises(UserError, match=r"cannot read the config none\.yaml: No such file"):
        compute_fisher.parse(["--config", "none.yaml"])


def test_an_empty_file_leaves_the_defaults(tmp_path):
    command = compute_fisher.parse(["--config", str(written(tmp_path / "c.yaml", "# nothing\n"))])
    assert settings_of(command) == settings_of(settings.Settings())
