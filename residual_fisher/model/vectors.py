"""Vectors of the residual stream: added to it while a model generates, and in files that say what they are of."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
import re
import tempfile
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
import torch
from torch import Tensor, nn

from residual_fisher.common.files import atomic_open
from residual_fisher.common.program import UserError
from residual_fisher.common.text import excerpt, first_line
from residual_fisher.model.loading import decoder_layers, fingerprint, text_config
from residual_fisher.model.passes import add_at, edit_stream, hooked, unwrapped
from residual_fisher.model.points import numbered_layers

POSITIONS = ("last", "all")


@contextmanager
def added(model: nn.Module, deltas: Mapping[int, Tensor], positions: str = "last") -> Iterator[None]:
    """Adds vectors to the residual stream at the output of decoder layers, in every pass until the block ends.

    "last": at each prompt's last token alone, as perturbations of this project are. So of the passes that share a cache
    the first is changed, which runs the prompt; the tokens that are generated then attend to what the prompt's last
    token has left in the cache. In a batch the prompts have to end together: they are padded on the left.

    "all": at all tokens, of prompts and of what is generated, as steering vectors usually are.

    Args:
        deltas: (d,) by number of the layer.
    Raises:
        ValueError: the model has no such layer or width, or is in training mode. Within the block: under "last" text is
            generated without a cache, whose prompt cannot be told from the rest.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions {positions!r} are none of {', '.join(POSITIONS)}")
    inner, passes = unwrapped(model), _Passes()
    vectors = _fitting(inner, deltas)
    modules = numbered_layers(inner, list(vectors))

    def edit(vector: Tensor, h: Tensor) -> Tensor:
        # the sum is float32 or wider: in half precision, only the result is rounded
        if positions == "all":
            return (h + vector.to(h.device)).to(h.dtype)
        return add_at(h, vector.to(h.device)).to(h.dtype) if passes.of_prompt else h

    hooks = [edit_stream(modules[number], partial(edit, vector)) for number, vector in vectors.items()]
    if positions == "last":
        hooks.append((partial(inner.register_forward_pre_hook, with_kwargs=True), passes.begin))
    with hooked(*hooks):
        yield


def _fitting(model: nn.Module, vectors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Vectors by layer, ascending, in float32. Raises ValueError: the model has no such layer or width."""
    width = text_config(model).hidden_size
    numbers = numbered_layers(model, sorted(vectors))
    found = {number: torch.as_tensor(vectors[number]).detach().float() for number in numbers}
    for number, vector in found.items():
        if vector.shape != (width,):
            raise ValueError(f"the vector of layer {number} is of shape {tuple(vector.shape)}, not ({width},)")
    return found


class _Passes:
    """Tells the passes that run a prompt from those that run what is generated after it, over the prompt's cache."""

    def __init__(self):
        self.of_prompt, self._caches, self._ids = True, WeakSet(), None

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before each pass."""
        caches = (kwargs.get("past_key_values"), kwargs.get("cache_params"))  # recurrent models call it so
        cache = next((cache for cache in caches if cache is not None), None)
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.of_prompt = cache is None or cache not in self._caches
        if cache is not None:
            self._caches.add(cache)
        elif kwargs.get("use_cache") is False and ids is not None:
            if self._ids is not None and torch.equal(ids[:, :-1], self._ids):
                raise ValueError('positions="last" needs a cache to know the prompt: generate with use_cache=True')
            self._ids = ids


# --- files ---------------------------------------------------------------------------------------

GGUF_TENSOR = re.compile(r"direction\.(\d+)")
GGUF_KEY = "residual_fisher."  # before the names of what is told in a GGUF file beside llama.cpp's own


class Vectors(NamedTuple):
    """Vectors of a file, and what it tells of them."""

    deltas: dict[int, Tensor]  # (d,) float32, by number of the layer
    about: dict[str, str]  # operation, module, layers, position, scale, units, model


def save_vectors(
    path: str | Path, vectors: Mapping[int, Tensor], model: nn.Module, tokenizer, position: str = "last"
) -> None:
    """Writes vectors (d,) by number of the layer, float32, and what they are of; `position` is that of `added`.

    The form follows from the ending. `.safetensors`: a tensor for each module, named as its path, and metadata.
    `.gguf`: a control vector, as llama.cpp takes it. Its `direction.N` is added to the output of block N, counted from
    0, at all tokens; block 0 can have none there.

    Raises:
        UserError: the ending is another, or the file cannot be written.
        ValueError: a vector does not fit the model, or the form.
    """
    path, inner = Path(path), unwrapped(model)
    found, paths = _fitting(inner, vectors), list(decoder_layers(inner))
    if position not in POSITIONS:
        raise ValueError(f"position {position!r} is none of {', '.join(POSITIONS)}")
    about = {
        "operation": "add",
        "module": " ".join(paths[number] for number in found),
        "layers": " ".join(map(str, found)),
        "position": position,
        "scale": "1",
        "units": "of the residual stream, as it leaves the module",
        "model": fingerprint(inner, tokenizer),
    }
    arrays = {number: vector.cpu().numpy() for number, vector in found.items()}
    if path.suffix == ".safetensors":
        content = save({paths[number]: array for number, array in arrays.items()}, metadata=about)
    elif path.suffix == ".gguf":
        content = _gguf(arrays, inner, about)
    else:
        raise UserError(f"{path}: vectors are written to files that end in .safetensors or .gguf")
    with atomic_open(path) as file:
        file.write(content)


def _gguf(arrays: dict[int, np.ndarray], model: nn.Module, about: dict[str, str]) -> bytes:
    from gguf import GGUFWriter  # slow, and seldom needed

    if 0 in arrays:
        raise ValueError("a GGUF control vector has none for layer 0: choose a later layer, or .safetensors")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.gguf"
        writer = GGUFWriter(path, "controlvector")
        writer.add_string("controlvector.model_hint", text_config(model).model_type)
        writer.add_uint32("controlvector.layer_count", len(arrays))
        for name, value in about.items():
            writer.add_string(GGUF_KEY + name, value)
        for number, array in arrays.items():
            writer.add_tensor(f"direction.{number}", array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def load_vectors(path: str | Path, model: nn.Module | None = None, tokenizer=None) -> Vectors:
    """The vectors of a file of `save_vectors`, or of a GGUF control vector from elsewhere.

    Args:
        model, tokenizer: if they are given, the vectors have to be of this model in this dtype, by its fingerprint.
    Raises:
        UserError: there is no such file, it is of another form, or of another model.
    """
    path = Path(path)
    try:
        deltas, about = (_read_gguf if path.suffix == ".gguf" else _read_safetensors)(path)
    except (OSError, ValueError, KeyError, IndexError, SafetensorError) as error:
        raise UserError(f"cannot read vectors from {path}: {excerpt(first_line(error), 100)}") from error
    if model is not None:
        if about.get("model") not in (None, fingerprint(unwrapped(model), tokenizer)):
            raise UserError(f"the vectors in {path} are of another model or dtype: load them without naming one to see")
        deltas = _fitting(unwrapped(model), deltas)
    return Vectors(deltas, about)


def _read_safetensors(path: Path) -> tuple[dict[int, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        if about.get("operation") != "add" or "module" not in about:
            raise ValueError("it does not say where they are added")
        places = zip(map(int, about["layers"].split()), about["module"].split(), strict=True)
        return {number: file.get_tensor(module) for number, module in places}, about


def _read_gguf(path: Path) -> tuple[dict[int, Tensor], dict[str, str]]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    named = ((GGUF_TENSOR.fullmatch(tensor.name), tensor) for tensor in reader.tensors)
    deltas = {int(match[1]): torch.from_numpy(np.array(tensor.data)) for match, tensor in named if match}
    if not deltas:
        raise ValueError("it holds no direction.N")
    about = {
        name.removeprefix(GGUF_KEY): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(GGUF_KEY)
    }
    return dict(sorted(deltas.items())), {"operation": "add", "position": "all", **about}
