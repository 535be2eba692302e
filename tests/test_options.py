"""Options of both scripts: flags, the YAML file, help, what is said of mistakes, and what a run records."""

import argparse
from dataclasses import fields, replace
import importlib
import json
from pathlib import Path
import subprocess
import sys

import pytest
import yaml

import compute_fisher
import core_experiment
from residual_fisher.common.options import TEXTS, count, finite, identity_of, path, positive, settings_of
from residual_fisher.common.program import UserError
import scripts
from scripts import ROOT

OPTIONS = {"core_experiment": core_experiment.Settings, "compute_fisher": compute_fisher.Settings}
# but for one that takes two words, and those of --redraw: see test_comparison.py, test_directories.py, test_panels.py
APART = ("compare", "format", "panel", "sentence")
EVERY_OPTION = [(script, key.name) for script, kind in OPTIONS.items() for key in fields(kind) if key.name not in APART]
COMMANDS = {"config", "overwrite", "dry_run", "redraw"}


NEEDED = {  # the options that have no effect before another is set, and that one
    "steer_token": ["--steer"], "steer_steps": ["--steer"], "steer_damping": ["--steer"],
    "continue_nats": ["--continue", "4"], "chat": ["--map", "Fine."],
}  # fmt: skip


# the options that have no effect beside --prompt; and the one beside which that has none
BESIDE_PROMPT = [
    "data_file", "text_column", "data_config", "data_split", "target_word", "occurrence", "num_sentences",
    "require_predicted",
]  # fmt: skip
PROMPT, BESIDE_MAP = ["prompt"], ["map", "chat"]


def parse(script: str, words: list[str]):
    return importlib.import_module(script).parse(words)


def flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")


def option_of(script: str, name: str):
    (key,) = [key for key in fields(OPTIONS[script]) if key.name == name]
    return key


def other_value(key) -> str:
    """A word that an option takes and that is not its default."""
    for word in ("3", "0.5", "true", "last", "compact", "nats", "float64", "drop", "none", "word"):
        try:
            if key.metadata["read"](word) != key.default:
                return word
        except argparse.ArgumentTypeError:  # not a word for this option
            continue
    raise AssertionError(f"no value for {key.name}")


def config(folder: Path, content: str | bytes) -> list[str]:
    (folder / "c.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    return ["--config", str(folder / "c.yaml")]


@pytest.fixture
def empty_config(tmp_path, monkeypatch) -> None:
    """A file that `other_value` names for --config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "3").touch()


# --- flags ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("empty_config")
@pytest.mark.parametrize(("script", "name"), EVERY_OPTION)
def test_every_option_is_a_flag_and_changes_nothing_else(script, name):
    key = option_of(script, name)
    word = other_value(key)
    value = key.metadata["read"](word)
    needed = NEEDED.get(name, [])
    several = key.metadata["several"] in (True, TEXTS)
    expected = {**vars(parse(script, needed)), name: (value,) if several else value}
    for words in ([flag(name), word], [f"{flag(name)}={word}"]):
        assert vars(parse(script, [*needed, *words])) == expected


@pytest.mark.parametrize("name", NEEDED)
def test_an_option_without_the_one_it_needs_is_an_error(name, tmp_path, capsys):
    word = other_value(option_of("core_experiment", name))
    for words in ([flag(name), word], config(tmp_path, f"{name}: {word}")):
        with pytest.raises(SystemExit):
            parse("core_experiment", words)
        said = f"argument {flag(name)}: it has no effect without {NEEDED[name][0]}\n"
        assert capsys.readouterr().err == f"core_experiment.py: error: {said}"
    default = json.dumps(option_of("core_experiment", name).default)
    settings = parse("core_experiment", config(tmp_path, f"{name}: {default}"))
    assert settings == replace(parse("core_experiment", []), config=settings.config)  # as a recorded run has it


@pytest.mark.parametrize("name", [*BESIDE_PROMPT, "prompt"])
def test_an_option_beside_one_that_leaves_it_no_effect_is_an_error(name, tmp_path, capsys):
    other = "map" if name == "prompt" else "prompt"
    word, default = (lambda key: (other_value(key), key.default))(option_of("core_experiment", name))
    for words in ([flag(name), word], config(tmp_path, f"{name}: {word}")):
        with pytest.raises(SystemExit):
            parse("core_experiment", [f"--{other}", "a text", *words])
        said = f"argument {flag(name)}: it has no effect beside --{other}\n"
        assert capsys.readouterr().err == f"core_experiment.py: error: {said}"
    words = config(tmp_path, f"{name}: {'null' if default is None else default}")  # as a recorded run has it
    assert parse("core_experiment", [f"--{other}", "a text", *words])


def test_each_prompt_has_a_flag_of_its_own_and_counts_once(tmp_path, capsys):
    words = ["--prompt", "Hello, world", "--prompt=a  b ", "--prompt", "Hello, world"]
    assert core_experiment.parse(words).prompt == ("Hello, world", "a  b ")
    assert core_experiment.parse(config(tmp_path, "prompt: [x, 'y, z']")).prompt == ("x", "y, z")
    assert core_experiment.parse(config(tmp_path, "prompt: x, y")).prompt == ("x, y",)
    with pytest.raises(SystemExit):
        core_experiment.parse(["--prompt", "Hello,", "world"])  # without quotes
    assert "unrecognized argument world" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"argument --steer: beside --prompt, .* it needs --steer-token"):
        core_experiment.parse(["--prompt", "x", "--steer"])


@pytest.mark.parametrize(
    ("script", "name"),
    [("core_experiment", "steer"), ("compute_fisher", "trust_remote_code"), ("compute_fisher", "overwrite")],
)
def test_a_switch_needs_no_word_and_takes_true_and_false(script, name):
    for words, value in (([], True), (["true"], True), (["false"], False)):
        assert getattr(parse(script, [flag(name), *words]), name) is value


@pytest.mark.parametrize("script", OPTIONS)
def test_help_fits_a_screen_names_every_flag_and_does_not_wait_for_torch(script):
    code = (
        f"import runpy, sys; sys.argv = ['{script}.py', '--help']\n"
        f"try:\n    runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'numpy', 'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = shown.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 120
    for key in fields(OPTIONS[script]):
        assert f"  {flag(key.name)} " in shown
        assert " ".join(key.metadata["help"].replace("%%", "%").split()) in " ".join(shown.split())


@pytest.mark.parametrize("script", OPTIONS)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batchsize=8", "unrecognized argument --batchsize: did you mean --batch-size?"),
        ("--batch 8", "unrecognized argument --batch: did you mean --batch-size?"),
        ("--column x", "-column?"),
        ("--xyzzy", "unrecognized argument --xyzzy\n"),
        ("--batch-size=-1", "argument --batch-size: '-1' is not a positive whole number"),
        ("--seed x", "argument --seed: 'x' is not a whole number, 0 or more"),
        ("--dtype float8", "argument --dtype: 'float8' is none of auto, float64, float32, bfloat16, float16"),
        ("--trust-remote-code maybe", "argument --trust-remote-code: 'maybe' is neither true nor false"),
        ("--output-dir", "argument --output-dir: expected one argument"),
        ("--dry-run --redraw x", "argument --dry-run: it writes nothing, and --redraw does"),
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
    reasons = {
        "core_experiment": "--layers 7: the model has layers 0 to 2",
        "compute_fisher": "LlamaForCausalLM has no module '7': its layers are model.layers.0 ... model.layers.2",
    }
    for script, process in running.items():
        assert process.communicate(timeout=120) == ("", f"{script}.py: error: {reasons[script]}\n")
        assert process.returncode == 2
    assert list(tmp_path.iterdir()) == []


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["²", "٣", "+1", "1_0", " 1", "1\n", "", 30 * "9", 5000 * "9"])
def test_a_whole_number_is_a_few_ascii_digits(text):
    for read in (positive, count):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
            read(text)


def test_leading_zeros_are_decimal_and_zero_has_no_sign():
    assert positive("010") == count("010") == 10
    assert f"{finite('-0'):g}" == "0"
    assert [f"{scale:g}" for scale in core_experiment.parse(["--scales", "-0", "0", "1", "1.0"]).scales] == ["0", "1"]
    assert core_experiment.choose_layers(core_experiment.parse(["--layers", "02", "2", "1"]).layers, 3) == (1, 2)


def test_scales_are_sorted_and_named_by_six_digits_and_one_is_not_0():
    assert core_experiment.parse(["--scales", "2", "-1", "0.1234567", "2.0"]).scales == (-1, 0.123457, 2)
    with pytest.raises(UserError, match="argument --scales: at least one must not be 0"):
        core_experiment.parse(["--scales", "0", "-0"])


PATHS = {
    "compute_fisher": ["config", "model-path", "dataset-name", "output-dir", "redraw"],
    "core_experiment": ["config", "model-name", "data-file", "output-dir", "redraw"],
}


@pytest.mark.parametrize(("script", "name"), [(script, name) for script in PATHS for name in PATHS[script]])
@pytest.mark.parametrize("word", ["", " ", "a\0b", 300 * "x", "~no-such-user"])
def test_a_path_that_can_be_none_is_one_line(script, name, word, capsys):
    with pytest.raises(SystemExit) as end:
        parse(script, [f"--{name}", word])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and f"argument --{name}: " in said and len(said) < 200


def test_a_tilde_is_the_home_directory_in_every_path_of_both_scripts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config(tmp_path, "output_dir: ~/out\nmodel_path: org/~model\ndataset_name: ~/d.txt\n")
    found = compute_fisher.parse(["--config", "~/c.yaml", "--redraw", "~/x"])
    assert (found.redraw, found.output_dir) == (f"{tmp_path}/x", f"{tmp_path}/out")
    assert (found.model_path, found.dataset_name) == ("org/~model", f"{tmp_path}/d.txt")
    found = core_experiment.parse(["--model-name", "~/m", "--data-file", "~/d", "--output-dir", "~", "--redraw", "~/r"])
    names = [f"{tmp_path}/m", f"{tmp_path}/d", str(tmp_path), f"{tmp_path}/r"]
    assert [found.model_name, found.data_file, found.output_dir, found.redraw] == names
    assert path("./~") == "./~"


def test_bundled_data_are_found_from_anywhere_and_a_users_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment, pipeline = core_experiment.parse([]), compute_fisher.parse([])
    assert experiment.data == str(ROOT / "data" / "animals.json")
    assert pipeline.dataset == str(ROOT / "data" / "prompts.jsonl")
    assert core_experiment.parse(["--data-file", "none/such"]).data == "none/such"
    (tmp_path / "data").mkdir()
    for name in ("animals.json", "prompts.jsonl"):
        (tmp_path / "data" / name).touch()
    assert (experiment.data, pipeline.dataset) == ("data/animals.json", "data/prompts.jsonl")


# --- the YAML file -------------------------------------------------------------------------------


def test_the_bundled_config_gives_every_key_its_default():
    assert yaml.safe_load((ROOT / "config.yaml").read_text()) == settings_of(OPTIONS["compute_fisher"]())
    assert compute_fisher.parse([]) == OPTIONS["compute_fisher"]()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_other_configs_are_valid(path):
    assert settings_of(compute_fisher.parse(["--config", str(path)])) != settings_of(compute_fisher.parse([]))


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path):
    words = config(tmp_path, "batch_size: 3\ntop_k_tokens: all\nhook_layer_name: 7\nseed: null\n")
    found = compute_fisher.parse([*words, "--batch-size", "5", "--overwrite"])
    assert (found.batch_size, found.top_k_tokens, found.hook_layer_name, found.seed) == (5, "all", "7", None)
    assert found.num_prompts == 100 and found.overwrite and not found.dry_run


@pytest.mark.parametrize(("script", "name"), [(s, name) for s, name in EVERY_OPTION if name not in COMMANDS])
def test_a_yaml_key_is_read_as_its_flag_would_be(script, name, tmp_path):
    word, needed = other_value(option_of(script, name)), NEEDED.get(name, [])
    from_yaml = parse(script, [*needed, *config(tmp_path, f"{name.rstrip('_')}: {word}")])
    assert settings_of(from_yaml) == settings_of(parse(script, [*needed, flag(name), word]))


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("batch_size", "010", 10),
        ("hook_layer_name", "010", "010"),
        ("hook_layer_name", "1e3", "1e3"),
        ("dataset_split", "no", "no"),
        ("dataset_split", "2024-01-01", "2024-01-01"),
        ("num_prompts", "all", "all"),
        ("trust_remote_code", "True", True),
        ("seed", "0", 0),
        ("prompt_column", "'null'", "null"),
        *(("prompt_column", none, None) for none in ("null", "~", "")),
    ],
)
def test_values_that_yaml_would_read_as_something_else_are_what_their_flag_makes_of_them(key, word, value, tmp_path):
    assert getattr(compute_fisher.parse(config(tmp_path, f"{key}: {word}")), key) == value
    if value is not None:
        assert getattr(compute_fisher.parse([flag(key), word.strip("'")]), key) == value


def test_numbers_may_be_joined_by_commas(tmp_path):
    for words in ("--layers 3,12,20", "--layers 3, 12, 20", "--layers 3 12,20", "--layers=3,12,20"):
        assert core_experiment.parse(words.split()).layers == (3, 12, 20)
    assert core_experiment.parse(["--scales=-1,0.5"]).scales == (-1, 0.5)
    assert core_experiment.parse(config(tmp_path, "layers: 3, 12")).layers == (3, 12)
    with pytest.raises(SystemExit):
        core_experiment.parse(["--layers", "3,x"])


def test_several_files_are_a_tuple_and_one_is_its_name(tmp_path):
    for script, key, name in (
        ("core_experiment", "--data-file", "data"),
        ("compute_fisher", "--dataset-name", "dataset"),
    ):
        assert getattr(parse(script, [key, "a, b.csv"]), name) == "a, b.csv"
        assert getattr(parse(script, [key, "a.csv", "b.csv"]), name) == ("a.csv", "b.csv")
    assert parse("compute_fisher", config(tmp_path, "dataset_name: [a.csv, b.csv]")).dataset == ("a.csv", "b.csv")
    assert parse("compute_fisher", config(tmp_path, "dataset_name: [a.csv]")).dataset == "a.csv"


def test_the_target_word_has_no_space_around_it():
    assert core_experiment.parse(["--target-word", " animals "]).target_word == "animals"


def test_an_option_of_several_words_is_a_list_in_yaml(tmp_path):
    found = core_experiment.parse(config(tmp_path, "layers: [02, 0]\nscales: [1, -1]\nsteer: true\n"))
    assert (found.layers, found.scales, found.steer) == ((2, 0), (-1, 1), True)
    assert core_experiment.parse(config(tmp_path, "layers: null")).layers is None
    assert core_experiment.parse(config(tmp_path, "layers: all")).layers == ("all",)


@pytest.mark.parametrize("content", ["", "# nothing\n", "~", "null"])
def test_an_empty_file_leaves_the_defaults(content, tmp_path):
    found = compute_fisher.parse(config(tmp_path, content))
    assert settings_of(found) == settings_of(OPTIONS["compute_fisher"]())


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
BAD = {
    "batchsize: 8": "unknown key 'batchsize': did you mean batch_size?",
    "completely_else: 8": "unknown key 'completely_else': the keys are model_",
    "overwrite: true": "unknown key 'overwrite': the keys are model_",
    "[a]: 8": "unknown key \"['a']\": the keys are model_",
    "batch_size: eight": "batch_size: 'eight' is not a positive whole number",
    "batch_size: 2.5": "batch_size: '2.5' is not a positive whole number",
    "batch_size: 2024-13-45": "batch_size: '2024-13-45' is not a positive whole number",
    "batch_size: 0x10": "batch_size: '0x10' is not a positive whole number",
    "batch_size: 1:30": "batch_size: '1:30' is not a positive whole number",
    "batch_size: " + 30 * "9": "batch_size: '999999999999999999999999999999' is not a positive whole number",
    "batch_size: !!int abc": "is not valid YAML: a tag (!name) is not allowed (line 1, column 13)",
    "a: !!python/object/apply:os.getcwd []": "is not valid YAML: a tag (!name) is not allowed",
    "batch_size: [8]": "batch_size: a single value is wanted, not a list",
    "batch_size: null": "batch_size: a single value is wanted, not null",
    "batch_size: {}": "batch_size: a single value is wanted, not keys and values",
    "batch_size: {a: 1, a: 2}": "batch_size: a single value is wanted, not keys and values",
    "batch_size: 3\nbatch_size: 4": "is not valid YAML: the key batch_size is there twice (line 2, column 1)",
    "a: &x [*x]": "an alias (*name) is not allowed",
    "a0: &a0 [x]\n" + BOMB: "an alias (*name) is not allowed",
    "a: &a {b: 1}\nc: {<<: *a}": "an alias (*name) is not allowed",
    "seed: " + 5000 * "9": "seed: '99999999999999",
    "output_dir: ''": "output_dir: it is empty",
    "output_dir: ~": "output_dir: a single value is wanted, not null",
    'output_dir: "a\\0b"': "output_dir: 'a\\x00b' holds a null character",
    'output_dir: "\\ud800"': "cannot be a file's name here",
    f"output_dir: {300 * 'x'}": "has a name of more than 255 bytes",
    "output_dir: ~no-such-user/x": "is no user's home directory",
    "- batch_size": "should hold keys and values",
    "8": "should hold keys and values",
    "batch_size: 8\n  dtype: {": "is not valid YAML: mapping values are not allowed here (line 2, column 8)",
    "[" * 5000: "is not valid YAML: a depth of more than 20 is not allowed (line 1, column 21)",
    30 * "- " + "x": "is not valid YAML: a depth of more than 20 is not allowed",
    '"\\UFFFFFFFF": 1': "is not valid YAML: ",
    "%YAML 1." + 5000 * "1" + "\n---\n": "is not valid YAML: ",
    "a: 1\n---\nb: 2": "is not valid YAML: but found another document (line 2, column 1)",
    "x" * 200_000: "it has more than 100,000 characters",
    b"\xff\xfe": "it is not UTF-8 text",
}


@pytest.mark.parametrize("script", OPTIONS)
@pytest.mark.parametrize("content", BAD, ids=[str(text[:30]) for text in BAD])
def test_a_bad_config_is_one_line_that_says_where(script, content, tmp_path):
    with pytest.raises(UserError) as caught:
        parse(script, config(tmp_path, content))
    said = str(caught.value)
    assert str(tmp_path / "c.yaml") in said and BAD[content] in said
    assert "\n" not in said and len(said) < 800


@pytest.mark.parametrize(
    ("script", "content", "said"),
    [
        ("compute_fisher", "top_k_tokens: some", "top_k_tokens: 'some' is not a positive whole number"),
        ("core_experiment", "layers: []", "layers: a single value is wanted, not a list"),
        ("core_experiment", "layers: [[1]]", "layers: a single value is wanted, not a list"),
        ("core_experiment", "layers: [1, null]", "layers: a single value is wanted, not null"),
        ("core_experiment", "layers: [1, x]", "layers: 'x' is not a whole number, 0 or more"),
        ("core_experiment", "continue_: 3", "unknown key 'continue_': did you mean continue?"),
    ],
)
def test_a_bad_value_of_one_script_is_said_too(script, content, said, tmp_path):
    with pytest.raises(UserError) as caught:
        parse(script, config(tmp_path, content))
    assert str(caught.value) == f"{tmp_path / 'c.yaml'}: {said}"


@pytest.mark.parametrize("script", OPTIONS)
def test_a_missing_config_and_one_without_an_end_are_one_line_and_code_2(script, capsys):
    reasons = {"none.yaml": "No such file or directory", "/dev/zero": "it has more than 100,000 characters"}
    for file, said in reasons.items():
        assert scripts.as_program(script, ["--config", file]) == 2
        assert capsys.readouterr().err == f"{script}.py: error: cannot read the config {file}: {said}\n"


# --- what a run records, and what makes it the same run ------------------------------------------

INCIDENTAL = {
    "num_prompts", "num_sentences", "output_dir", "device", "trust_remote_code", "batch_size", "reference", "base",
    "false_alarms", "explain", "fail_on_finding", "map", "chat", "prompt",
}  # fmt: skip


@pytest.mark.usefixtures("empty_config")
@pytest.mark.parametrize(("script", "name"), EVERY_OPTION)
def test_two_runs_are_the_same_if_all_options_with_an_effect_on_results_are(script, name):
    words, needed = [flag(name), other_value(option_of(script, name))], NEEDED.get(name, [])
    same = identity_of(parse(script, [*needed, *words])) == identity_of(parse(script, needed))
    assert same == (name in INCIDENTAL | COMMANDS)
    if needed:  # without, it would have none
        assert name not in identity_of(parse(script, []))


@pytest.mark.parametrize("script", OPTIONS)
def test_a_run_can_be_repeated_from_the_settings_that_it_recorded(script, tmp_path):
    settable = [name for s, name in EVERY_OPTION if s == script and name not in COMMANDS]
    for left_out in (PROMPT, [*BESIDE_PROMPT, *BESIDE_MAP]):  # which have no effect beside each other
        given = [name for name in settable if name not in left_out]
        settings = parse(script, [w for name in given for w in (flag(name), other_value(option_of(script, name)))])
        recorded = json.loads(json.dumps(settings_of(settings)))
        assert recorded == settings_of(settings) and list(recorded) == settable
        text = yaml.safe_dump({name.rstrip("_"): value for name, value in recorded.items()})
        assert settings_of(parse(script, config(tmp_path, text))) == recorded
