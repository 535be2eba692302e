"""Passes through a model: hooks that are always removed, and batches of rows that shrink when memory runs out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
import warnings

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residual_fisher.common.program import is_out_of_memory

# KL in nats that rounding may explain between two passes that should agree. On the embedded model it is 3e-11 in
# float32 and 7e-3 in bfloat16; a prefix that is lost or misread costs nats.
ROUNDING_NATS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 0.3, torch.float16: 0.3}


class UnsupportedModelError(ValueError):
    """A model whose architecture this project cannot work with; the message says why."""


@contextmanager
def hooked(*hooks: tuple[Callable, Callable]) -> Iterator[None]:
    """Installs hooks, pairs of (module.register_..., hook), and removes every one of them, whatever happens.

    What `torch.compile` has compiled runs as it was written: compiled code may pass over hooks.
    """
    handles = []
    try:
        for register, hook in hooks:
            handles.append(register(hook))
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def edit_stream(edit: Callable[[Tensor], Tensor]) -> Callable:
    """A forward hook that replaces the residual stream h leaving a decoder layer by edit(h).

    Decoder layers return h alone, or a tuple or list that begins with it, by architecture and version.
    """

    def hook(module: nn.Module, args: tuple, output):
        if not isinstance(output, tuple | list):
            return edit(output)
        values = (edit(output[0]), *output[1:])
        return output._make(values) if hasattr(output, "_make") else type(output)(values)

    return hook


def add_at_last(h: Tensor, delta: Tensor) -> Tensor:
    """h (rows, tokens, d) with `delta` (d,) or (rows, 1, d) added at the last token."""
    if h.shape[1] == 1:
        return h + delta
    last = h[:, -1:] + delta
    return torch.cat([h[:, :-1].to(last), last], dim=1)


def at_token(x: Tensor, shape: tuple[int, int], index: Tensor) -> Tensor:
    """x (prompts, d) at one token of each prompt, of the head's input x (prompts, tokens, d).

    Raises:
        UnsupportedModelError: it is of another shape.
    """
    if x.ndim != 3 or x.shape[:2] != shape:
        raise UnsupportedModelError(f"its output head is not given (prompts, tokens, d), but {tuple(x.shape)}")
    return x[torch.arange(len(x)), index]


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside whatever is around it: an adapter, `torch.compile`, data parallelism.

    Raises:
        UnsupportedModelError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UnsupportedModelError(f"{type(model).__name__} is no model of transformers")


@contextmanager
def attention(model: PreTrainedModel, kind: str) -> Iterator[None]:
    """Runs the model's attention as `kind`, where it has that choice, then gives the model its own back."""
    if not model.is_backend_compatible() or model.config._attn_implementation == kind:
        yield
        return
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    own = [config._attn_implementation for config in configs]
    model.set_attn_implementation(kind)
    try:
        yield
    finally:
        for config, its_own in zip(configs, own, strict=True):
            config._attn_implementation_internal = its_own  # of this configuration alone, not of those inside


@contextmanager
def differentiated_twice() -> Iterator[None]:
    """Raises UnsupportedModelError where torch has no derivative of a backward pass."""
    try:
        yield
    except RuntimeError as error:
        if "derivative for" in str(error) and "not implemented" in str(error):
            raise UnsupportedModelError("torch cannot differentiate its backward pass, as this needs") from error
        raise


def use_attention(model: nn.Module, kind: str) -> None:
    """Sets the model's attention to "eager" (plain) or "sdpa" (fused), where it has that choice."""
    if model.is_backend_compatible() and model.config._attn_implementation != kind:
        try:
            model.set_attn_implementation(kind)
        except ValueError:  # an architecture without fused attention stays with the plain one
            model.set_attn_implementation("eager")


def require_known_tokens(model: nn.Module, ids: Tensor) -> None:
    """Raises UnsupportedModelError: a token has no row in the model's embedding, which a GPU would not survive."""
    known = model.get_input_embeddings().weight.shape[0]
    for token in (int(ids.max()), int(ids.min())) if ids.numel() else ():
        if not 0 <= token < known:
            raise UnsupportedModelError(f"its tokenizer gives token {token}, and its embedding has {known} tokens")


def stream_width(model: nn.Module, module: nn.Module) -> int:
    """The width d of what leaves `module`, (prompts, tokens, d) or a tuple that begins with it, in a short pass."""
    widths = []

    def look(h: Tensor) -> Tensor:
        widths.append(h.shape[-1])
        return h

    with torch.no_grad(), hooked((module.register_forward_hook, edit_stream(look))):
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return widths[0]


@torch.no_grad()
def last_logits(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """Logits (prompts, V) after the last of each prompt's tokens, ids (prompts, tokens) padded on the right.

    Raises:
        UnsupportedModelError: a token that the model does not know.
    """
    require_known_tokens(model, ids)

    def pick_last(module: nn.Module, args: tuple) -> tuple:
        return (at_token(args[0], ids.shape, lengths - 1)[:, None], *args[1:])

    with hooked((model.get_output_embeddings().register_forward_pre_hook, pick_last)):
        return model(ids.to(model.device), use_cache=False).logits[:, 0]


def devices_of(model: nn.Module) -> set[torch.device]:
    """Where the model's weights are: several devices if it is spread over them."""
    return {p.device for p in model.parameters()}


def batched_gradients(
    model: nn.Module, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients (rows, ...) at each of `inputs` for every row of `cotangents`, in one backward pass.

    Args:
        model: what leads from `inputs` to `outputs`.
        cotangents: (rows, ...) for each of `outputs`.
    """

    def one(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)

    if len(cotangents[0]) == 1:  # without vmap, for which fused attention has no backward rule
        return tuple(gradient[None] for gradient in one(*(c[0] for c in cotangents)))
    if len(devices_of(model)) == 1:
        return torch.func.vmap(one)(*cotangents)
    # `func.vmap` cannot follow a graph across devices. The older batching that the engine brings along can; it has
    # rules for fewer operations, and loops over the rows of the others.
    return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, is_grads_batched=True)


def require_causal(model: nn.Module, ids: Tensor, lengths: Tensor) -> None:
    """Runs prompts, ids (prompts, tokens) padded on the right, with two kinds of padding.

    Nothing that a causal model computes for a token depends on what comes after it: the logits have to be the same
    to the last bit, in every dtype. Only where other tokens change the order of the same sums (a mixture of experts,
    which sorts the tokens of a batch by expert) they may differ by rounding, if their gradient at the padding is zero.

    Raises:
        UnsupportedModelError: they are not.
    """
    padding = torch.arange(ids.shape[1]) >= lengths[:, None]
    tokens = model.get_output_embeddings().weight.shape[0]
    other = torch.where(padding, (ids + 1) % tokens, ids)
    first, second = (last_logits(model, some, lengths).nan_to_num() for some in (ids, other))
    if torch.equal(first, second):
        return
    log_p, log_q = (logits.cpu().double().log_softmax(-1) for logits in (first, second))
    differ = float((log_p.exp() * (log_p - log_q)).sum(-1).max())
    if not differ <= ROUNDING_NATS[model.dtype] or _gradient_at_tokens(model, ids, lengths).cpu()[padding].any():
        raise UnsupportedModelError("its predictions change with the padding of a batch: it is not causal")


def _gradient_at_tokens(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """The gradient (prompts, tokens, d) of a random sum of the last tokens' logits at the tokens' embeddings."""
    embedded = []

    def start(h: Tensor) -> Tensor:
        embedded.append(h.detach().requires_grad_())
        return embedded[0]

    hook = (model.get_input_embeddings().register_forward_hook, edit_stream(start))
    with torch.enable_grad(), hooked(hook):
        logits = last_logits.__wrapped__(model, ids, lengths)
        if not logits.requires_grad:
            raise UnsupportedModelError("it lets no gradient through (is it quantised?)")
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        return torch.autograd.grad((logits * noise).sum(), embedded[0])[0]


class Chunks:
    """Splits rows into chunks of at most `size`, and halves `size` for good when memory runs out."""

    def __init__(self, size: int = 256):
        self.size = size

    def map(self, function: Callable, *rows: Tensor) -> list:
        """function(chunk of each tensor in `rows`) for every chunk, in order.

        Raises:
            torch.OutOfMemoryError, or whatever says it (`is_out_of_memory`): not even one row fits.
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
            except Exception as error:
                if self.size == 1 or not is_out_of_memory(error):
                    raise
            # out here the failed attempt's tensors, which the exception held, can be freed
            self.size = max(1, min(self.size, len(chunk[0])) // 2)
            warnings.warn(f"out of memory: going on with batches of {self.size}", stacklevel=2)
            torch.cuda.empty_cache()  # does nothing where CUDA is not in use
        return results

    def join(self, function: Callable, *rows: Tensor, dim: int = 0) -> Tensor:
        """The tensors that `map` would list, as one along `dim`.

        It is allocated along with the first chunk, which can be halved to make room for it; concatenated at the
        end, the parts would be held twice.
        """
        whole, filled = None, 0

        def put(*chunk: Tensor) -> None:
            nonlocal whole, filled
            part = function(*chunk)
            count = part.shape[dim]
            if count == len(rows[0]):
                whole = part.contiguous()
                return
            if whole is None:
                shape = list(part.shape)
                shape[dim] = len(rows[0])
                whole = part.new_empty(shape)
            whole.narrow(dim, filled, count).copy_(part)
            filled += count

        self.map(put, *rows)
        return whole
