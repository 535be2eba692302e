"""Lenses: what a residual stream reads as, through what follows the last layer.

The logit lens takes a stream as if it left the last layer. A Jacobian lens carries it there first, with a matrix for
each layer: the mean over prompts of the last layer's stream differentiated by this layer's.
"""

from pathlib import Path
import pickle
from typing import NamedTuple
import zipfile

import numpy as np
import torch
from torch import Tensor, nn

from residual_fisher.common.files import atomic_open, write_npz
from residual_fisher.common.program import UserError
from residual_fisher.common.text import first_line
from residual_fisher.model.loading import decoder_layers
from residual_fisher.model.passes import ROUNDING_NATS, capture_head, edit_stream, hooked, largest_kl, unwrapped

DAMAGED = (zipfile.BadZipFile, pickle.UnpicklingError)
PROBED = 5  # any token but the one that `lens_logits` runs


@torch.no_grad()
def lens_logits(model: nn.Module, streams: Tensor) -> Tensor:
    """Logits (rows, V) float32 of residual streams (rows, d), through what follows the last layer (its norm, the head).

    One token is run, and the streams take the place of its own behind the last layer. So whatever follows it counts.
    """
    return _run(model, 0, lambda h: streams.to(h)[:, None])


def has_lens(model: nn.Module) -> bool:
    """Whether the prediction follows from the stream that leaves the last layer, and from nothing else."""
    streams = []
    plain = _run(model, PROBED, lambda h: streams.append(h[:, -1].detach()) or h)
    try:
        return largest_kl(plain, lens_logits(model, streams[0])) <= ROUNDING_NATS[unwrapped(model).dtype]
    except (RuntimeError, IndexError, ValueError):  # the stream has another shape
        return False


@torch.no_grad()
def _run(model: nn.Module, token: int, edit) -> Tensor:
    model = unwrapped(model)
    *_, last = decoder_layers(model).values()
    with hooked(edit_stream(last, edit)), capture_head(model):
        ids = torch.full((1, 1), token, device=model.device)
        return model(ids, use_cache=False).logits[:, -1].float()


# --- files of Jacobian lenses --------------------------------------------------------------------


class JacobianLens(NamedTuple):
    """Mean Jacobians J of the stream that leaves the last layer, with respect to that which leaves a layer."""

    matrices: dict[int, Tensor]  # by layer: J (d, d) float32; a stream h (..., d) is carried to h @ J.T
    prompts: int  # that were averaged over


def read_lens(path: Path) -> JacobianLens:
    """A Jacobian lens in its public form: J by layer, n_prompts, source_layers, d_model.

    A `.pt` file has J as a dictionary, an `.npz` or `.safetensors` file as one array (layers, d, d).

    Raises:
        UserError: the file is missing, or of another form.
    """
    try:
        found = _stored(path)
        numbers, d = [int(number) for number in np.asarray(found["source_layers"])], int(found["d_model"])
        parts = [found["J"][n] for n in numbers] if isinstance(found["J"], dict) else found["J"]
        matrices = [torch.as_tensor(part).float() for part in parts]
        if not numbers or len(matrices) != len(numbers) or any(j.shape != (d, d) for j in matrices):
            raise ValueError(f"J does not hold a matrix of width {d} for each of source_layers")
        if not all(j.isfinite().all() for j in matrices):
            raise ValueError("J holds NaN or infinity")
        return JacobianLens(dict(zip(numbers, matrices, strict=True)), int(found["n_prompts"]))
    except KeyError as error:
        raise UserError(f"{path} is no Jacobian lens: it has no {error}") from error
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        EOFError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(f"cannot read the lens {path}: {first_line(error)}") from error


def _stored(path: Path) -> dict:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError("it holds no keys")
    return found


def write_lens(path: Path, lens: JacobianLens) -> None:
    """Writes a lens, in half precision as is usual; the form follows from the ending `.npz`, or `.pt`.

    Raises:
        UserError: it cannot be written.
    """
    numbers, d = list(lens.matrices), len(next(iter(lens.matrices.values())))
    about = {"n_prompts": lens.prompts, "source_layers": numbers, "d_model": d}
    half = {number: matrix.half() for number, matrix in lens.matrices.items()}
    if path.suffix == ".npz":
        stacked = torch.stack(list(half.values())).numpy()
        write_npz(path, {"J": stacked, **{name: np.array(value) for name, value in about.items()}})
        return
    with atomic_open(path) as file:
        torch.save({"J": half, **about}, file)
