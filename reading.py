"""The model under study, and how it reads the prompt of a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from errors import UserError
import fisher
import last_token
import models
import pushes
from sentences import Context

# KL(plain forward pass || cached last token) in nats that rounding may explain. On the embedded model it is
# 3e-11 in float32 and 7e-3 in bfloat16; a prefix that is lost or misread costs nats.
CACHE_TOLERANCE = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 0.3, "float16": 0.3}


@dataclass(frozen=True)
class Model:
    """What every step needs of the model, in one place."""

    lm: torch.nn.Module
    tokenizer: object
    layers: list[int]  # numbers of the chosen decoder layers, ascending
    modules: list[torch.nn.Module]  # and the layers themselves

    def decode(self, token: int) -> str:
        return self.tokenizer.decode([token])


@dataclass(frozen=True)
class Reading:
    """A prompt as the model reads it: the cache before its last token, and the model linearised there."""

    prefix: DynamicCache | None
    point: fisher.Point


def load(name: str, layers: list[int | str] | None, dtype: str, device: str, trust_remote_code: bool = False) -> Model:
    """The model by name, with the layers asked for (None: every fifth and the last).

    Raises:
        UserError: no such model or layer, or a tokenizer without character offsets.
    """
    lm, tokenizer = models.load_model(name, dtype, device, trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError(f"{name} has no fast tokenizer, whose character offsets find the target word")
    modules = list(models.decoder_layers(lm).values())
    numbers = choose_layers(layers, len(modules))
    return Model(lm, tokenizer, numbers, [modules[number] for number in numbers])


def choose_layers(asked: list[int | str] | None, depth: int) -> list[int]:
    """Ascending layer numbers: those asked for, or every fifth and the last.

    Raises:
        UserError: the model has no such layer.
    """
    if asked is None:
        return sorted({*range(0, depth, 5), depth - 1})
    if "all" in asked:
        return list(range(depth))
    if max(asked) >= depth:
        raise UserError(f"--layers {max(asked)}: the model has layers 0 to {depth - 1}")
    return sorted(set(asked))


@contextmanager
def naming(sentence: str, layers: list[int]) -> Iterator[None]:
    """Says which sentence and layer a numerical failure belongs to."""
    try:
        yield
    except last_token.UnsupportedModelError as error:
        raise UserError(f"this model is not supported: {error}") from error
    except fisher.NumericalError as error:
        where = "" if error.layer is None else f" at layer {layers[error.layer]}"
        raise UserError(f"{error}{where} of sentence {sentence!r} (try --dtype float32)") from error


def read(model: Model, context: Context) -> Reading:
    ids = torch.tensor(context.ids)
    with naming(context.sentence, model.layers):
        prefix = last_token.prefill(model.lm, ids[:-1])
        return Reading(prefix, fisher.linearize(model.lm, model.modules, ids[-1], prefix))


def check_cached_path(model: Model, context: Context, reading: Reading) -> None:
    """Holds the cached last token, and pushes of length zero, against one plain forward pass.

    Raises:
        UserError: they differ by more than rounding, so this architecture cannot be trusted here.
    """
    with torch.no_grad():
        plain = model.lm(torch.tensor([context.ids], device=model.lm.device)).logits[0, -1].float()
    log_probs = plain.log_softmax(-1)
    none = torch.zeros_like(reading.point.activations)
    token, every = torch.tensor(context.ids[-1]), torch.arange(len(model.modules))
    with naming(context.sentence, model.layers):
        pushed = pushes.sweep(model.lm, model.modules, token, reading.prefix, log_probs, none, every)
    kl = max(float(pushes.kl_divergence(log_probs, reading.point.log_probs)), float(pushed.kl.max()))
    if not kl <= CACHE_TOLERANCE[str(model.lm.dtype).removeprefix("torch.")]:
        name = type(model.lm).__name__
        raise UserError(f"{name} is not supported: its cached and plain predictions differ by {kl:.2g} nats")
