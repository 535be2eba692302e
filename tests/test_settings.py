"""The pipeline's settings: YAML, flags, and what is said of mistakes in them."""

from dataclasses import asdict

import pytest
import yaml

from conftest import ROOT
from errors import UserError
import settings


def written(path, text: str):
    path.write_text(text)
    return path


def test_the_bundled_config_gives_every_key_its_default():
    assert yaml.safe_load(settings.CONFIG.read_text()) == asdict(settings.Settings())
    assert settings.parse_args([]) == (settings.Settings(), False)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_other_configs_are_valid(path):
    assert set(settings.read_config(path)) <= set(settings.KEYS)


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path):
    path = written(tmp_path / "c.yaml", "batch_size: 3\ntop_k_tokens: all\nhook_layer_name: 7\nseed: null\n")
    found, overwrite = settings.parse_args(["--config", str(path), "--batch-size", "5", "--overwrite"])
    assert (found.batch_size, found.top_k_tokens, found.hook_layer_name, found.seed) == (5, "all", "7", None)
    assert found.num_prompts == 100 and overwrite


def test_every_key_is_a_flag():
    values = {int: "3", str: "last"}
    special = {"dtype": "float32", "store": "compact", "trust_remote_code": "true"}
    for name, key in settings.KEYS.items():
        value = special.get(name, values.get(type(key.default), "3"))
        value = "last" if name == "bias_positions" else value
        found, _ = settings.parse_args(["--" + name.replace("_", "-"), value])
        assert str(getattr(found, name)).lower() == value


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
    with pytest.raises(UserError) as caught:
        settings.read_config(written(tmp_path / "c.yaml", text))
    assert BAD_FILES[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_said():
    with pytest.raises(UserError, match=r"cannot read the config none\.yaml: No such file"):
        settings.parse_args(["--config", "none.yaml"])


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--batchsize=8", "unrecognized argument --batchsize: did you mean --batch-size?"),
        ("--batch", "unrecognized argument --batch: did you mean --batch-size?"),
        ("--xyzzy", "unrecognized argument --xyzzy"),
        ("--num-prompts=-1", "'-1' is not a positive whole number"),
    ],
)
def test_a_bad_flag_ends_with_one_line_and_code_2(capsys, flag, said):
    with pytest.raises(SystemExit) as caught:
        settings.parse_args([flag])
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert said in message and message.count("\n") == 1
