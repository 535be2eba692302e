"""The Fisher information matrix of a causal language model's next-token distribution.

    F(h) = sum_c p(c|h) grad_h log p(c|h) grad_h log p(c|h)^T          (d, d), nats / unit^2

for the residual stream h leaving a decoder layer at the last token of a prompt. The expectation is under the
model's own p (Amari, "Natural gradient works efficiently in learning", 1998; Martens, "New insights and
perspectives on the natural gradient method", 2020). F predicts what a small perturbation does:
KL(p(.|h) || p(.|h + delta)) = 1/2 delta^T F delta + O(|delta|^3). h may as well be a bias added at every token
of a prompt: a change of the whole residual stream.

    model, tokenizer = load("smollm2-135m")
    point = linearize(model, tokenizer("The zoo keeps many wild").input_ids)
    top_k(point, 200).eigenpairs().values          # (layers, 1): F of the 200 most probable tokens
    full_vocabulary(point).eigenpairs().values     # (layers, 1): F of all tokens

How F is computed, whichever tokens it counts:

    1. linearize, linearize_prompts or linearize_perturbed gives a point, with zero biases at which gradients are taken
    2. OutputHead gives cotangents z_i at x, its input, and weights w_i, such that with J = dx/dh
       F = sum_i w_i (J^T z_i)(J^T z_i)^T
    3. pull_back gives G: the rows J^T z_i of all layers, in batched backward passes
    4. fisher_matrix gives F = G^T diag(w) G; eigenpairs its leading ones, without F if G has few rows
    5. perturb gives logits after h + delta; kl_divergence what the perturbation did

The model is any transformers causal LM in evaluation mode, and is left as it was. In the shapes below, "..." is nothing
for one prompt and (prompts,) for a batch. Whatever holds NaN or infinity raises NumericalError, a model or token that
does not fit UnsupportedModelError.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from residual_fisher.common.text import excerpt, first_line
from residual_fisher.model.eigen import block_lanczos, eigh, float64
from residual_fisher.model.head import OutputHead
from residual_fisher.model.loading import (
    load,
    text_config,
    vocabulary_size,
)
from residual_fisher.model.overlap import cosine, matrix_similarity, subspace_overlap
from residual_fisher.model.passes import (
    Chunks,
    UnsupportedModelError,
    unwrapped,
    ways_of,
)
from residual_fisher.model.points import (
    NumericalError,
    Point,
    PromptPoint,
    PushForward,
    carry,
    linearize,
    linearize_each,
    linearize_perturbed,
    linearize_prompts,
    numbered_layers,
    one_prompt,
    perturb,
    pull_back,
    stream_jacobians,
)
from residual_fisher.model.predictions import (
    DOUBLE_PRECISION,
    FULL_PRECISION,
    HALF_PRECISION,
    kl_divergence,
    most_probable,
)
from residual_fisher.model.steering import Steering, steer
from residual_fisher.model.vectors import Vectors, added, load_vectors, save_vectors
from residual_fisher.model.words import TokenShares, token_shares, token_writer

__all__ = [
    "Chunks", "Eigenpairs", "FullVocabulary", "NumericalError", "OutputHead", "Point", "PromptPoint", "PushForward",
    "Steering", "TextMap", "TopK", "TopKOfAnswers", "UnsupportedModelError", "Vectors", "added", "carry",
    "check_prediction", "cosine", "eigenpairs", "fisher_matrix", "fix_signs", "full_vocabulary", "kl_divergence",
    "linearize", "linearize_each", "linearize_perturbed", "linearize_prompts", "load", "load_vectors", "map_text",
    "matrix_similarity", "most_probable", "perturb", "pull_back", "save_vectors", "steer", "stream_jacobians",
    "subspace_overlap", "top_k", "top_k_of_answers", "words",
]  # fmt: skip

# Widest matrix that is formed: `eigh` of seven takes 0.05 s, and of 576 x 576 0.35 s (iteration: 0.03).
EIGH_MAX_WIDTH = 256
LOOK_EVERY = 15  # products between two looks at the residuals: one pair takes about 15, ten take 30 to 45
MAX_RESIDUAL = 1e-5  # largest |F v - lambda v| / lambda_1 of an eigenpair found by iteration: what float32 can reach
ANSWER_PROBES = 2  # directions pushed forward, to find what counts in an answer: with 8 nearly the same is found
# Bytes that the gradients of a block of tokens take, in `map_text`. What is made of them takes several times as many.
TEXT_MEMORY = 1 << 26
TEXT_ROWS = 1024  # cotangents times tokens in one of its backward passes
PREDICTED = 5  # most probable tokens kept at each token of a text


# --- F and its eigenpairs -------------------------------------------------------------------------


def fisher_matrix(gradients: Tensor, weights: Tensor) -> Tensor:
    """F = G^T diag(w) G, (..., d, d) float32, from G (..., k, d) and w (k,) or (..., k)."""
    return gradients.mT @ (weights[..., None] * gradients)


def _require_nonzero(trace: Tensor) -> None:
    zero = (trace <= 0).nonzero()
    if len(zero):
        raise NumericalError("the Fisher matrix is zero", *zero[0].tolist())


class Eigenpairs(NamedTuple):
    """The leading part of the spectrum of F, at each layer or of each prompt."""

    values: Tensor  # (..., m) float32, descending, nats / unit^2
    vectors: Tensor  # (..., m, d) float32, orthonormal rows; zero where the eigenvalue is
    trace: Tensor  # (...) float32: sum of all eigenvalues
    effective_rank: Tensor  # (...) float32: (sum lambda)^2 / sum lambda^2, participation ratio; 0 if F is 0


def fix_signs(vectors: Tensor, slopes: Tensor, scale: Tensor) -> Tensor:
    """Eigenvectors (..., m, d) with the project's signs; an eigenvector's own sign is arbitrary.

    Along v the log-probability of the most probable token grows: its derivatives are `slopes` (..., m). Where one is
    below 1e-6 of `scale` (..., 1), v's largest component is positive. Rounding may flip the sign where the derivative
    is small, as along many trailing eigenvectors: no rule is without such cases.
    """
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))[..., 0]
    sign = torch.where(slopes.abs() <= 1e-6 * scale, largest, slopes)
    return vectors * torch.where(sign < 0, -1.0, 1.0)[..., None]


def eigenpairs(gradients: Tensor, weights: Tensor, num: int = 1, allow_zero: bool = False) -> Eigenpairs:
    """The `num` largest eigenpairs of each F = G^T diag(w) G; all of them if there are fewer.

    With R = diag(sqrt(w)) G, F = R^T R and the k x k Gram matrix R R^T have the same nonzero eigenvalues. An
    eigenvector u of R R^T gives v = R^T u / sqrt(lambda) of F. The smaller of the two matrices is decomposed, in
    float64, since a Gram matrix squares R's condition number. F is symmetric and positive semi-definite, so this is
    also its singular value decomposition: F ~ U diag(S) V with S = values, V = vectors and U = V^T.

    Args:
        gradients: G (..., k, d). Row 0 belongs to the most probable token: it fixes the signs (`fix_signs`).
        weights: w (k,) or (..., k).
        allow_zero: return zeros if F is zero (a certain prediction), in place of a NumericalError.
    Raises:
        torch.linalg.LinAlgError: the decomposition failed.
    """
    k, d = gradients.shape[-2:]
    work = float64(gradients)
    r = work * weights.to(work).sqrt()[..., None]  # (..., k, d)
    gram = r @ r.mT if k <= d else r.mT @ r  # (..., k, k) or (..., d, d)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    if not allow_zero:
        _require_nonzero(trace)

    values, u = eigh(gram)
    values = values[..., -num:].flip(-1).clamp(min=0)
    u = u[..., -num:].flip(-1).mT  # (..., num, k or d)
    v = nn.functional.normalize(u @ r, dim=-1) if k <= d else u  # (..., num, d)
    v = torch.linalg.qr(v.mT).Q.mT  # the vectors of small eigenvalues carry the rounding of large ones

    toward = work[..., 0, :, None]  # (..., d, 1)
    v = fix_signs(v, (v @ toward)[..., 0], toward.norm(dim=-2))

    # An eigenvalue below the rounding of the Gram matrix is zero, and its vector arbitrary.
    real = values > values[..., :1] * 10 * k * torch.finfo(torch.float64).eps
    values, v = values * real, v * real[..., None]
    rank = trace**2 / gram.pow(2).sum(dim=(-2, -1)).clamp(min=torch.finfo(torch.float64).tiny)
    return Eigenpairs(*(t.to(gradients.device, torch.float32) for t in (values, v, trace, rank)))


@dataclass(frozen=True)
class TopK:
    """F over the k most probable tokens, F = G^T diag(p) G, at each layer. p is not renormalised."""

    gradients: Tensor  # G (layers, ..., k, d) float32: row t is grad_h log p_t, the most probable token first
    weights: Tensor  # p (..., k) float32
    mass: Tensor  # (...) float32: probability that the k tokens hold
    tokens: Tensor  # (..., k) int64

    @property
    def matrix(self) -> Tensor:
        """F (layers, ..., d, d) float32, nats / unit^2."""
        return fisher_matrix(self.gradients, self.weights)

    def eigenpairs(self, num: int = 1, allow_zero: bool = False) -> Eigenpairs:
        """The `num` largest eigenpairs of each F, without forming it: see `eigenpairs`."""
        return eigenpairs(self.gradients, self.weights, num, allow_zero)

    def curvature(self, directions: Tensor) -> Tensor:
        """u^T F u (layers, ..., n) for directions u (layers, ..., n, d). The KL predicted of s u is 1/2 s^2 u^T F u."""
        return torch.einsum("...nk,...k->...n", self.slopes(directions) ** 2, self.weights)

    def slopes(self, directions: Tensor) -> Tensor:
        """d log p_t along directions u (layers, ..., n, d): (layers, ..., n, k), nats per unit."""
        return directions @ self.gradients.mT


def top_k(point: Point, k: int, chunks: Chunks | None = None, jacobian: Tensor | None = None) -> TopK:
    """F over the k most probable next tokens, at every layer of the point; `chunks` are of gradients.

    If `FullVocabulary.jacobian` of this point is known, it replaces the backward pass.
    """
    log_p, tokens = most_probable(point.log_probs, k)
    p = log_p.exp()  # (..., k)
    cotangents = point.cotangents(tokens)  # (..., k, d_head)
    gradients = pull_back(point, cotangents, chunks) if jacobian is None else cotangents @ jacobian
    return TopK(gradients, p, p.sum(-1), tokens)


@dataclass(frozen=True)
class TopKOfAnswers(TopK):
    """F of the answers that a batch of prompts is given, sum_j F_j over their positions j, teacher-forced.

    It counts some pairs of a position and one of its tokens, each a row of G. Row 0 comes before them: the gradient of
    the answer's log-probability, which fixes the signs of eigenvectors and has no weight. `mass` is the mean over an
    answer's positions of that of their k tokens.
    """

    positions: Tensor  # (prompts, 1 + rows) int64: `tokens` are at these; 0 for row 0
    share: Tensor  # (prompts,) float32: about how much of the trace the pairs hold that are counted


def words(
    point: PromptPoint, directions: Tensor, tokenizer, k: int | str = 200, chunks: Chunks | None = None
) -> dict[int, list[list[dict]]]:
    """The tokens that directions u (layers, n, d) move most, as the experiment's results have them.

    Args:
        k: the most probable tokens that are counted, or "all"; their shares of u^T F u sum to 1.
    Returns:
        By number of the layer, for each direction: at most 8 tokens, the largest share first, each with its `token`
        written so that it can be read, `id`, `share`, and `slope`, d log p per unit along u.
    """
    found = full_vocabulary(point, chunks) if k == "all" else top_k(point, k, chunks)
    shares, write = token_shares(found.slopes(directions), found.weights, found.tokens), token_writer(tokenizer)
    return {layer: shares.records((row,), write) for row, layer in enumerate(point.layers)}


def top_k_of_answers(
    point: Point, k: int, lengths: Tensor, rows: int | None = None, chunks: Chunks | None = None
) -> TopKOfAnswers:
    """F of answers over the k most probable tokens of their positions: those pairs that matter most.

    A pair's part of the trace is p_jt |J_j^T s_jt|^2. Before any row is pulled back, it is taken to be p_jt |s_jt|^2
    times how strongly its position depends on the biases: sum_t p_jt (s_jt J_j u)^2 / sum_t p_jt |s_jt|^2, the mean
    over a few random u, which are pushed forward.

    Args:
        point: of `linearize_prompts` with n > 1 predicted tokens.
        lengths: (prompts,) int64 on the CPU: tokens of each answer, from 1 to n.
        rows: pairs that are counted, k by default. All n * k give the sum over positions as it is.
    Raises:
        UnsupportedModelError: see `PushForward`.
    """
    log_p, tokens = most_probable(point.log_probs, k)  # (prompts, n, k)
    n, k = tokens.shape[1:]
    is_answer = (torch.arange(n) < lengths[:, None]).to(log_p)[..., None]  # (prompts, n, 1)
    p, cotangents = log_p.exp() * is_answer, point.cotangents(tokens)  # of s: (prompts, n, k, d_head)

    u = torch.randn(ANSWER_PROBES, point.biases[0].shape[-1], generator=torch.Generator().manual_seed(0))
    u = u.to(p).expand(len(point.biases), len(p), *u.shape)
    pushed = PushForward(point)(u, chunks).unflatten(-1, (n, -1))  # J u (layers, prompts, probes, n, d_head)
    slopes = torch.einsum("lpund,pnkd->lpunk", pushed, cotangents)
    parts = p * cotangents.pow(2).sum(-1)  # (prompts, n, k)
    pushed_parts = (p * slopes.pow(2).mean((0, 2))).sum(-1, keepdim=True)  # (prompts, n, 1)
    parts = parts * pushed_parts / parts.sum(-1, keepdim=True).clamp(min=torch.finfo(parts.dtype).tiny)
    parts = parts.flatten(1)
    counted, places = most_probable(parts, rows or k)  # (prompts, rows)

    one_row = torch.arange(len(p), device=p.device)[:, None]
    z = cotangents.new_zeros(*places.shape, n, cotangents.shape[-1])
    z[one_row, torch.arange(places.shape[1], device=p.device), places // k] = cotangents.flatten(1, 2)[one_row, places]
    answer = is_answer * cotangents[:, :, 0]  # (prompts, n, d_head): its own tokens are the most probable ones
    gradients = pull_back(point, torch.cat([answer[:, None], z], dim=1).flatten(2), chunks)
    weights, tokens, positions = (
        nn.functional.pad(part, (1, 0))
        for part in (*(x.flatten(1).gather(1, places) for x in (p, tokens)), places // k)
    )
    share = counted.sum(-1) / parts.sum(-1).clamp(min=torch.finfo(parts.dtype).tiny)
    mass = p.sum((-1, -2)) / is_answer.sum((-1, -2))
    return TopKOfAnswers(gradients, weights, mass, tokens, positions, share)


@dataclass(frozen=True)
class FullVocabulary:
    """F over all tokens, F = J^T C J, at each layer."""

    jacobian: Tensor  # J (layers, ..., d_head, d) float32: z @ J is J^T z for any z at x
    matrix: Tensor  # F (layers, ..., d, d) float32, nats / unit^2
    top_gradient: Tensor  # (layers, ..., d) float32: of the most probable token's log-probability
    weights: Tensor  # p (..., V) float32
    head: OutputHead
    tokens = None  # TopK's field; here it is all tokens, in order

    def eigenpairs(self, num: int = 1, allow_zero: bool = False) -> Eigenpairs:
        """The `num` largest eigenpairs of each F; signs and zeros are treated as in `eigenpairs`."""
        trace = self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        if not allow_zero:
            _require_nonzero(trace)
        values, vectors = _largest_eigenpairs(self.matrix, min(num, self.matrix.shape[-1]))
        toward = self.top_gradient[..., None]
        vectors = fix_signs(vectors, (vectors @ toward)[..., 0], toward.norm(dim=-2))
        norm = torch.linalg.matrix_norm(self.matrix).clamp(min=torch.finfo(torch.float32).tiny)
        return Eigenpairs(values, vectors, trace, (trace / norm) ** 2)

    def curvature(self, directions: Tensor) -> Tensor:
        """u^T F u (layers, ..., n) for directions u (layers, ..., n, d)."""
        return ((directions @ self.matrix) * directions).sum(-1)

    def slopes(self, directions: Tensor) -> Tensor:
        """d log p_t of all tokens along directions u (layers, ..., n, d): (layers, ..., n, V), in nats per unit."""
        return self.head.times(directions @ self.jacobian.mT)


def full_vocabulary(point: Point, chunks: Chunks | None = None) -> FullVocabulary:
    """F over the whole vocabulary, at every layer of the point. It needs a linear head (see `OutputHead`).

    It takes d_head backward rows, which give all of J at all layers. At a prompt's last token a row costs little, and
    this is faster than iterating for a few eigenpairs.
    """
    head = point.output_head()
    fisher_at_x = head.fisher_matrix()  # C (..., d_head, d_head)
    identity = torch.eye(fisher_at_x.shape[-1], device=fisher_at_x.device).expand_as(fisher_at_x)
    jacobian = pull_back(point, identity, chunks)  # J (layers, ..., d_head, d)
    top = head.cotangents(most_probable(point.log_probs, 1)[1])
    matrix = torch.stack([j.mT @ (fisher_at_x @ j) for j in jacobian])  # a layer at a time: less memory
    return FullVocabulary(jacobian, matrix, (top @ jacobian)[..., 0, :], head.p, head)


def full_curvature(point: Point, directions: Tensor, chunks: Chunks | None = None) -> Tensor:
    """u^T F u = (J u)^T C (J u), (layers, ..., n), of F over all tokens, without forming F; u (layers, ..., n, d)."""
    y = PushForward(point)(directions, chunks)
    return (y * point.output_head().fisher_times(y)).sum(-1)


def _largest_eigenpairs(matrix: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` largest eigenvalues (..., num) and eigenvectors (..., num, d) of matrices (..., d, d)."""
    d = matrix.shape[-1]
    if d <= EIGH_MAX_WIDTH or num > d // 8:
        values, vectors = eigh(float64(matrix))
        return values.flip(-1)[..., :num].clamp(min=0).to(matrix), vectors.flip(-1)[..., :num].mT.to(matrix)

    start = torch.randn(1, d, generator=torch.Generator().manual_seed(0))  # the same in every run
    start = start.to(matrix).expand(*matrix.shape[:-2], 1, d)
    found = block_lanczos(lambda v: (matrix @ v.mT).mT, start, num, MAX_RESIDUAL / 5, most=d, every=LOOK_EVERY)
    values, vectors = found.values, nn.functional.normalize(found.vectors, dim=-1)
    largest = values[..., 0].clamp(min=torch.finfo(torch.float32).tiny)
    residual = (vectors @ matrix - values[..., None] * vectors).norm(dim=-1).amax(-1) / largest  # (...)
    wrong = (~(residual <= MAX_RESIDUAL)).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        raise NumericalError(f"the eigensolver left a residual of {residual[tuple(place)]:.1e}", *place)
    return values, vectors


# --- a text, token by token -----------------------------------------------------------------------


@dataclass(frozen=True)
class TextMap:
    """F at every token of a text and every chosen layer: row n is that of the prediction after token n.

    Earlier tokens count as constants, as in `linearize`, so row n depends on the first n + 1 tokens alone.
    """

    ids: Tensor  # (tokens,) int64
    layers: list[int]
    eigenvalues: Tensor  # (tokens, layers) float32: the largest of each F, nats / unit^2
    vectors: Tensor  # (tokens, layers, d) float32: its eigenvector v; zero if F is
    trace: Tensor  # (tokens, layers) float32
    effective_rank: Tensor  # (tokens, layers) float32
    captured_mass: Tensor  # (tokens,) float32: probability that the counted tokens hold
    surprisal: Tensor  # (tokens,) float32, nats: -log p of each token after those before it; NaN for the first
    activations: Tensor  # (tokens, layers, d) float32: the residual stream h
    carried: Tensor  # (tokens, layers, d) float32: J h, see `carry`; NaN if the model does not let it be found
    shares: TokenShares  # (tokens, layers, n) each: the tokens that v moves most, and the log p that they gain along it
    top_log_probs: Tensor  # (tokens, 5) float32: of the most probable next tokens
    top_ids: Tensor  # (tokens, 5) int64


def map_text(
    model: nn.Module,
    tokenizer,
    text: str | Sequence[int] | Tensor | Mapping,
    layers: Sequence[int] | None = None,
    k: int | str = 50,
    chunks: Chunks | None = None,
) -> TextMap:
    """F of the next-token distribution at every token of a text and every layer, and its largest eigenpair.

    It takes k backward rows of the text (see `linearize_each`), and half a row for each layer (see `carry`); or as many
    of each token, one token after the other, if the model's memory is more than keys and values: the same numbers, much
    slower. Whole prompts of growing length, as `linearize_prompts` would run them, cost the square of the tokens.

    Args:
        text: or its token ids, as `linearize` takes them: of a chat, what `apply_chat_template` returns.
        layers: numbers of decoder layers, ascending; all by default.
        k: the most probable tokens that F counts, or "all".
        chunks: of gradients of one block, in rows of all its tokens.
    Raises:
        ValueError: the text has no tokens, or `layers` are not ascending numbers of the model's layers.
        UnsupportedModelError: the model cannot be read rightly.
    """
    ids = one_prompt(tokenizer(text) if isinstance(text, str) else text)
    inner = unwrapped(model)
    numbers = list(numbered_layers(inner, layers))
    d = text_config(inner).hidden_size
    rows = 2 * d if k == "all" else min(k, vocabulary_size(inner))  # of width d at each layer: J and F, or G
    block = min(64, max(1, TEXT_MEMORY // (4 * d * len(numbers) * rows)))
    chunks = chunks or Chunks(max(1, TEXT_ROWS // min(block, max(1, len(ids)))))
    try:
        cells = _cells(linearize_each(model, ids, numbers, block), ids, k, chunks)
    except UnsupportedModelError as error:
        alone = (linearize(model, ids[: n + 1], numbers) for n in range(len(ids)))
        cells = _cells(alone, ids, k, chunks)
        ways_of(inner)["text"] = f"token by token: {excerpt(first_line(error), 100)}"
    return TextMap(ids, numbers, *cells)


def _cells(points: Iterable[Point], ids: Tensor, k: int | str, chunks: Chunks) -> list[Tensor | TokenShares]:
    """The fields of `TextMap` after the layers, of points at consecutive tokens: of blocks, or of one token each."""
    blocks, following = [], ids.roll(-1)  # the token after each one; after the last, whatever it is
    for point in points:
        log_p = point.log_probs.reshape(-1, point.log_probs.shape[-1])  # (tokens, V)
        next_ids, following = following[: len(log_p)].to(log_p.device), following[len(log_p) :]
        found = full_vocabulary(point, chunks) if k == "all" else top_k(point, k, chunks)
        eigen = found.eigenpairs(allow_zero=True)
        shares = token_shares(found.slopes(eigen.vectors), found.weights, found.tokens)

        def by_token(part: Tensor, tokens: int = len(log_p)) -> Tensor:  # (layers, ..., n) to (tokens, layers, n)
            return part.reshape(len(part), tokens, -1).transpose(0, 1)

        blocks.append(
            [
                *(by_token(part)[..., 0] for part in (eigen.values, eigen.trace, eigen.effective_rank)),
                *(by_token(part) for part in (eigen.vectors, point.activations, _carried(point), *shares[:3])),
                found.weights.sum(-1).reshape(-1),
                -log_p.gather(1, next_ids[:, None])[:, 0],
                *most_probable(log_p, PREDICTED),
            ]
        )
    columns = [torch.cat(parts).cpu() for parts in zip(*blocks, strict=True)]
    values, trace, rank, vectors, activations, carried, *shares, mass, surprisal, top_log_probs, top_ids = columns
    surprisal = surprisal.roll(1)
    surprisal[0] = math.nan
    shares = TokenShares(*shares)
    return [values, vectors, trace, rank, mass, surprisal, activations, carried, shares, top_log_probs, top_ids]


def _carried(point: Point) -> Tensor:
    """`carry`, or NaN where the model does not let it be found, with a note in `ways_of`."""
    try:
        return carry(point)
    except UnsupportedModelError as error:
        ways_of(point.model)["local_lens"] = f"none: {excerpt(first_line(error), 100)}"
        return torch.full_like(point.activations, math.nan)


# --- does F predict what a small perturbation does? -----------------------------------------------

CHECKED_TOKENS = 20  # the most probable ones
LONGEST_CHECK = 0.1  # length of the longest perturbation, as a share of |h|


def check_prediction(point: Point, moved: Callable[[Tensor], Tensor], chunks: Chunks | None = None) -> bool:
    """Compares small perturbations along v, at the first layer and prompt, with what F predicts of them.

    KL = 1/2 delta^T F delta holds if log p_t changes by g_t delta for the tokens t that F counts. Those changes are
    compared: half the difference between delta and -delta, which cancels terms of second order, weighted as in F. What
    counts is the delta that is left after rounding h + delta. If a perturbation fails, shorter ones are tried, since a
    long one may switch a token to another expert.

    Args:
        moved: takes perturbations (2, d), returns next-token logits (2, V).
    Returns:
        whether there was anything to see beyond rounding: F is too small if the prediction is certain
    Raises:
        UnsupportedModelError: the model's gradient is not its derivative, for example as activations are quantised.
    """
    dtype = point.model.dtype
    sizes, least, factor = {8: DOUBLE_PRECISION, 4: FULL_PRECISION}.get(dtype.itemsize, HALF_PRECISION)
    top = top_k(point, min(CHECKED_TOKENS, point.log_probs.shape[-1]), chunks)
    first = (0,) * (top.gradients.ndim - 2)  # layer and prompt
    eigen = top.eigenpairs(allow_zero=True)
    value, v, h = eigen.values[first][0], eigen.vectors[first][0], point.activations[first]
    ids, p = top.tokens[first[1:]], top.weights[first[1:]]  # both (tokens,)
    for nats in sizes:
        step = torch.minimum((2 * nats / value).sqrt(), LONGEST_CHECK * h.norm())
        if not 0.5 * step**2 * value >= least:
            return False
        deltas = torch.stack([step * v, -step * v])
        log_probs = moved(deltas).log_softmax(-1)[:, ids.cpu()].to(v)
        # h is of the model's dtype: in half precision, changes of its large components may be rounded away
        arrived = (h.cpu().double() + deltas.cpu()).to(dtype).double() - h.cpu()  # (2, d)
        expected = top.gradients[first] @ ((arrived[0] - arrived[1]) / 2).to(v)  # (tokens,)
        found = (log_probs[0] - log_probs[1]) / 2
        ratio = float((p * found * expected).sum() / (p * expected**2).sum())
        if 1 / factor <= ratio <= factor:
            return True
    raise UnsupportedModelError(
        f"a small perturbation changes its prediction {ratio:.2g} times as much as its gradients say "
        "(are its activations quantised?)"
    )
