"""Passes through a model: hooks that are always removed, and batches of rows that shrink when memory runs out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import warnings

import torch
from torch import Tensor, nn

# KL in nats that rounding may explain between two passes that should agree. On the embedded model it is 3e-11 in
# float32 and 7e-3 in bfloat16; a prefix that is lost or misread costs nats.
ROUNDING_NATS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 0.3, torch.float16: 0.3}


class UnsupportedModelError(ValueError):
    """A model whose architecture this project cannot work with; the message says why."""


@contextmanager
def hooked(*hooks: tuple[Callable, Callable]) -> Iterator[None]:
    """Installs hooks, pairs of (module.register_..., hook), and removes every one of them, whatever happens."""
    handles = []
    try:
        for register, hook in hooks:
            handles.append(register(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def edit_stream(edit: Callable[[Tensor], Tensor]) -> Callable:
    """A forward hook that replaces the residual stream h leaving a decoder layer by edit(h).

    Decoder layers return h alone or a tuple that begins with it, by architecture and version.
    """

    def hook(module: nn.Module, args: tuple, output):
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return hook


def use_attention(model: nn.Module, kind: str) -> None:
    """Sets the model's attention to "eager" (plain) or "sdpa" (fused), where it has that choice."""
    if model.is_backend_compatible() and model.config._attn_implementation != kind:
        try:
            model.set_attn_implementation(kind)
        except ValueError:  # an architecture without fused attention stays with the plain one
            model.set_attn_implementation("eager")


class Chunks:
    """Splits rows into chunks of at most `size`, and halves `size` for good when memory runs out."""

    def __init__(self, size: int = 256):
        self.size = size

    def map(self, function: Callable, *rows: Tensor) -> list:
        """function(chunk of each tensor in `rows`) for every chunk, in order.

        Raises:
            torch.OutOfMemoryError: not even one row fits.
        """
        results, start = [], 0
        while left := len(rows[0]) - start:
            # of equal sizes: a small remainder takes as long as a chunk of several times its rows
            here = -(-left // -(-left // self.size))
            chunk = [r[start : start + here] for r in rows]
            try:
                results.append(function(*chunk))
                start += len(chunk[0])
                continue
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
            # out here the failed attempt's tensors, which the exception held, can be freed
            self.size = max(1, min(self.size, len(chunk[0])) // 2)
            warnings.warn(f"out of memory: going on with batches of {self.size}", stacklevel=2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results
