"""Models whose files are damaged, incomplete or strange; and what tells two models apart."""

from collections.abc import Callable, Iterator
import json
import logging
import logging.handlers
from pathlib import Path
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
import torch
from torch import nn
import transformers as hf

from conftest import make_model_directory
import fisher
from residual_fisher.common.program import EMBEDDED, UserError
from residual_fisher.model import embedded, loading
from residual_fisher.pipeline.prompts import Prompt, encode
import scripts
import tiny

WEIGHTS = "model.safetensors"
LIST = "list indices must be integers" if tiny.before("5.18") else None  # what is said of a list in a file


def rewrite(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Damage: changes the named weights of a model's directory."""

    def damage(model: Path) -> None:
        weights = load_file(model / WEIGHTS)
        change(weights)
        save_file(weights, model / WEIGHTS, metadata={"format": "pt"})

    return damage


def configure(**values) -> Callable[[Path], None]:
    """Damage: changes values of config.json."""

    def damage(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **values}))

    return damage


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content)


def truncate(name: str, length: int) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:length])


class Unsafe:
    def __reduce__(self):
        return print, ("code in a checkpoint",)


def pickled(model: Path) -> None:
    (model / WEIGHTS).unlink()
    torch.save({"lm_head.weight": torch.ones(1), "unsafe": Unsafe()}, model / "pytorch_model.bin")


def unknown_index(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / f"{WEIGHTS}.index.json").write_text("{}")


def sentencepiece_alone(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\n\x0f\n\x05<unk>")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


DAMAGES = {
    "a missing weight": (
        rewrite(lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight")),
        "its checkpoint lacks 1 of the weights, model.layers.1.mlp.up_proj.weight among them",
    ),
    "a missing head": (
        rewrite(lambda weights: weights.pop("lm_head.weight")),
        "lacks 1 of the weights, lm_head.weight",
    ),
    "more layers than weights": (configure(num_hidden_layers=5), "lacks 18 of the weights"),
    "a weight of another shape": (
        rewrite(lambda weights: weights.update({"model.norm.weight": torch.ones(7)})),
        "1 of its weights have another shape: model.norm.weight is 7, not 32",
    ),
    "truncated weights": (truncate(WEIGHTS, -100), "SafetensorError"),
    "a truncated header": (truncate(WEIGHTS, 100), "SafetensorError"),
    "empty weights": (put(WEIGHTS, b""), "SafetensorError"),
    "garbage as weights": (put(WEIGHTS, b"\xff" * 5000), "SafetensorError"),
    "unsafe weights": (pickled, "pickle that torch refuses as unsafe"),
    "an empty index of weights": (unknown_index, "weight_map"),
    "layers in words": (configure(num_hidden_layers="three"), "num_hidden_layers"),
    "a list as width": (configure(hidden_size=[32]), "hidden_size"),
    "an unknown activation": (configure(hidden_act="nope"), "KeyError: 'nope'"),
    "an unknown architecture": (configure(model_type="nope"), "`nope`"),
    "an encoder-decoder": (
        lambda model: hf.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4).save_pretrained(model),
        "T5 is an encoder-decoder, not a decoder-only language model",
    ),
    "a rotation in words": (configure(rope_parameters={"rope_theta": "x", "rope_type": "default"}), "TypeError"),
    "a list as configuration": (put("config.json", b"[]"), LIST or "not list"),
    "deep nesting": (put("config.json", b"[" * 100_000), "recursion"),
    "no tokenizer in its file": (put("tokenizer.json", b"{}"), "KeyError: 'added_tokens'"),
    "a tokenizer of sentencepiece alone": (
        sentencepiece_alone,
        "its tokenizer has no tokenizer.json; reading it needs `pip install sentencepiece",
    ),
    "a truncated tokenizer": (truncate("tokenizer.json", 1000), "JSONDecodeError"),
    "a list as the tokenizer's settings": (put("tokenizer_config.json", b"[]"), LIST or "'list' object"),
}


def assert_one_line(said: str, *parts: str) -> None:
    assert said.count("\n") == 1 and ": error: " in said, said
    assert all(part in said for part in parts), said


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What transformers logs, which pytest does not capture with stderr."""
    records = logging.handlers.BufferingHandler(1000)
    logger = logging.getLogger("transformers")
    logger.addHandler(records)
    yield records.buffer
    logger.removeHandler(records)


def run(script: str, model: Path, dataset: Path, output: Path, *words: str) -> int:
    """A script's exit code; the experiment reads its own sentences."""
    if script == "core_experiment":
        return scripts.core_experiment(model, output, *words)
    return scripts.run(script, [*scripts.pipeline_words(model, dataset, output), *words])


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_one_line_and_exit_code_2(name, chat_directory, dataset, tmp_path, capsys, logged):
    damage, reason = DAMAGES[name]
    damage(model := shutil.copytree(chat_directory, tmp_path / "model"))
    with pytest.raises(UserError) as caught:
        loading.load(str(model), device="cpu")
    capsys.readouterr()
    script = ("core_experiment", "compute_fisher")[len(name) % 2]
    assert run(script, model, dataset, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert_one_line(said, reason, f"cannot load model '{model}'")
    assert reason in str(caught.value) and not logged
    assert not (tmp_path / "out").exists()


def keep_only(*names: str) -> Callable[[Path], None]:
    return lambda model: [path.unlink() for path in model.iterdir() if path.name not in names]


def in_the_hubs_cache(model: Path) -> None:
    snapshot = model / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    [path.rename(snapshot / path.name) for path in model.iterdir() if path.is_file()]


def as_checkpoint(model: Path) -> None:
    (model / "checkpoint-500").mkdir()
    [path.rename(model / "checkpoint-500" / path.name) for path in model.iterdir() if path.is_file()]


def only_gguf(model: Path) -> None:
    keep_only("config.json")(model)
    (model / "model-Q4_K_M.gguf").write_bytes(b"GGUF\3")


def with_code(model: Path) -> None:
    code = "from transformers import LlamaConfig\n\n\nclass C(LlamaConfig):\n    model_type = 'mine'\n"
    (model / "configuration_mine.py").write_text(code)
    configure(model_type="mine", auto_map={"AutoConfig": "configuration_mine.C"})(model)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 60724\n"
NO_MODELS = {  # what is done to a model's folder, and what is said of it
    "weights of Git LFS": (
        put(WEIGHTS, POINTER),
        f"its {WEIGHTS} is a Git LFS pointer, not the file itself: run `git lfs",
    ),
    "a tokenizer of Git LFS": (put("tokenizer.json", POINTER), "its tokenizer.json is a Git LFS pointer"),
    "a configuration of Git LFS": (put("config.json", POINTER), "its config.json is a Git LFS pointer"),
    "no tokenizer": (
        keep_only("config.json", "generation_config.json", WEIGHTS),
        "it has no tokenizer: save the one of",
    ),
    "no weights": (lambda model: (model / WEIGHTS).unlink(), "it holds no weights (*.safetensors): is it complete?"),
    "only a GGUF": (only_gguf, "its weights are GGUF, the format of llama.cpp: give the model that it was made from"),
    "an empty folder": (keep_only(), "it has no config.json, so it is no model's folder"),
    "a folder of checkpoints": (
        as_checkpoint,
        "it has no config.json, so it is no model's folder; did you mean {}/checkpoint-500?",
    ),
    "a folder of the hub's cache": (
        in_the_hubs_cache,
        "it is a folder of the hub's cache: give org/name, or the folder in",
    ),
    "code of its own": (with_code, "it brings code of its own, which only --trust-remote-code runs: read it before"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_a_folder_that_is_no_model_is_told_what_it_is(name, chat_directory, tmp_path):
    change, said = NO_MODELS[name]
    change(model := shutil.copytree(chat_directory, tmp_path / "models--org--name"))
    with pytest.raises(UserError) as caught:
        loading.load(str(model), device="cpu")
    assert str(caught.value).startswith(f"cannot load model '{model}': {said.format(model)}")


NAMES = {  # names of no folder, and what is said of each
    "no/such/folder": "no such file or folder (looked for from ",
    "./folder": "no such file or folder",
    "https://huggingface.co/org/name/tree/main": "it is an address: give the model's name, org/name",
    r"D:\models\llama": "it is a path of Windows",
    "my model": "no such file or folder, and no model on the hub has such a name",
    "org/model-that-is-nowhere": "no such folder, and on the hub: ",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_stands_for_no_model_is_told_why(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        loading.load(name, device="cpu")
    assert str(caught.value).startswith(f"cannot load model {name!r}: {NAMES[name]}")


def test_a_file_is_no_model(chat_directory, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3")
    for path, said in (
        (chat_directory / WEIGHTS, "give the folder that holds it"),
        (tmp_path / "m.gguf", "it is GGUF"),
    ):
        with pytest.raises(UserError, match=said):
            loading.load(str(path), device="cpu")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this is such a Mac")
def test_a_device_of_another_machine_is_one_short_line(chat_directory):
    with pytest.raises(UserError, match=r"^device mps is not available: this is no Mac .* \(here: cpu"):
        loading.load(str(chat_directory), device="mps")


def test_a_model_without_layers_is_refused(chat_directory, dataset, tmp_path, capsys):
    configure(num_hidden_layers=0)(model := shutil.copytree(chat_directory, tmp_path / "model"))
    for script in ("core_experiment", "compute_fisher"):
        assert run(script, model, dataset, tmp_path / "out") == 2
        assert "error: LlamaForCausalLM has no list of 0 decoder layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_not_missing(byte_level, tmp_path):
    make_model_directory(tmp_path, byte_level, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    model, _ = loading.load(str(tmp_path), device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_lack_of_memory_is_not_called_a_damaged_model(chat_directory):
    no_room = scripts.calls_of(loading.AutoModelForCausalLM, "from_pretrained", torch.OutOfMemoryError)
    with no_room, pytest.raises(torch.OutOfMemoryError):
        loading.load(str(chat_directory), device="cpu")


def test_what_transformers_warns_of_is_said_of_a_model_that_loads(chat_directory, tmp_path, logged):
    configure(num_hidden_layers=2)(model := shutil.copytree(chat_directory, tmp_path / "model"))
    loading.load(str(model), device="cpu")
    assert "model.layers.2.mlp.up_proj.weight" in logged[0].getMessage()


# --- the embedded model's cache ------------------------------------------------------------------


@pytest.fixture
def conversions(chat_directory, tmp_path, monkeypatch) -> list[Path]:
    """A cache of its own, and conversions that copy a tiny model; they are listed."""
    converted = []

    def convert(gguf: Path, directory: Path) -> None:
        shutil.copytree(chat_directory, directory)
        converted.append(directory)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_gguf_file", lambda work: work)
    monkeypatch.setattr(embedded, "_convert", convert)
    return converted


CACHE_DAMAGES = {
    "truncated weights": truncate(WEIGHTS, 3000),
    "empty weights": put(WEIGHTS, b""),
    "no weights": lambda model: (model / WEIGHTS).unlink(),
    "a missing weight": DAMAGES["a missing weight"][0],
    "no tokenizer in its file": put("tokenizer.json", b"{}"),
    "an empty configuration": put("config.json", b""),
    "an empty folder": lambda model: [path.unlink() for path in model.iterdir()],
}


@pytest.mark.parametrize("name", CACHE_DAMAGES)
def test_a_damaged_embedded_model_is_converted_again(name, conversions, capsys):
    expected = loading.fingerprint(*loading.load(EMBEDDED, device="cpu"))
    path = embedded.embedded_model()
    CACHE_DAMAGES[name](path)
    capsys.readouterr()
    loaded = loading.load(EMBEDDED, device="cpu")
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"note: cannot load model '{EMBEDDED}': ") and said[0].endswith(": converting it again")
    assert loading.fingerprint(*loaded) == expected
    assert len(conversions) == 2 and [*embedded.cache_directory().glob("[!.]*")] == [path]
    loading.load(EMBEDDED, device="cpu")
    assert len(conversions) == 2 and not capsys.readouterr().err


def test_a_file_in_the_embedded_models_place_gives_way(conversions):
    path = embedded.embedded_model()
    shutil.rmtree(path)
    path.write_text("not a folder")
    loading.load(EMBEDDED, device="cpu")
    assert path.is_dir()


def test_a_conversion_that_does_not_load_is_one_line_and_not_repeated_for_ever(conversions, monkeypatch):
    monkeypatch.setattr(
        embedded, "_convert", lambda gguf, directory: conversions.append(directory) or directory.mkdir()
    )
    with pytest.raises(UserError, match=f"cannot load model '{EMBEDDED}'"):
        loading.load(EMBEDDED, device="cpu")
    assert len(conversions) == 2


def test_a_damaged_embedded_model_stays_if_it_cannot_be_converted_again(conversions):
    path = embedded.embedded_model()
    (path / "config.json").unlink()
    offline = scripts.calls_of(embedded, "_gguf_file", UserError("cannot fetch it"))
    with offline, pytest.raises(UserError, match="cannot fetch it"):
        loading.load(EMBEDDED, device="cpu")
    assert (path / WEIGHTS).is_file()


def test_what_another_process_has_mended_is_not_converted_again(conversions):
    path = embedded.embedded_model()
    damaged = path.stat().st_ino
    assert embedded.embedded_model(damaged) == path and len(conversions) == 2
    assert embedded.embedded_model(damaged) == path and len(conversions) == 2


# --- models that load ----------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["core_experiment", "compute_fisher"])
def test_tokens_beyond_the_embedding_are_one_line(script, chat_tokenizer, animals, tmp_path, capsys):
    """The first prompt has rows in the embedding, some of the others have not."""
    known = max(encode(chat_tokenizer, Prompt(0, 0, "xy"), 100).ids) + 1
    model = make_model_directory(tmp_path / "model", chat_tokenizer, vocab_size=known)
    (tmp_path / "few.txt").write_text("\n".join(["xy", *animals[:5], chat_tokenizer.decode([len(chat_tokenizer) - 1])]))
    capsys.readouterr()
    assert run(script, model, tmp_path / "few.txt", tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].endswith(f"and its embedding has {known} tokens") and "its tokenizer gives token " in said[-1]
    assert len([line for line in said if "error" in line]) == 1 and not any("Traceback" in line for line in said)


def test_a_target_word_beyond_the_embedding_is_one_line(byte_level, animals, tmp_path, capsys):
    (target,) = byte_level(" animals").input_ids
    model = make_model_directory(tmp_path / "model", byte_level, vocab_size=target)
    text = next(text for text in ("a b animals", "the animals") if max(byte_level(text).input_ids) == target)
    (tmp_path / "one.txt").write_text(text)
    assert scripts.core_experiment(model, tmp_path / "out", "--data-file", str(tmp_path / "one.txt")) == 2
    assert f"its tokenizer gives token {target}, and its embedding has {target}" in capsys.readouterr().err


@pytest.mark.parametrize("ids", [[3, tiny.VOCABULARY, 5], [3, 5, tiny.VOCABULARY], [-1, 3]])
def test_unknown_tokens_never_reach_the_model(ids):
    model, ids = tiny.shared("llama"), torch.tensor(ids)
    with pytest.raises(fisher.UnsupportedModelError, match=f"token {-1 if -1 in ids else 97}, .* has 97 tokens"):
        fisher.linearize(model, ids)
    with pytest.raises(fisher.UnsupportedModelError, match="gives token"):
        fisher.linearize_prompts(model, model.model.layers[0], ids[None], torch.tensor([len(ids)]))


def test_a_vocabulary_of_three_tokens_works(dataset, tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "animals": 1, "the": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    model = make_model_directory(tmp_path / "model", tokenizer, bos_token_id=None, eos_token_id=None)
    assert scripts.core_experiment(model, tmp_path / "e", "--trust-radius", "--compare-exact") == 0
    results, _ = scripts.experiment_results(tmp_path / "e")
    assert len(results["contexts"][0]["top_ids"]) == 3
    assert scripts.compute_fisher(model, dataset, tmp_path / "p", num_prompts=4) == 0


def test_more_eigenvectors_than_the_matrix_has_is_said(model_directory, tmp_path, capsys, without_pictures):
    words = ["--num-sentences", "1", "--scales", "0", "1", "--layers", "1", "--num-eigenvectors", "50"]
    for k, most in (("6", 6), ("100", 32), ("all", 32)):
        assert scripts.core_experiment(model_directory, tmp_path / k, *words, "--max-vocab-subset", k) == 0
        assert "note: --num-eigenvectors 50 is more than a matrix of" in capsys.readouterr().out
        results, arrays = scripts.experiment_results(tmp_path / k)
        assert arrays["leading_eigenvectors"].shape[2] == most == results["experiment_config"]["num_eigenvectors"]


def test_a_model_of_few_positions_is_explained(byte_level, tmp_path, capsys):
    model = make_model_directory(tmp_path / "model", byte_level, max_position_embeddings=4)
    capsys.readouterr()
    assert scripts.core_experiment(model, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert_one_line(said, "the model has positions for 4 tokens", "give it shorter ones, or choose another model")


@pytest.mark.parametrize(("dtype", "said"), [("float32", False), ("float64", False), ("bfloat16", True)])
def test_a_wider_dtype_is_advised_only_where_there_is_one(dtype, said, model_directory, tmp_path, capsys):
    model = shutil.copytree(model_directory, tmp_path / "model")
    rewrite(lambda weights: weights["model.norm.weight"].fill_(torch.nan))(model)
    assert scripts.core_experiment(model, tmp_path / "out", "--dtype", dtype) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert ": error: 8 of the first 8 sentences failed: " in error and "hold NaN or infinity" in error
    assert ("try dtype float32" in error) == said


# --- what tells two models apart -----------------------------------------------------------------


def shift(model, tokenizer) -> None:
    """Changes that a sum, or one weighted by the place, would miss."""
    bits = model.model.layers[0].mlp.up_proj.weight.view(torch.int32)[0]
    bits[3:6] += torch.tensor([1, -2, 1], dtype=torch.int32)


def set_rows(owner: nn.Module, rows: object, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    owner.weight[rows] = change(owner.weight[rows])


CHANGES = {
    "a setting": lambda model, _: setattr(model.config, "rms_norm_eps", 1e-5),
    "the rotation": lambda model, _: model.config.rope_parameters.update(rope_theta=500.0),
    "the activation": lambda model, _: setattr(model.config, "hidden_act", "gelu"),
    "a patch": lambda model, _: set_rows(model.model.layers[1].mlp.down_proj, slice(20, 24), lambda rows: rows + 1e-3),
    "three rows": lambda model, _: set_rows(model.lm_head, slice(5, 8), lambda rows: 1.01 * rows),
    "rows swapped": lambda model, _: set_rows(model.lm_head, [5, 6], lambda rows: rows.flip(0)),
    "embeddings swapped": lambda model, _: set_rows(model.model.embed_tokens, [0, 1], lambda rows: rows.flip(0)),
    "two signs": lambda model, _: model.model.norm.weight.view(torch.int32)[3:5].bitwise_xor_(torch.tensor(-(1 << 31))),
    "a matrix negated": lambda model, _: model.model.layers[0].self_attn.q_proj.weight.neg_(),
    "one bit": lambda model, _: model.model.norm.weight.view(torch.int32)[7:8].bitwise_xor_(torch.tensor(1)),
    "bits that keep the sum": shift,
    "the template": lambda _, tokenizer: setattr(tokenizer, "chat_template", tokenizer.chat_template + " "),
    "a token": lambda _, tokenizer: tokenizer.add_tokens(["zebras"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_fingerprint_sees_every_change(name, chat_directory):
    model, tokenizer = loading.load(str(chat_directory), device="cpu")
    before = loading.fingerprint(model, tokenizer)
    CHANGES[name](model, tokenizer)
    assert loading.fingerprint(model, tokenizer) != before


def test_a_fingerprint_tells_architectures_and_tokenizers_apart(byte_level, sentencepiece):
    model = tiny.build("llama")
    before = loading.fingerprint(model, byte_level)
    assert before == loading.fingerprint(tiny.build("llama"), byte_level)
    assert before != loading.fingerprint(tiny.shared("qwen2"), byte_level)
    assert before != loading.fingerprint(model, sentencepiece)


def test_a_fingerprint_is_that_of_the_files_wherever_they_are_and_whatever_was_run(chat_directory, tmp_path):
    model, tokenizer = loading.load(str(chat_directory), device="cpu")
    before = loading.fingerprint(model, tokenizer)
    fisher.linearize(model, [3, 4, 5])
    model.set_attn_implementation("sdpa")
    elsewhere = shutil.copytree(chat_directory, tmp_path / "elsewhere")
    configure(transformers_version="0.0")(elsewhere)
    assert before == loading.fingerprint(model, tokenizer)
    assert before == loading.fingerprint(*loading.load(str(elsewhere), device="cpu"))
    assert before != loading.fingerprint(*loading.load(str(elsewhere), dtype="float64", device="cpu"))


def swap(values: torch.Tensor, *places: int) -> torch.Tensor:
    other = values.clone()
    other[list(places)] = values[list(reversed(places))]
    return other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_checksum_sees_signs_and_order(dtype):
    values = torch.randn(2 * loading.BLOCK + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    last = len(values) - 1
    others = [-values, values.flip(0), values.roll(loading.BLOCK), values[:-1], values.repeat(2), values.abs()]
    for one, two in ((0, 1), (0, 2), (1, loading.BLOCK), (5, last), (loading.BLOCK, last)):
        negated = values.clone()
        negated[[one, two]] *= -1
        others += [negated, swap(values, one, two)]
    assert len({loading._checksum(some) for some in (values, *others)}) == 1 + len(others)


def test_two_changes_cancel_in_neither_sum():
    """Two weights whose highest bits flip are seen unless both sums of their weights end in 33 zero bits."""
    weights = loading._scrambled(torch.arange(2 * loading.BLOCK))
    assert (weights % 2 == 1).all()
    for some in weights.unflatten(0, (2, -1)):
        low = some % (1 << 33)
        both = torch.cat([low, ((1 << 33) - low)])  # sums and differences of two
        assert both.unique().numel() >= len(both) - 2  # by chance, 0.06 of the 2^27 pairs agree in one sum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_checksum_is_exact_and_does_not_depend_on_how_it_is_cut(dtype):
    values = torch.randint(0, 2, (3 * loading.BLOCK + 5,), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert loading._checksum(values) == loading._checksum(values.reshape(-1, 1).expand(-1, 2)[:, 0])
    assert loading._checksum(values[3:]) == loading._checksum(values[3:].clone())  # not at an address of four bytes
    for place in (0, loading.BLOCK, len(values) - 1):
        other = values.clone()
        other[place] = 1 - values[place].int()
        assert loading._checksum(other) != loading._checksum(values)
    assert loading._checksum(values[:0]) != loading._checksum(values[:1])


def test_weights_that_are_offloaded_count_by_name_and_shape(chat_directory):
    model, tokenizer = loading.load(str(chat_directory), device="cpu")
    assert loading.fingerprint(model.to("meta"), tokenizer) == loading.fingerprint(model, tokenizer)


# --- models that are all right ---------------------------------------------------------------------


@pytest.mark.parametrize("bias_positions", ["all", "last"])
def test_a_plain_model_in_bfloat16_is_not_taken_for_a_quantised_one(chat_tokenizer, tmp_path, bias_positions):
    """At every token, rounding to bfloat16 leaves something else of a perturbation."""
    model = make_model_directory(
        tmp_path / "model", chat_tokenizer, initializer_range=0.1, max_position_embeddings=4096
    )
    text = (
        "Some travellers came late to the small island and asked the old keeper of the light where they might sleep, "
        "eat, rest and dry their wet clothes before the storm. "
    )
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": text}))
    options = {"dtype": "bfloat16", "bias_positions": bias_positions, "hook_layer_name": 1}
    assert scripts.compute_fisher(model, tmp_path / "prompts.jsonl", tmp_path / "out", **options) == 0
