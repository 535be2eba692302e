"""The Fisher information matrix of a causal language model's next-token distribution.

For the residual stream h leaving a decoder layer at the last token of a prompt,

    F(h) = sum_c p(c|h) grad_h log p(c|h) grad_h log p(c|h)^T          (d, d), nats / unit^2,

the expectation being under the model's own p (Amari, "Natural gradient works efficiently in
learning", 1998; Martens, "New insights and perspectives on the natural gradient method", 2020).
It predicts what a small push does: KL(p(.|h) || p(.|h + delta)) = 1/2 delta^T F delta + O(|delta|^3).
h may as well be a bias added at every token of a prompt: a change of the whole residual stream.

How it is computed, whatever the tokens counted:

    linearize          one prompt's last token, a zero bias at every chosen layer, over a prefix (last_token.py)
    linearize_prompts  or a batch of whole prompts, a zero bias of its own for each, at one module
    top_k_cotangents   rows z_i at x, the input of the output head, and weights w_i, such that
                       F = sum_i w_i (J^T z_i)(J^T z_i)^T  with J = dx/dh (head.py)
    pull_back          G: all rows J^T z_i at all layers, in one batched backward pass per chunk
    eigenpairs         of F = G^T diag(w) G, without forming F while it has fewer rows than columns

The whole vocabulary takes other means from the third step on: exact.py.

Tensors in, tensors out: this module reads no files, prints nothing and keeps no state. The model
is any transformers causal LM in evaluation mode; it is handed back as it came. In the shapes below,
"..." is nothing for one prompt, and (prompts,) for a batch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
import warnings

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from last_token import UnsupportedModelError, last_token_logits


class NumericalError(ArithmeticError):
    """Numbers that no result can be made of: NaN, infinity, or a Fisher matrix that is zero.

    `layer` and `prompt` are the indices of the first chosen layer and prompt of a batch where they appeared,
    or None where there is no telling (the logits belong to no layer).
    """

    def __init__(self, message: str, layer: int | None = None, prompt: int | None = None):
        super().__init__(message)
        self.layer, self.prompt = layer, prompt


# --- hooks -------------------------------------------------------------------------------------


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


# --- the model, linearised at a prompt's last token ----------------------------------------------


@dataclass(frozen=True)
class Point:
    """What was read at the last token of a prompt, or of each of a batch, and the graph from the biases to x."""

    activations: Tensor  # (layers, ..., d) float32, the residual stream leaving each chosen layer
    log_probs: Tensor  # (..., V) float32, nats
    biases: list[Tensor]  # one (..., d) leaf a layer, all zero: the point where gradients are taken
    x: Tensor  # (prompts, 1, d_head): the head's input, the final normalised hidden state
    head: nn.Module  # x -> raw logits, (V, d_head) if linear
    raw_logits: Tensor  # (prompts, 1, V): the head's output
    logits: Tensor  # (..., V) float32: after the scaling or soft-capping that follows the head


def linearize(model: nn.Module, layers: Iterable[nn.Module], token: Tensor, prefix: DynamicCache | None) -> Point:
    """Runs the last token with a zero bias added to the residual stream of every layer in `layers`.

    The biases change nothing; one backward pass from x returns the gradients at all layers for the
    price of the deepest.

    Args:
        layers: decoder layers of the model, in order.
        token: () or (1,) int64, the prompt's last token.
        prefix: `last_token.prefill` of all tokens before it.
    Raises:
        NumericalError: activations or logits hold NaN or infinity.
    """
    streams, biases, head = [], [], {}

    def add_zero_bias(h: Tensor) -> Tensor:
        bias = torch.zeros(h.shape[-1], dtype=h.dtype, device=h.device, requires_grad=True)
        streams.append(h.detach()[0, -1])
        biases.append(bias)
        return h + bias

    def keep_head(module: nn.Module, args: tuple, output: Tensor) -> None:
        head.update(x=args[0], raw_logits=output)

    hooks = [(layer.register_forward_hook, edit_stream(add_zero_bias)) for layer in layers]
    hooks.append((model.get_output_embeddings().register_forward_hook, keep_head))
    with torch.enable_grad(), hooked(*hooks):
        logits = last_token_logits(model, token, prefix, rows=1)[0]
    return _point(model, streams, biases, logits, **head)


def linearize_prompts(
    model: nn.Module, module: nn.Module, ids: Tensor, lengths: Tensor, last_only: bool = False
) -> Point:
    """Runs whole prompts with a zero bias, each its own, added to what leaves `module` at every token.

    The prompts are padded on the right, where causal attention lets no real token see it, so no mask is
    needed. Each row's last real token is picked before the head by its length: nothing is left that a
    padding side could turn wrong.

    Args:
        module: any module of the model whose output is (prompts, tokens, d), or a tuple that begins with it.
        ids: (prompts, tokens) int64, padded with any token.
        lengths: (prompts,) int64, the tokens of each prompt.
        last_only: add the bias at each prompt's last token alone.
    Raises:
        NumericalError: activations or logits hold NaN or infinity.
        last_token.UnsupportedModelError: the module's output is of another shape, or does not lead to the
            predictions.
    """
    prompts, last = torch.arange(len(ids)), lengths.cpu() - 1
    streams, biases, head = [], [], {}

    def add_zero_biases(h: Tensor) -> Tensor:
        if h.ndim != 3 or h.shape[:2] != ids.shape or not h.is_floating_point():
            raise UnsupportedModelError("its output is not of shape (prompts, tokens, d)")
        bias = torch.zeros(len(ids), h.shape[-1], dtype=h.dtype, device=h.device, requires_grad=True)
        streams.append(h.detach()[prompts, last])
        biases.append(bias)
        if last_only:
            at_last = torch.arange(ids.shape[1]) == last[:, None]
            return h + at_last[..., None].to(h) * bias[:, None]
        return h + bias[:, None]

    def pick_last(module: nn.Module, args: tuple) -> tuple:
        head["x"] = args[0][prompts, last][:, None]
        return (head["x"], *args[1:])

    def keep_logits(module: nn.Module, args: tuple, output: Tensor) -> None:
        head["raw_logits"] = output

    output_head = model.get_output_embeddings()
    with (
        torch.enable_grad(),
        hooked(
            (module.register_forward_hook, edit_stream(add_zero_biases)),
            (output_head.register_forward_pre_hook, pick_last),
            (output_head.register_forward_hook, keep_logits),
        ),
    ):
        logits = model(ids.to(model.device), use_cache=False).logits[:, 0].float()
    if len(biases) != 1 or not head["x"].requires_grad:
        raise UnsupportedModelError("it does not stand, once, between the prompt and the output head")
    return _point(model, streams, biases, logits, **head)


def _point(
    model: nn.Module, streams: list[Tensor], biases: list[Tensor], logits: Tensor, x: Tensor, raw_logits: Tensor
) -> Point:
    logits = logits.to(raw_logits.device)  # a model spread over devices returns it to the first
    activations = torch.stack([h.float().to(logits.device) for h in streams])
    _require_finite(activations, "activations", places=activations.ndim - 1)
    _require_finite(logits.detach()[None], "logits", places=logits.ndim)
    return Point(
        activations=activations,
        log_probs=logits.detach().log_softmax(-1),
        biases=biases,
        x=x,
        head=model.get_output_embeddings(),
        raw_logits=raw_logits,
        logits=logits,
    )


def _require_finite(values: Tensor, what: str, places: int) -> None:
    """Raises NumericalError unless `values` is finite; its first `places` axes are layers and prompts."""
    finite = values.flatten(places).isfinite().all(dim=-1)
    if not finite.all():
        layer, *prompt = (~finite).nonzero()[0].tolist()
        layer = None if what == "logits" else layer
        raise NumericalError(f"the {what} hold NaN or infinity", layer, *prompt)


# --- gradients, the matrix, its eigenpairs -------------------------------------------------------


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


def pull_back(point: Point, rows: Tensor, chunks: Chunks | None = None) -> Tensor:
    """G (layers, ..., k, d) float32: row i at a layer is J^T z_i, one batched backward pass per chunk of rows.

    For top-k cotangents, row t is the gradient of log p_t with respect to the bias.

    Args:
        rows: z (..., k, d_head) float32.
    Raises:
        NumericalError: gradients hold NaN or infinity.
    """
    # Rows go through the network at unit norm, so that float16 gradients do not underflow.
    norms = rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    def one(row: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(point.x, point.biases, row.reshape(point.x.shape), retain_graph=True)

    def chunk(rows: Tensor, norms: Tensor) -> Tensor:
        unit = (rows / norms).to(point.x)  # (chunk, ..., d_head)
        # a single row goes without vmap, for which fused attention has no backward rule
        grads = torch.func.vmap(one)(unit) if len(unit) > 1 else [g[None] for g in one(unit[0])]
        return torch.stack([norms * g.to(norms) for g in grads])

    by_row = (rows.movedim(-2, 0), norms.movedim(-2, 0))
    gradients = torch.cat((chunks or Chunks()).map(chunk, *by_row), dim=1).movedim(1, -2)
    _require_finite(gradients, "gradients", places=gradients.ndim - 2)
    return gradients


class PushForward:
    """u -> J u, by differentiating the backward pass: J^T z is linear in z, and its gradient in z along u is J u.

    (J. Townsend, "A new trick for calculating Jacobian vector products", 2017.) It works wherever a backward
    pass can itself be differentiated, which that of fused attention cannot.
    """

    def __init__(self, point: Point):
        self.at_x = torch.zeros_like(point.x, requires_grad=True)
        with torch.enable_grad():
            self.at_biases = torch.autograd.grad(point.x, point.biases, self.at_x, create_graph=True)

    def __call__(self, tangents: Tensor, chunks: Chunks | None = None) -> Tensor:
        """J u (layers, ..., m, d_head) float32 for u (layers, ..., m, d), each through its own layer alone.

        Raises:
            NumericalError: J u holds NaN or infinity.
        """
        layers, m = len(tangents), tangents.shape[-2]
        by_row = tangents.movedim(-2, 1).flatten(0, 1)  # (layers * m, ..., d)
        own = torch.arange(layers, device=tangents.device).repeat_interleave(m)

        def one(u: Tensor, own: Tensor) -> Tensor:
            seeds = [torch.where(own == layer, u, 0).reshape(g.shape).to(g) for layer, g in enumerate(self.at_biases)]
            return torch.autograd.grad(self.at_biases, self.at_x, seeds, retain_graph=True)[0]

        def chunk(u: Tensor, own: Tensor) -> Tensor:
            return torch.func.vmap(one)(u, own) if len(u) > 1 else one(u[0], own[0])[None]

        pushed = torch.cat((chunks or Chunks()).map(chunk, by_row, own)).to(tangents)
        pushed = pushed.reshape(layers, m, *tangents.shape[1:-2], -1).movedim(1, -2)
        _require_finite(pushed, "derivatives", places=pushed.ndim - 2)
        return pushed


def fisher_matrix(gradients: Tensor, weights: Tensor) -> Tensor:
    """F = G^T diag(w) G, (..., d, d) float32, from G (..., k, d) and w (k,) or (..., k)."""
    return gradients.mT @ (weights[..., None] * gradients)


def float64(tensor: Tensor) -> Tensor:
    """In float64; on the CPU if it was on MPS, which has neither float64 nor eigh."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


class Eigen(NamedTuple):
    """The leading part of the spectrum of F, at each layer or of each prompt."""

    values: Tensor  # (..., m) float32, descending, nats / unit^2
    vectors: Tensor  # (..., m, d) float32, orthonormal rows; zero where the eigenvalue is
    trace: Tensor  # (...) float32: sum of all eigenvalues
    effective_rank: Tensor  # (...) float32: (sum lambda)^2 / sum lambda^2, participation ratio; 0 if F is 0


def oriented(vectors: Tensor, slopes: Tensor, scale: Tensor) -> Tensor:
    """Eigenvectors (..., m, d) with the signs that all results give them.

    v points where the most probable token's log-probability grows: `slopes` (..., m) is its derivative
    along v. Where that vanishes beside `scale` (..., 1), v's largest component is positive.
    """
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))[..., 0]
    sign = torch.where(slopes.abs() <= 1e-6 * scale, largest, slopes)
    return vectors * torch.where(sign < 0, -1.0, 1.0)[..., None]


def eigenpairs(gradients: Tensor, weights: Tensor, num: int = 1, allow_zero: bool = False) -> Eigen:
    """The `num` largest eigenpairs (or as many as there are) of each F = G^T diag(w) G.

    With R = diag(sqrt(w)) G, F = R^T R and the k x k Gram matrix R R^T share their nonzero
    eigenvalues, and u of the latter gives v = R^T u / sqrt(lambda) of F. The smaller of the two is
    decomposed, in float64: a Gram matrix squares R's condition number, and float64 has the room.

    Since F is symmetric and positive semi-definite, this is also its singular value decomposition:
    F ~ U diag(S) V with S = values, V = vectors and U = V^T.

    Row 0 of G has to be the most probable token's: it fixes the signs (`oriented`).

    Args:
        gradients: G (..., k, d).
        weights: w (k,) or (..., k).
        allow_zero: let F be zero (a certain prediction), with eigenvalues and vectors that are zero.
    Raises:
        NumericalError: F is zero, so that it has no direction; `layer` is its first index.
        torch.linalg.LinAlgError: the decomposition failed.
    """
    k, d = gradients.shape[-2:]
    work = float64(gradients)
    r = work * weights.to(work).sqrt()[..., None]
    gram = r @ r.mT if k <= d else r.mT @ r
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    zero = (trace <= 0).nonzero()
    if len(zero) and not allow_zero:
        raise NumericalError("the Fisher matrix is zero", layer=int(zero[0, 0]))

    values, u = torch.linalg.eigh(gram)
    values = values[..., -num:].flip(-1).clamp(min=0)
    u = u[..., -num:].flip(-1).mT  # (..., num, k or d)
    v = nn.functional.normalize(u @ r, dim=-1) if k <= d else u
    v = torch.linalg.qr(v.mT).Q.mT  # small eigenvalues' vectors carry the rounding of large ones'

    toward = work[..., 0, :, None]
    v = oriented(v, (v @ toward)[..., 0], toward.norm(dim=-2))

    # What is below the rounding of the Gram matrix is no eigenvalue, and its vector no direction.
    real = values > values[..., :1] * 10 * k * torch.finfo(torch.float64).eps
    values, v = values * real, v * real[..., None]
    rank = trace**2 / gram.pow(2).sum(dim=(-2, -1)).clamp(min=torch.finfo(torch.float64).tiny)
    return Eigen(*(t.to(gradients.device, torch.float32) for t in (values, v, trace, rank)))


def curvature(gradients: Tensor, weights: Tensor, directions: Tensor) -> Tensor:
    """u^T F u (layers, n) for directions u (layers, n, d): a push s u is predicted to cost 1/2 s^2 of it."""
    return torch.einsum("lkn,k->ln", (gradients @ directions.mT) ** 2, weights)
