"""The Fisher information matrix of a causal language model's next-token distribution.

For the residual stream h leaving a decoder layer at the last token of a prompt,

    F(h) = sum_c p(c|h) grad_h log p(c|h) grad_h log p(c|h)^T          (d, d), nats / unit^2,

the expectation being under the model's own p (Amari, "Natural gradient works efficiently in
learning", 1998; Martens, "New insights and perspectives on the natural gradient method", 2020).
It predicts what a small push does: KL(p(.|h) || p(.|h + delta)) = 1/2 delta^T F delta + O(|delta|^3).

How it is computed, whatever the tokens counted:

    prefill      the tokens before the last one, once, into a constant key-value cache (last_token.py)
    linearize    the last token, with a zero bias on the residual stream of every chosen layer
    cotangents   rows z_i at x, the input of the output head, and weights w_i, such that
                 F = sum_i w_i (J^T z_i)(J^T z_i)^T  with J = dx/dh
    pull_back    G: all rows J^T z_i at all layers, in one batched backward pass per chunk
    eigenpairs   of F = G^T diag(w) G, without forming F while it has fewer rows than columns
    sweep        the predictions after pushes along any directions, as rows of one batch

Tensors in, tensors out: this module reads no files, prints nothing and keeps no state. The model
is any transformers causal LM in evaluation mode; it is handed back as it came.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
import warnings

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from last_token import UnsupportedModelError, last_token_logits

HEAD_ROWS = 16384  # vocabulary rows turned to float32 at a time: 256 MB at d = 4096
LARGE_KL = 0.1  # nats: above it, the rounding of a plain log-sum-exp (1e-6) no longer matters


class NumericalError(ArithmeticError):
    """Numbers that no result can be made of: NaN, infinity, or a Fisher matrix that is zero.

    `layer` is the index of the first chosen layer where they appeared, or None (the logits).
    """

    def __init__(self, message: str, layer: int | None = None):
        super().__init__(message)
        self.layer = layer


# --- hooks -------------------------------------------------------------------------------------


@contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Installs forward hooks and removes every one of them, whatever happens inside."""
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook))
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
    """A prompt's last token: what was read there, and the graph from the zero biases to x."""

    activations: Tensor  # (layers, d) float32, the residual stream leaving each chosen layer
    log_probs: Tensor  # (V,) float32, nats
    biases: list[Tensor]  # one (d,) leaf a layer, all zero: the point where gradients are taken
    x: Tensor  # (1, 1, d_head): the head's input, the final normalised hidden state
    head: nn.Module  # x -> raw logits, (V, d_head) if linear
    raw_logits: Tensor  # (1, 1, V): the head's output
    logits: Tensor  # (V,) float32: after the scaling or soft-capping that follows the head


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

    hooks = [(layer, edit_stream(add_zero_bias)) for layer in layers]
    hooks.append((model.get_output_embeddings(), keep_head))
    with torch.enable_grad(), forward_hooks(hooks):
        logits = last_token_logits(model, token, prefix, rows=1)[0]
    logits = logits.to(head["raw_logits"].device)  # a model spread over devices returns it to the first

    activations = torch.stack([h.float().to(logits.device) for h in streams])
    _require_finite(activations, "activations")
    if not logits.isfinite().all():
        raise NumericalError("the logits hold NaN or infinity")
    return Point(
        activations=activations,
        log_probs=logits.detach().log_softmax(-1),
        biases=biases,
        head=model.get_output_embeddings(),
        logits=logits,
        **head,
    )


def _require_finite(per_layer: Tensor, what: str) -> None:
    finite = per_layer.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        raise NumericalError(f"the {what} hold NaN or infinity", layer=int((~finite).nonzero()[0]))


# --- cotangents at the head's input --------------------------------------------------------------


class Cotangents(NamedTuple):
    """F = sum_i weights[i] (J^T rows[i]) (J^T rows[i])^T. Row 0 belongs to the most probable token."""

    rows: Tensor  # (k, d_head) float32
    weights: Tensor  # (k,) float32
    mass: float  # probability that the counted tokens hold


def _linear_head(point: Point) -> tuple[Tensor, Tensor] | None:
    """Head weights (V, d_head) and slope (V,), if logits = phi(W x + b) with phi elementwise.

    phi is whatever the model does after its head: nothing, a scale (Cohere, Granite) or a soft cap
    (Gemma 2). Its slope phi' is the gradient of the sum of the logits. None for any other head.
    """
    weight = getattr(point.head, "weight", None)
    if not isinstance(point.head, nn.Linear) or weight.is_meta:
        return None
    (slope,) = torch.autograd.grad(point.logits.sum(), point.raw_logits, retain_graph=True)
    return weight.detach(), slope[0, -1].float()


def cotangents(point: Point, tokens: int | str = "all") -> Cotangents:
    """Cotangents that make up F: of the most probable `tokens` tokens, or of "all" the vocabulary."""
    return exact_cotangents(point) if tokens == "all" else top_k_cotangents(point, tokens)


def top_k_cotangents(point: Point, k: int) -> Cotangents:
    """Cotangents of the k most probable tokens: z_t = grad_x log p_t, with weight p_t (not renormalised).

    With a linear head, z_t = phi'_t W_t - W^T (phi' p): a gather and one matrix-vector product in
    place of k backward passes through the vocabulary.
    """
    p, tokens = point.log_probs.exp().topk(k)
    linear = _linear_head(point)
    if linear is None:
        log_probs = point.logits.log_softmax(-1)

        def grad_x(token: Tensor) -> Tensor:
            one_hot = torch.zeros_like(log_probs).scatter(0, token[None], 1.0)
            return torch.autograd.grad(log_probs, point.x, one_hot, retain_graph=True)[0][0, -1]

        rows = torch.func.vmap(grad_x)(tokens).float()
    else:
        weight, slope = linear
        mean = torch.zeros(weight.shape[1], device=weight.device)
        parts = zip(weight.split(HEAD_ROWS), (slope * point.log_probs.exp()).split(HEAD_ROWS), strict=True)
        for w, q in parts:
            mean += w.float().mT @ q
        rows = slope[tokens, None] * weight[tokens].float() - mean
    return Cotangents(rows, p, float(p.sum()))


def exact_cotangents(point: Point) -> Cotangents:
    """Cotangents of the whole vocabulary, d_head of them in place of V.

    The Fisher matrix with respect to x is C = W'^T (diag(p) - p p^T) W' with W' = diag(phi') W, so
    F = J^T C J: its eigenvectors are the rows, its eigenvalues the weights. Row 0, of weight zero,
    is the most probable token's own (it fixes the sign of eigenvectors).

    Raises:
        UnsupportedModelError: the head is not linear.
    """
    linear = _linear_head(point)
    if linear is None:
        raise UnsupportedModelError("the whole vocabulary needs a linear output head: count fewer tokens")
    weight, slope = linear
    p = point.log_probs.exp()
    d = weight.shape[1]
    second = torch.zeros(d, d, device=weight.device)
    mean = torch.zeros(d, device=weight.device)
    for w, s, q in zip(weight.split(HEAD_ROWS), slope.split(HEAD_ROWS), p.split(HEAD_ROWS), strict=True):
        w = s[:, None] * w.float()
        second += w.mT @ (q[:, None] * w)
        mean += w.mT @ q
    values, vectors = torch.linalg.eigh(_off_mps(second - torch.outer(mean, mean)))
    values, vectors = values.to(mean), vectors.to(mean)
    top = p.argmax()
    top_row = slope[top] * weight[top].float() - mean
    rows = torch.cat([top_row[None], vectors.mT])
    weights = torch.cat([values.new_zeros(1), values.clamp(min=0)])
    return Cotangents(rows, weights, 1.0)


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
        while start < len(rows[0]):
            chunk = [r[start : start + self.size] for r in rows]
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


def pull_back(point: Point, z: Cotangents, chunks: Chunks | None = None) -> Tensor:
    """G (layers, k, d) float32: row i at a layer is J^T z_i, one batched backward pass per chunk.

    For top-k cotangents, row t is the gradient of log p_t with respect to the residual stream.

    Raises:
        NumericalError: gradients hold NaN or infinity.
    """
    # Rows go through the network at unit norm, so that float16 gradients do not underflow.
    norms = z.rows.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)

    def one(row: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(point.x, point.biases, row[None, None], retain_graph=True)

    def chunk(rows: Tensor, norms: Tensor) -> Tensor:
        unit = (rows / norms[:, None]).to(point.x)
        grads = torch.func.vmap(one)(unit)  # one (chunk, d) a layer
        return torch.stack([norms[:, None] * g.to(norms) for g in grads])

    gradients = torch.cat((chunks or Chunks()).map(chunk, z.rows, norms), dim=1)
    _require_finite(gradients, "gradients")
    return gradients


def fisher_matrix(gradients: Tensor, weights: Tensor) -> Tensor:
    """F = G^T diag(w) G, (..., d, d) float32, from G (..., k, d) and w (k,)."""
    return gradients.mT @ (weights[:, None] * gradients)


def _off_mps(tensor: Tensor) -> Tensor:
    """On the CPU if it was on MPS, which has neither float64 nor eigh."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


class Eigen(NamedTuple):
    """The leading part of the spectrum of F at each layer."""

    values: Tensor  # (layers, m) float32, descending, nats / unit^2
    vectors: Tensor  # (layers, m, d) float32, unit norm, rows
    trace: Tensor  # (layers,) float32: sum of all eigenvalues
    effective_rank: Tensor  # (layers,) float32: (sum lambda)^2 / sum lambda^2, participation ratio


def eigenpairs(gradients: Tensor, weights: Tensor, num: int = 1) -> Eigen:
    """The `num` largest eigenpairs of F = G^T diag(w) G at each layer, from G (layers, k, d), w (k,).

    With R = diag(sqrt(w)) G, F = R^T R and the k x k Gram matrix R R^T share their nonzero
    eigenvalues, and u of the latter gives v = R^T u / sqrt(lambda) of F. The smaller of the two is
    decomposed, in float64: a Gram matrix squares R's condition number, and float64 has the room.

    Signs: v points where row 0 of G, the most probable token's log-probability, grows; where that
    derivative vanishes, v's largest component is positive.

    Raises:
        NumericalError: F is zero at a layer, so that it has no direction.
        torch.linalg.LinAlgError: the decomposition failed.
    """
    k, d = gradients.shape[1:]
    work = _off_mps(gradients)
    r = work.double() * weights.to(work.device).double().sqrt()[:, None]
    gram = r @ r.mT if k <= d else r.mT @ r
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    zero = (trace <= 0).nonzero()
    if len(zero):
        raise NumericalError("the Fisher matrix is zero", layer=int(zero[0]))

    values, u = torch.linalg.eigh(gram)
    num = min(num, values.shape[-1])
    values = values[:, -num:].flip(-1).clamp(min=0)
    u = u[:, :, -num:].flip(-1).mT  # (layers, num, k or d)
    v = nn.functional.normalize(u @ r, dim=-1) if k <= d else u

    slope = torch.einsum("lmd,ld->lm", v, work[:, 0].double())
    flat = slope.abs() <= 1e-6 * work[:, 0].double().norm(dim=-1, keepdim=True)
    largest = v.gather(-1, v.abs().argmax(-1, keepdim=True))[..., 0]
    v = v * torch.where(torch.where(flat, largest, slope) < 0, -1.0, 1.0)[..., None]

    rank = trace**2 / gram.pow(2).sum(dim=(-2, -1))
    return Eigen(*(t.to(gradients.device, torch.float32) for t in (values, v, trace, rank)))


def curvature(gradients: Tensor, weights: Tensor, directions: Tensor) -> Tensor:
    """u^T F u (layers, n) for directions u (layers, n, d): a push s u is predicted to cost 1/2 s^2 of it."""
    return torch.einsum("lkn,k->ln", (gradients @ directions.mT) ** 2, weights)


# --- pushing along directions --------------------------------------------------------------------


def kl_divergence(log_p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) in nats (rows,) of p = exp(log_p) (V,) and q = softmax(logits) (rows, V).

    KL = log E_p[exp(u)] - E_p[u] with u = logits - log_p, which no shift of u changes. Shifted to
    E_p[u] = 0, and with expm1 and log1p, what is left is of second order in u: 1e-10 nats is right in
    float32, where the sum of p (log p - log q) is noise below 1e-7. Large divergences, whose
    exp(u) would overflow, are taken as they stand.
    """
    p = log_p.exp()
    u = logits - log_p
    mean = u @ p
    far = logits.logsumexp(-1) - mean
    u -= mean[..., None]
    left = u @ p  # rounding of the mean
    near = torch.log1p(u.clamp_(max=80).expm1_() @ p) - left
    return torch.where(far > LARGE_KL, far, near.clamp(min=0))


class Sweep(NamedTuple):
    """The next-token distribution after each push."""

    kl: Tensor  # (rows,) float32, KL(unperturbed || perturbed) in nats
    top_ids: Tensor  # (rows, top) int64, the most probable tokens, descending
    top_log_probs: Tensor  # (rows, top) float32, nats
    target_log_prob: Tensor  # (rows,) float32, nats, of the one token asked about


@torch.no_grad()
def sweep(
    model: nn.Module,
    layers: Sequence[nn.Module],
    token: Tensor,
    prefix: DynamicCache | None,
    log_probs: Tensor,
    deltas: Tensor,
    at_layer: Tensor,
    target: int = 0,
    top: int = 5,
    chunks: Chunks | None = None,
) -> Sweep:
    """Pushes the last token's residual stream and reads the predictions; every push is a row of a batch.

    Args:
        layers, token, prefix: as in `linearize`.
        log_probs: (V,) float32, the unperturbed distribution.
        deltas: (rows, d) float32, what is added to the residual stream.
        at_layer: (rows,) int64 on the CPU, ascending: the index in `layers` of the one layer where row r
            is pushed.
        target: a token whose probability to return.
        top: how many of the most probable tokens to return.
    Raises:
        NumericalError: a push led to logits that hold NaN or infinity.
        ValueError: at_layer is not ascending.
    """

    if (at_layer.diff() < 0).any():
        raise ValueError("at_layer must be ascending")
    # A row is the unperturbed one below its layer, so the batch starts as one row and grows at every
    # layer by the rows pushed there. Architectures with an attention of their own need all rows from
    # the start.
    growing = model.is_backend_compatible()

    def chunk(deltas: Tensor, at_layer: Tensor) -> Sweep:
        counts = torch.bincount(at_layer, minlength=len(layers)).tolist()
        starts = [sum(counts[:index]) for index in range(len(counts))]

        def push(index: int) -> Callable[[Tensor], Tensor]:
            here = deltas[starts[index] : starts[index] + counts[index], None]  # (count, 1, d)

            def grow(h: Tensor) -> Tensor:
                # the sum is float32 or wider: in half precision, only the result is rounded
                return torch.cat([h, (h[:1] + here.to(h.device)).to(h.dtype)])

            def add(h: Tensor) -> Tensor:
                padding = (0, 0, 0, 0, starts[index], len(deltas) - starts[index] - counts[index])
                return (h + nn.functional.pad(here, padding).to(h.device)).to(h.dtype)

            return grow if growing else add

        hooks = [(layer, edit_stream(push(index))) for index, layer in enumerate(layers) if counts[index]]
        with forward_hooks(hooks):
            logits = last_token_logits(model, token, prefix, rows=1 if growing else len(deltas))
        logits = logits[-len(deltas) :].to(log_probs.device)
        kl = kl_divergence(log_probs, logits)
        normalizer = logits.logsumexp(-1)
        top_logits, top_ids = logits.topk(top)
        return Sweep(kl, top_ids, top_logits - normalizer[:, None], logits[:, target] - normalizer)

    parts = (chunks or Chunks()).map(chunk, deltas, at_layer)
    result = Sweep(*(torch.cat(column) for column in zip(*parts, strict=True)))
    bad = (~result.kl.isfinite()).nonzero()
    if len(bad):
        layer = int(at_layer[int(bad[0, 0])])
        raise NumericalError("the logits after a push hold NaN or infinity", layer=layer)
    return result
