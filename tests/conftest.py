"""A tiny model with a real byte-level tokenizer, saved as a user's local model directory would be."""

from collections.abc import Callable, Iterator
import json
import os
from pathlib import Path
import subprocess
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are imported: no test asks the hub
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as the scripts have it, before CUDA starts
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: threads of theirs would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, trainers
import torch
import transformers as hf

from residual_fisher.common import drawing
import scripts
import tiny

FINISHED_EXPERIMENT = ["--scale-unit", "nats", "--scales", "-1", "0", "0.1", "1"]


@pytest.fixture(scope="session")
def animals() -> list[str]:
    return json.loads((scripts.ROOT / "data" / "animals.json").read_text(encoding="utf-8"))["animals"]


@pytest.fixture(scope="session")
def byte_level(animals) -> hf.PreTrainedTokenizerFast:
    """GPT-2's kind: a space is part of the token after it."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(animals, vocab_size=600, show_progress=False)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="!")


@pytest.fixture(scope="session")
def sentencepiece(animals) -> hf.PreTrainedTokenizerFast:
    """Llama 2's kind: a space is a ▁ before the token, and a beginning-of-sequence token comes first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator(animals, trainer)
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


CHAT_TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant:' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer(byte_level) -> hf.PreTrainedTokenizerFast:
    """The byte-level tokenizer with a chat template that brings its own beginning."""
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer, eos_token="!")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model_directory(path: Path, tokenizer: hf.PreTrainedTokenizerFast, **values) -> Path:
    """A tiny model, with these values in its configuration."""
    config = hf.LlamaConfig(**{**tiny.GROUPED, "vocab_size": len(tokenizer), **values})
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory, byte_level) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("models") / "tiny-llama", byte_level)


@pytest.fixture(scope="session")
def chat_directory(tmp_path_factory, chat_tokenizer) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("models") / "tiny-chat", chat_tokenizer)


@pytest.fixture(scope="session")
def finished_experiment(model_directory, tmp_path_factory) -> Path:
    """The results of core_experiment.py, uninterrupted."""
    output = tmp_path_factory.mktemp("runs") / "experiment"
    assert scripts.core_experiment(model_directory, output, *FINISHED_EXPERIMENT) == 0
    return output


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """40 prompts of many lengths, with three rows that hold none; windows of 32 prompts, so two of them."""
    words = ["zebra", "animals", "the", "many", "wild", "keep", "in", "what", "river", "blue"]
    texts = [" ".join(words[(7 * i + j) % 10] for j in range(1 + (5 * i) % 11)) + f" {i}" for i in range(40)]
    rows = [{"prompt": text} for text in texts]
    for place in (0, 5, 43):
        rows.insert(place, {"prompt": ""})
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def finished_pipeline(chat_directory, dataset, tmp_path_factory) -> Path:
    """The results of compute_fisher.py, uninterrupted."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    return output


@pytest.fixture
def without_pictures(monkeypatch) -> None:
    """For tests of something else: of a small run's time, drawing takes the most. The files are there, and empty."""

    def touch(folder: Path, figures: dict, kind: str = "png") -> None:
        for name in figures:
            (folder / name).touch()

    monkeypatch.setattr(drawing, "save", touch)


class Disk(NamedTuple):
    path: Path
    grow: Callable[[], None]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Disk]:
    """A file system of its own with room for 96 kB, which can be given more."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield Disk(path, lambda: subprocess.run(["mount", "-o", "remount,size=20m", path], check=True))
    finally:
        subprocess.run(["umount", path], check=True)
