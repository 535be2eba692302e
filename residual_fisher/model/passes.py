"""Passes through a model: hooks that are always removed, and batches of rows that shrink when memory runs out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
import warnings
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residual_fisher.common.program import is_out_of_memory
from residual_fisher.common.text import excerpt, first_line

# Largest KL in nats between two passes that should agree, by dtype. Rounding causes 3e-11 in float32 and 7e-3 in
# bfloat16 on the embedded model; a lost or misread prefix causes whole nats.
ROUNDING_NATS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 0.3, torch.float16: 0.3}


class UnsupportedModelError(ValueError):
    """This project cannot work with the model's architecture; the message says why."""


_ways: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def ways_of(model: nn.Module) -> dict[str, str]:
    """How a model was run where that depends on what it and its device can do, and why: for the results."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    return _ways.setdefault(inner, {})


@contextmanager
def hooked(*hooks: tuple[Callable, Callable]) -> Iterator[None]:
    """Installs hooks, pairs of (module.register_..., hook), and always removes them.

    Modules compiled by `torch.compile` run uncompiled meanwhile: compiled code may skip hooks. Fused attention runs in
    any kernels but cuDNN's, which plan anew for every length (0.13 s on an H100, where others take 0.001 s); that goes
    for the backward pass too, whose kernel is that of the forward pass.
    """
    cuda = torch.backends.cuda
    with ExitStack() as stack:
        for register, hook in hooks:
            stack.enter_context(register(hook))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled())
        cuda.enable_cudnn_sdp(False)
        yield


def edit_stream(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> tuple[Callable, Callable]:
    """For `hooked`: replaces the residual stream h leaving a module by edit(h).

    Decoder layers return h, or a tuple or list that begins with h, depending on architecture and version.
    """

    def hook(module: nn.Module, args: tuple, output):
        if not isinstance(output, tuple | list):
            return edit(output)
        values = (edit(output[0]), *output[1:])
        return output._make(values) if hasattr(output, "_make") else type(output)(values)

    return module.register_forward_hook, hook


def add_at(h: Tensor, delta: Tensor, token: int = -1) -> Tensor:
    """h (rows, tokens, d) with `delta` (d,) or (rows, 1, d) added at one token, by default the last."""
    if h.shape[1] == 1:
        return h + delta
    token %= h.shape[1]
    moved = h[:, token : token + 1] + delta
    return torch.cat([h[:, :token].to(moved), moved, h[:, token + 1 :].to(moved)], dim=1)


def add_to_rows(modules: Sequence[nn.Module], deltas: Tensor, at: Tensor, token: int = -1) -> list[tuple]:
    """Hooks that add each of `deltas` (rows, d) at one token of its row, to the output of `modules[at[row]]`."""

    def add(index: int, h: Tensor) -> Tensor:
        own = torch.where((at == index)[:, None].to(deltas.device), deltas, 0)[:, None]  # (rows, 1, d)
        # the sum is float32 or wider: in half precision, only the result is rounded
        return add_at(h, own.to(h.device), token).to(h.dtype)

    return [edit_stream(modules[index], partial(add, index)) for index in at.unique().tolist()]


@contextmanager
def capture_head(model: PreTrainedModel, pick: Callable = lambda x: x) -> Iterator[SimpleNamespace]:
    """Captures the output head's input x (rows, tokens, d_head) and output raw_logits (rows, tokens, V), in every pass.

    The head gets only pick(x). The logits of all other tokens and rows are never computed: they would be the peak of
    memory. Of nested captures, the outer one picks first, and all hold what the head got.
    """
    head, captured = model.get_output_embeddings(), SimpleNamespace()

    def before(module: nn.Module, args: tuple) -> tuple:
        return (pick(args[0]), *args[1:])

    def after(module: nn.Module, args: tuple, output: Tensor) -> None:
        captured.x, captured.raw_logits = args[0], output

    with hooked((head.register_forward_pre_hook, before), (head.register_forward_hook, after)):
        yield captured


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a wrapper: an adapter, `torch.compile`, data parallelism."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UnsupportedModelError(f"{type(model).__name__} is not a model of transformers")


def use_attention(model: PreTrainedModel, kind: str) -> None:
    """Sets the model's attention to "eager" (plain), "sdpa" (fused) or another, if its class offers the choice."""
    if not model.is_backend_compatible():
        ways_of(model)["attention"] = "the model's own"
    elif model.config._attn_implementation != kind:
        try:
            model.set_attn_implementation(kind)
        except ValueError as error:  # an architecture without fused attention stays with the plain one
            model.set_attn_implementation("eager")
            ways_of(model)["attention"] = f"eager: {excerpt(first_line(error), 100)}"


@contextmanager
def attention(model: PreTrainedModel, kind: str) -> Iterator[None]:
    """`use_attention` until the block ends."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    own = [config._attn_implementation for config in configs]
    use_attention(model, kind)
    try:
        yield
    finally:
        for config, before in zip(configs, own, strict=True):
            # the public setter would also change the configurations inside this one
            config._attn_implementation_internal = before


def require_known_tokens(model: nn.Module, ids: Tensor) -> None:
    """Raises UnsupportedModelError if a token has no row in the embedding. On a GPU such a token ends the process."""
    known = model.get_input_embeddings().weight.shape[0]
    for token in ids[(ids < 0) | (ids >= known)].tolist():
        raise UnsupportedModelError(f"its tokenizer gives token {token}, and its embedding has {known} tokens")


def stream_width(model: nn.Module, module: nn.Module) -> int:
    """The width d of a module's output, (prompts, tokens, d) or a tuple that begins with it, found by a short pass."""
    streams = []
    with torch.no_grad(), hooked(edit_stream(module, lambda h: streams.append(h) or h)):
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return streams[0].shape[-1]


def pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (prompts, tokens) int64, each row filled up with its own last token, and lengths (prompts,)."""
    width = max(map(len, prompts))
    rows = [[*ids, *[ids[-1]] * (width - len(ids))] for ids in prompts]
    return torch.tensor(rows), torch.tensor([len(ids) for ids in prompts])


def last_logits(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """Logits (prompts, V) after the last token of each prompt: `ids` (prompts, tokens), padded on the right."""
    return logits_at(model, ids, lengths[:, None] - 1)[:, 0]


def logits_at(model: nn.Module, ids: Tensor, places: Tensor, **memory) -> Tensor:
    """Logits (prompts, n, V) after the tokens at `places` (prompts, n) of each prompt; `ids` as in `last_logits`.

    The model's `memory` may hold what comes before these tokens: then it grows by them.
    """
    require_known_tokens(model, ids)

    def pick(x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[:2] != ids.shape:
            raise UnsupportedModelError(f"its output head is not given (prompts, tokens, d), but {tuple(x.shape)}")
        return x[torch.arange(len(x))[:, None], places]

    with capture_head(model, pick):
        return model(ids.to(model.device), use_cache=bool(memory), **memory).logits


def devices_of(model: nn.Module) -> set[torch.device]:
    """The devices that hold the model's weights."""
    return {p.device for p in model.parameters()}


def batched_gradients(
    model: nn.Module, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Vector-Jacobian products (rows, ...) at each of `inputs`, of a tensor of cotangents (rows, ...) for each output.

    All rows take one backward pass through the model; or one each, if it cannot be batched.
    """

    def one(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)

    def one_by_one() -> tuple[Tensor, ...]:
        by_row = (one(*row) for row in zip(*cotangents, strict=True))
        return tuple(map(torch.stack, zip(*by_row, strict=True)))

    if len(cotangents[0]) == 1 or "gradients" in ways_of(model):  # fused attention has no backward rule for vmap
        return one_by_one()
    try:
        if len(devices_of(model)) == 1:
            return torch.func.vmap(one)(*cotangents)
        # `func.vmap` cannot follow a graph across devices. Autograd's own batching can, but it has rules for fewer
        # operations, and loops over the rows of the others.
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, is_grads_batched=True)
    except Exception as error:  # kernels of a model's own (mamba_ssm, flash-linear-attention) fail in any manner
        if is_out_of_memory(error):
            raise
        reason = excerpt(first_line(error), 100)
    gradients = one_by_one()  # raises what does not come from batching
    ways_of(model)["gradients"] = f"one by one: {reason}"
    warnings.warn(f"{type(model).__name__} takes its gradients one by one: {reason}", stacklevel=2)
    return gradients


def largest_kl(logits: Tensor, others: Tensor) -> float:
    """The largest KL(softmax(logits) || softmax(others)) in nats, over all rows (rows, V)."""
    log_p, log_q = (some.cpu().double().log_softmax(-1) for some in (logits, others))  # MPS has no float64
    return float((log_p.exp() * (log_p - log_q)).sum(-1).max())


@torch.no_grad()
def require_causal(model: nn.Module, ids: Tensor, lengths: Tensor) -> None:
    """Raises UnsupportedModelError if predictions depend on later tokens: if `last_logits` change with the padding.

    In a causal model the logits are the same to the last bit, in every dtype. One exception is allowed: a mixture of
    experts sorts the tokens of a batch by expert, so other padding changes the order of its sums. Its logits may differ
    by rounding if their gradient at the padding is zero.
    """
    padding = torch.arange(ids.shape[1]) >= lengths[:, None]
    tokens = model.get_output_embeddings().weight.shape[0]
    other = torch.where(padding, (ids + 1) % tokens, ids)
    first, second = (last_logits(model, some, lengths).nan_to_num() for some in (ids, other))
    if torch.equal(first, second):
        return
    rounding = largest_kl(first, second) <= ROUNDING_NATS[model.dtype]
    if not rounding or gradient_at_tokens(model, ids, lengths).cpu()[padding].any():
        raise UnsupportedModelError("its predictions change with the padding of a batch: it is not causal")


def gradient_at_tokens(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """The gradient (prompts, tokens, d) of a random sum of the last tokens' logits, at the tokens' embeddings."""
    embeddings = []

    def require_gradient(h: Tensor) -> Tensor:
        embeddings.append(h.detach().requires_grad_())
        return embeddings[0]

    with torch.enable_grad(), hooked(edit_stream(model.get_input_embeddings(), require_gradient)):
        logits = last_logits(model, ids, lengths)
        if not logits.requires_grad:
            raise UnsupportedModelError("it lets no gradient through (is it quantised?)")
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        return torch.autograd.grad((logits * noise).sum(), embeddings[0])[0]


class Chunks:
    """Splits rows into chunks of at most `size`. Halves `size` for good when memory runs out."""

    def __init__(self, size: int = 256):
        self.size, self.halved = size, False

    def map(self, function: Callable, *rows: Tensor) -> list:
        """function(chunk of each tensor in `rows`) for every chunk, in order. Memory must suffice for a single row."""
        results, start = [], 0
        while left := len(rows[0]) - start:
            # chunks of equal size: a small remainder takes as long as a chunk of several times its rows
            count = -(-left // -(-left // self.size))
            try:
                results.append(function(*(r[start : start + count] for r in rows)))
                start += count
                continue
            except Exception as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
            # The exception held the failed attempt's tensors: only out here can they be freed.
            self.size, self.halved = count // 2, True
            warnings.warn(f"out of memory: going on with batches of {self.size}", stacklevel=2)
            torch.cuda.empty_cache()  # does nothing where CUDA is not in use
        return results

    def join(self, function: Callable, *rows: Tensor, dim: int = 0) -> Tensor:
        """The results of `map`, which are tensors, concatenated along `dim`.

        The concatenation is allocated with the first chunk, which can still be halved to make room for it. Allocated
        at the end, it would hold all parts twice.
        """
        whole, filled, total = None, 0, len(rows[0])

        def fill(*chunk: Tensor) -> None:
            nonlocal whole, filled
            part = function(*chunk)
            count = part.shape[dim]
            if count == total:
                whole = part.contiguous()
                return
            if whole is None:
                whole = part.new_empty([*part.shape[:dim], total, *part.shape[dim + 1 :]])
            whole.narrow(dim, filled, count).copy_(part)
            filled += count

        self.map(fill, *rows)
        return whole
