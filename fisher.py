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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from residual_fisher.common.text import excerpt, first_line
from residual_fisher.model.each_token import EachToken
from residual_fisher.model.eigen import block_lanczos, eigh, float64
from residual_fisher.model.head import OutputHead, cotangents_through, is_linear
from residual_fisher.model.last_token import LAST_TOKEN_ATTENTION, prefix_memory
from residual_fisher.model.loading import (
    decoder_layers,
    load,
    require_fixed_rotation,
    rotation_change,
    text_config,
    vocabulary_size,
)
from residual_fisher.model.passes import (
    ROUNDING_NATS,
    Chunks,
    UnsupportedModelError,
    add_at,
    attention,
    batched_gradients,
    capture_head,
    edit_stream,
    hooked,
    largest_kl,
    logits_at,
    unwrapped,
    ways_of,
)
from residual_fisher.model.reading import PrefixMode, Reading, choose_mode, read, share_prefixes
from residual_fisher.model.words import TokenShares, token_shares

__all__ = [
    "Chunks", "Eigenpairs", "FullVocabulary", "NumericalError", "OutputHead", "Point", "PromptPoint", "PushForward",
    "TextMap", "TopK", "TopKOfAnswers", "UnsupportedModelError", "check_prediction", "eigenpairs", "fisher_matrix",
    "fix_signs", "full_vocabulary", "kl_divergence", "linearize", "linearize_each", "linearize_perturbed",
    "linearize_prompts", "load", "map_text", "most_probable", "perturb", "pull_back", "stream_jacobians", "top_k",
    "top_k_of_answers",
]  # fmt: skip

# Widest matrix that is formed: `eigh` of seven takes 0.05 s, and of 576 x 576 0.35 s (iteration: 0.03).
EIGH_MAX_WIDTH = 256
LOOK_EVERY = 15  # products between two looks at the residuals: one pair takes about 15, ten take 30 to 45
MAX_RESIDUAL = 1e-5  # largest |F v - lambda v| / lambda_1 of an eigenpair found by iteration: what float32 can reach
ANSWER_PROBES = 2  # directions pushed forward, to find what counts in an answer: with 8 nearly the same is found
# Largest relative error of a gradient that is rounding, by dtype: sums in another order, through all layers.
GRADIENT_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
# Bytes that the gradients of a block of tokens take, in `map_text`. What is made of them takes several times as many.
TEXT_MEMORY = 1 << 26
TEXT_ROWS = 1024  # cotangents times tokens in one of its backward passes
PREDICTED = 5  # most probable tokens kept at each token of a text
LARGE_KL = 0.1  # nats; above it the rounding of a plain log-sum-exp, 1e-6 nats, no longer matters


class NumericalError(ArithmeticError):
    """NaN, infinity, a Fisher matrix that is zero, or an eigensolver that failed: there is no result.

    `layer` and `prompt` are the indices in the point of the first layer, and of the first prompt or row, where it
    appeared; None if no layer is at fault, or for one prompt.
    """

    def __init__(self, message: str, layer: int | None = None, prompt: int | None = None):
        super().__init__(message)
        self.layer, self.prompt = layer, prompt


# --- 1. the model, linearised at a prompt's last token --------------------------------------------


class Point:
    """Where the model is linearised: what was read at the last token of each prompt, and the graph from h to x."""

    def __init__(
        self, model: nn.Module, streams: list[Tensor], biases: list[Tensor], captured, logits: Tensor, tokens: int = 1
    ):
        logits = logits.to(captured.raw_logits.device)  # a model that is spread over devices returns them on the first
        self.model = model
        # (layers, ..., d) float32, the residual stream h leaving each hooked module
        self.activations = torch.stack([h.float().to(logits.device) for h in streams])
        self.biases = biases  # one leaf (..., d) for each layer, added to h; gradients are taken at it
        self.tokens = tokens  # that a backward pass runs through for each row
        self.x = (
            captured.x
        )  # (prompts, n, d_head), n = 1 but for answers, the head's input: the final normalised hidden state
        self.head = model.get_output_embeddings()  # x -> raw_logits
        self.raw_logits = captured.raw_logits  # (prompts, n, V)
        self.logits = logits  # (..., V) float32, after the scaling or soft-capping that follows the head
        self.log_probs = logits.detach().log_softmax(-1)  # (..., V) float32, nats
        _require_finite(self.activations, "activations", places=self.activations.ndim - 1)
        _require_finite(logits.detach()[None], "logits", places=self.activations.ndim - 1)

    def output_head(self) -> OutputHead:
        """Raises UnsupportedModelError: the head is not linear."""
        return OutputHead(self.head, self.x, self.raw_logits, self.logits, self.log_probs)

    def cotangents(self, tokens: Tensor) -> Tensor:
        """z (..., k, d_head) float32: the gradients at x of the log-probabilities of `tokens` (..., k).

        A linear head takes a gather and one matrix-vector product; another one, k backward passes.
        """
        if is_linear(self.head):
            return self.output_head().cotangents(tokens)
        return cotangents_through(self.model, self.x, self.logits, tokens)


class PromptPoint(Point):
    """The last token of one prompt, which can be perturbed; "..." is nothing."""

    def __init__(self, *linearised, layers: dict[int, nn.Module], reading: Reading):
        super().__init__(*linearised)
        self.layers, self.modules = list(layers), list(layers.values())  # numbers and modules of the hooked layers
        self.reading = reading  # for the passes that perturb it


@torch.inference_mode(False)
def linearize(
    model: nn.Module, ids: Sequence[int] | Tensor | Mapping, layers: int | Sequence[int] | None = None
) -> PromptPoint:
    """Runs a prompt's last token with a zero bias added to the residual stream of every layer in `layers`.

    The biases change nothing. One backward pass from x returns the gradients at all layers, at the cost of the
    deepest one. The earlier tokens are run once, without gradients, into a cache. If the model's memory is more than
    keys and values, every pass runs the whole prompt instead (see `model/reading.py`).

    Args:
        ids: (tokens,) or (1, tokens) int64, or what a tokenizer returns of one prompt.
        layers: the number of a decoder layer, or several, ascending; all by default.
    Raises:
        ValueError: `ids` is empty, a text or a batch; `layers` are not ascending numbers of the model's layers; or the
            model is in training mode.
        UnsupportedModelError: the model cannot be read rightly.
    """
    ids, wrapped, model = _one_prompt(ids), model, unwrapped(model)
    chosen = _numbered_layers(model, layers)
    reading = read(model, ids, choose_mode(wrapped, ids))
    biases, streams, hooks = _zero_biases(chosen.values(), lambda h: h[0, -1], add_at)  # (d,) for each layer
    with torch.enable_grad(), hooked(*hooks), capture_head(model) as head:
        logits = reading.logits()[0]  # (V,)
    if not logits.requires_grad:
        raise UnsupportedModelError("no gradient leads from its layers to its prediction (is it quantised?)")
    if len(biases) != len(chosen):
        raise UnsupportedModelError(
            f"some of its layers {list(chosen)} do not run, or not once, in a pass: choose others"
        )
    return PromptPoint(model, streams, biases, head, logits, layers=chosen, reading=reading)


def _one_prompt(ids: Sequence[int] | Tensor | Mapping) -> Tensor:
    """(tokens,) int64 on the CPU."""
    ids = ids["input_ids"] if isinstance(ids, Mapping) else ids
    if isinstance(ids, str):
        raise ValueError("token ids are wanted, not a text: tokenizer(text)")
    ids = torch.as_tensor(ids).cpu().clone()  # usable outside of inference mode
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"the token ids of one prompt are wanted, not a tensor of shape {tuple(ids.shape)}")
    return ids


def _numbered_layers(model: nn.Module, layers: int | Sequence[int] | None) -> dict[int, nn.Module]:
    if model.training:
        raise ValueError("the model is in training mode, where dropout is random: model.eval() first")
    found = dict(enumerate(decoder_layers(model).values()))
    layers = [layers] if isinstance(layers, int) else list(found if layers is None else layers)
    if not layers or layers != sorted(set(layers) & set(found)):
        raise ValueError(f"layers {layers} are not ascending numbers from 0 to {len(found) - 1}")
    return {number: found[number] for number in layers}


def _zero_biases(modules: Iterable[nn.Module], at_last: Callable, add: Callable) -> tuple[list, list, list]:
    """(biases, streams, hooks): hooks that put add(h, bias) in the place of the stream h leaving each module.

    The streams are at_last(h), of the shape of a bias. Both lists are filled in the order of the pass.
    """
    biases, streams = [], []

    def edit(h: Tensor) -> Tensor:
        streams.append(at_last(h).detach())
        biases.append(torch.zeros_like(streams[-1], requires_grad=True))
        return add(h, biases[-1])

    return biases, streams, [edit_stream(module, edit) for module in modules]


def linearize_perturbed(point: PromptPoint, deltas: Tensor, at: int | Tensor) -> Point:
    """Linearises the model at h + delta; the arguments and errors are those of `perturb`.

    The result's "layers" axis has length one, and its "..." are the rows: G is (1, rows, k, d).
    """
    at = _places(point, at, len(deltas))
    leaf = deltas.detach().float().clone().requires_grad_()
    with capture_head(point.model, lambda x: x[-len(deltas) :]) as head:  # the rows before these are unperturbed
        logits = perturb(point, leaf, torch.tensor(point.layers)[at])  # (rows, V)
    streams = point.activations[at] + deltas.to(point.activations)  # (rows, d)
    return Point(point.model, [streams], [leaf], head, logits)


def linearize_each(
    model: nn.Module, ids: Sequence[int] | Tensor, layers: Sequence[int] | None = None, block: int = 64
) -> Iterator[Point]:
    """`linearize` at every token of a text, block by block: token n of it is `linearize(ids[: n + 1])`.

    "..." is (tokens,), those of a block. A block takes one pass, whose graph leads from each token's biases to its own
    prediction alone (see `model/each_token.py`). So the text takes as many backward rows as a single token. In the
    middle of the first and of the last block, a token is compared with what `linearize` gives. If they differ, or the
    model's memory is more than keys and values, UnsupportedModelError says so: call `linearize` for each token then.

    Args:
        ids, layers: see `linearize`; the errors are the same.
        block: tokens that are linearised at once.
    Yields:
        The points of consecutive blocks.
    """
    ids, wrapped, model = _one_prompt(ids), model, unwrapped(model)
    chosen = _numbered_layers(model, layers)
    if choose_mode(wrapped, ids) is not PrefixMode.SHARED:
        raise UnsupportedModelError(f"prompts are read by {choose_mode(wrapped, ids).value}")
    if len(ids) > rotation_change(model):
        raise UnsupportedModelError("positions are rotated otherwise from some token on")
    text, start = EachToken(model), 0
    for part in ids.split(block):
        biases, streams, hooks = _zero_biases(chosen.values(), lambda h: h[0], torch.add)  # (tokens, d) for each layer
        with torch.enable_grad(), hooked(*hooks), capture_head(model) as head:
            logits = text.logits(part)  # (tokens, V)
        point = Point(model, streams, biases, head, logits)
        if start == 0 or start + len(part) == len(ids):
            middle = len(part) // 2
            _require_alike(point, middle, linearize(wrapped, ids[: start + middle + 1], list(chosen)))
        yield point
        start += len(part)


def _require_alike(point: Point, token: int, alone: PromptPoint) -> None:
    """Raises UnsupportedModelError if a token of a block has another prediction, or gradient, than it has alone."""
    row = torch.randn(1, point.x.shape[-1], generator=torch.Generator().manual_seed(0)).to(alone.log_probs)
    found = pull_back(point, row.expand(len(point.log_probs), 1, -1))[:, token, 0]
    expected = pull_back(alone, row)[:, 0]  # (layers, d)
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
    kl = largest_kl(alone.log_probs[None], point.log_probs[token][None])
    if not (error <= GRADIENT_ROUNDING[point.x.dtype] and kl <= ROUNDING_NATS[point.x.dtype]):
        raise UnsupportedModelError(f"in a text, a token's gradients differ by {error:.1g} from those it has alone")


def linearize_prompts(
    model: nn.Module, module: nn.Module, ids: Tensor, lengths: Tensor, last_only: bool = False, predicted: int = 1
) -> Point:
    """Runs prompts, each with a zero bias of its own added to the output of `module` at every one of its tokens.

    The prompts are padded on the right. Causal attention hides that padding from all real tokens, so no mask is
    needed. Each prompt's last token is picked by its length before the head.

    With `last_only` the bias is added at each prompt's last token alone. The tokens before it are run once, without
    gradients, into a cache; or with it, where the model cannot be read in this way (`reading.share_prefixes`).

    With `predicted` n > 1 answers follow the prompts, of which the point has the first n tokens' distributions: x is
    (prompts, n, d_head), logits and log_probs are (prompts, n, V). No bias is added at the answers' tokens.

    Args:
        module: any module whose output is (prompts, tokens, d), or a tuple that begins with it.
        ids: (prompts, tokens) int64, padded with any token: the prompts, and the first n - 1 tokens of the answers.
        lengths: (prompts,) int64, the tokens of each prompt.
    Raises:
        UnsupportedModelError: the module's output has another shape or does not lead to the predictions.
    """
    wrapped, model, lengths = model, unwrapped(model), lengths.cpu()
    require_fixed_rotation(model, ids)
    prompts, last = torch.arange(len(ids)), lengths - 1
    places = (last[:, None] + torch.arange(predicted)).clamp(max=ids.shape[1] - 1)  # (prompts, n)
    memory, kind = {}, nullcontext()
    if last_only and share_prefixes(wrapped, ids, lengths, predicted - 1):
        memory, kind = prefix_memory(model, ids, lengths, predicted), attention(model, LAST_TOKEN_ATTENTION)
        ids, last, places = ids.gather(1, places), torch.zeros_like(last), torch.arange(predicted).expand_as(places)

    def at_last(h: Tensor) -> Tensor:
        if not isinstance(h, Tensor) or h.ndim != 3 or h.shape[:2] != ids.shape or not h.is_floating_point():
            raise UnsupportedModelError("its output is not of shape (prompts, tokens, d)")
        return h[prompts, last]

    def add(h: Tensor, bias: Tensor) -> Tensor:
        if predicted == 1 and not last_only:
            return h + bias[:, None]
        tokens = torch.arange(ids.shape[1])
        here = tokens == last[:, None] if last_only else tokens <= last[:, None]  # (prompts, tokens)
        return h + here[..., None].to(h) * bias[:, None]

    biases, streams, hooks = _zero_biases([module], at_last, add)  # (prompts, d) of the one module
    with torch.enable_grad(), kind, hooked(*hooks), capture_head(model) as head:
        logits = logits_at(model, ids, places, **memory)  # (prompts, n, V)
    if len(biases) != 1 or not head.x.requires_grad:
        raise UnsupportedModelError("it does not stand, once, between the prompt and the output head")
    logits = logits.float() if predicted > 1 else logits[:, 0].float()
    return Point(model, streams, biases, head, logits, ids.numel())


def _require_finite(values: Tensor, what: str, places: int) -> None:
    """Raises NumericalError if `values` are not finite. Their first `places` axes are layers and prompts."""
    finite = values.flatten(places).isfinite().all(dim=-1)
    if not finite.all():
        layer, *prompt = (~finite).nonzero()[0].tolist()
        layer = None if what == "logits" else layer
        raise NumericalError(f"the {what} hold NaN or infinity", layer, *prompt)


# --- 2, 3. J = dx/dh: cotangents pulled back, directions pushed forward ---------------------------


def pull_back(point: Point, rows: Tensor, chunks: Chunks | None = None) -> Tensor:
    """G (layers, ..., k, d) float32: row i at a layer is J^T z_i, of `rows` z (..., k, d_head) float32.

    Each chunk of rows is one batched backward pass. For the cotangents of tokens, row t is grad_h log p_t. In half
    precision an orthonormal basis of the rows is pulled back in their place.
    """
    mix = None
    if point.x.dtype.itemsize < 4 and rows.shape[-2] < rows.shape[-1]:
        # Of a nearly certain prediction, the cotangents cancel: sum_t p_t z_t is almost 0, and the smallest eigenvalue
        # of F is what is left of it. If each row were rounded by itself, its rounding would be larger than that.
        rows, mix = (part.mT.to(rows) for part in torch.linalg.qr(float64(rows).mT))  # (..., k, d_head), (..., k, k)
    # Rows go through the network at unit norm, so that float16 gradients do not underflow.
    norms = rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)  # (..., k, 1)

    def chunk(rows: Tensor, norms: Tensor) -> Tensor:  # (layers, rows, ..., d)
        unit = (rows / norms).to(point.x).reshape(-1, *point.x.shape)  # (rows, prompts, 1, d_head)
        grads = batched_gradients(point.model, [point.x], point.biases, [unit])
        return torch.stack([norms * g.to(norms) for g in grads])

    by_row = (rows.movedim(-2, 0), norms.movedim(-2, 0))
    gradients = (chunks or Chunks()).join(chunk, *by_row, dim=1).movedim(1, -2)
    gradients = gradients if mix is None else mix @ gradients
    _require_finite(gradients, "gradients", places=gradients.ndim - 2)
    return gradients


class PushForward:
    """u -> J u, by differentiating the backward pass: J^T z is linear in z, and its gradient in z along u is J u.

    (J. Townsend, "A new trick for calculating Jacobian vector products", 2017.) The backward pass has to be
    differentiable itself, which that of fused attention is not; otherwise a call raises UnsupportedModelError.
    """

    def __init__(self, point: Point):
        self.model = point.model
        self.at_x = torch.zeros_like(point.x, requires_grad=True)
        with torch.enable_grad():
            self.at_biases = torch.autograd.grad(point.x, point.biases, self.at_x, create_graph=True)

    def __call__(self, tangents: Tensor, chunks: Chunks | None = None) -> Tensor:
        """J u (layers, ..., m, d_head) float32 for u (layers, ..., m, d), each through its own layer alone."""
        layers, m = len(tangents), tangents.shape[-2]
        by_row = tangents.movedim(-2, 1).flatten(0, 1)  # (layers * m, ..., d)
        own = torch.arange(layers, device=tangents.device).repeat_interleave(m)

        def chunk(u: Tensor, own: Tensor) -> Tensor:  # (rows, prompts, 1, d_head)
            own = own.reshape(-1, *(1 for _ in u.shape[1:]))
            seeds = [torch.where(own == layer, u, 0).to(g) for layer, g in enumerate(self.at_biases)]
            try:
                return batched_gradients(self.model, self.at_biases, [self.at_x], seeds)[0]
            except RuntimeError as error:
                if "derivative for" not in str(error) or "not implemented" not in str(error):
                    raise
                raise UnsupportedModelError("torch cannot differentiate its backward pass, as this needs") from error

        pushed = (chunks or Chunks()).join(chunk, by_row, own).to(tangents)
        pushed = pushed.reshape(layers, m, *tangents.shape[1:-2], -1).movedim(1, -2)
        _require_finite(pushed, "derivatives", places=pushed.ndim - 2)
        return pushed


# --- 4. F and its eigenpairs ----------------------------------------------------------------------


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


def most_probable(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of logits or log-probabilities (..., V) in descending order, and their tokens; both (..., k).

    Of equal ones, which half precision often has, the lower token comes first. `topk` orders them as it likes.
    """
    values, tokens = logits.topk(min(k + 1, logits.shape[-1]))  # one more: it may equal the last
    tied = (values[..., 1:] == values[..., :-1]).any(-1)
    if tied.any():
        ordered = logits[tied].sort(descending=True, stable=True)
        values[tied], tokens[tied] = (part[..., : values.shape[-1]] for part in ordered)
    return values[..., :k], tokens[..., :k]


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


# --- 5. perturbing the residual stream ------------------------------------------------------------


def perturb(point: PromptPoint, deltas: Tensor, at: int | Tensor) -> Tensor:
    """Next-token logits (rows, V) float32 after h + delta. All rows run in one batched pass.

    Args:
        deltas: (rows, d) float32, added to the residual stream at the prompt's last token. The logits have a graph if
            these require gradients.
        at: number of the layer where they are added, one of `point.layers`: one for all rows, or (rows,) int64,
            ascending.
    Raises:
        ValueError: `at` is not ascending, or not of the point's layers; or the point is of a batch.
    """
    at = _places(point, at, len(deltas))
    with torch.set_grad_enabled(deltas.requires_grad):
        return point.reading.perturbed_logits(point.modules, deltas, at).to(point.log_probs.device)


def _places(point: PromptPoint, at: int | Tensor, rows: int) -> Tensor:
    """(rows,) int64: where in `point.layers` a layer's number stands."""
    if not isinstance(point, PromptPoint):
        raise ValueError("only the point of one prompt, from `linearize`, can be perturbed")
    numbers = torch.as_tensor(at).cpu().expand(rows).tolist()
    if unknown := set(numbers) - set(point.layers):
        raise ValueError(f"the point has no layer {min(unknown)}: its layers are {point.layers}")
    return torch.tensor([point.layers.index(number) for number in numbers])


def kl_divergence(log_p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) in nats (rows,) of p = exp(log_p) (V,) and q = softmax(logits) (rows, V).

    With u = logits - log_p, KL = log E_p[exp(u)] - E_p[u], whatever constant is added to u. With u shifted to
    E_p[u] = 0, and with expm1 and log1p, only terms of second order in u remain. So 1e-10 nats is right in float32,
    where the sum of p (log p - log q) is noise below 1e-7. Large KL, whose exp(u) would overflow, needs none of this.
    """
    p = log_p.exp()
    u = logits - log_p
    mean = u @ p
    far = logits.logsumexp(-1) - mean
    u -= mean[..., None]
    left = u @ p  # what rounding left of the mean
    near = torch.log1p(u.clamp_(max=80).expm1_() @ p) - left
    return torch.where(far > LARGE_KL, far, near.clamp(min=0))


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
    shares: TokenShares  # (tokens, layers, n) each: the tokens that v moves most, and the log p that they gain along it
    top_log_probs: Tensor  # (tokens, 5) float32: of the most probable next tokens
    top_ids: Tensor  # (tokens, 5) int64


def map_text(
    model: nn.Module,
    tokenizer,
    text: str,
    layers: Sequence[int] | None = None,
    k: int | str = 50,
    chunks: Chunks | None = None,
) -> TextMap:
    """F of the next-token distribution at every token of a text and every layer, and its largest eigenpair.

    It takes k backward rows of the text (see `linearize_each`); or k of each token, one token after the other, if the
    model's memory is more than keys and values: the same numbers, much slower. Whole prompts of growing length, as
    `linearize_prompts` would run them, cost the square of the tokens.

    Args:
        layers: numbers of decoder layers, ascending; all by default.
        k: the most probable tokens that F counts, or "all".
        chunks: of gradients of one block, in rows of all its tokens.
    Raises:
        ValueError: the text has no tokens, or `layers` are not ascending numbers of the model's layers.
        UnsupportedModelError: the model cannot be read rightly.
    """
    ids = torch.tensor(tokenizer(text).input_ids, dtype=torch.int64)
    inner = unwrapped(model)
    numbers = list(_numbered_layers(inner, layers))
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


def stream_jacobians(model: nn.Module, ids: Sequence[int] | Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """J (layers, d, d) float32 at a prompt's last token: of the last layer's stream, by the stream leaving each layer.

    It takes d backward rows. The mean over prompts is a Jacobian lens (`model/lens.py`). The arguments and errors are
    those of `linearize`.
    """
    ids, wrapped, model = _one_prompt(ids), model, unwrapped(model)
    *_, last = decoder_layers(model).values()
    reading, final = read(model, ids, choose_mode(wrapped, ids)), []
    biases, _, hooks = _zero_biases(_numbered_layers(model, layers).values(), lambda h: h[0, -1], add_at)
    with torch.enable_grad(), hooked(*hooks, edit_stream(last, lambda h: final.append(h[0, -1]) or h)):
        reading.logits()
    identity = torch.eye(len(final[0]), dtype=final[0].dtype, device=final[0].device)

    def chunk(rows: Tensor) -> Tensor:  # (layers, rows, d)
        return torch.stack([g.float() for g in batched_gradients(model, final, biases, [rows])])

    jacobians = Chunks().join(chunk, identity, dim=1)
    _require_finite(jacobians, "derivatives", places=1)
    return jacobians


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
                *(by_token(part) for part in (eigen.vectors, point.activations, *shares[:3])),
                found.weights.sum(-1).reshape(-1),
                -log_p.gather(1, next_ids[:, None])[:, 0],
                *most_probable(log_p, PREDICTED),
            ]
        )
    columns = [torch.cat(parts).cpu() for parts in zip(*blocks, strict=True)]
    values, trace, rank, vectors, activations, *shares, mass, surprisal, top_log_probs, top_ids = columns
    surprisal = surprisal.roll(1)
    surprisal[0] = math.nan
    shares = TokenShares(*shares)
    return [values, vectors, trace, rank, mass, surprisal, activations, shares, top_log_probs, top_ids]


# --- does F predict what a small perturbation does? -----------------------------------------------

# The predicted nats of each perturbation (the next term of KL may be too large for the first, not for the last), the
# nats that rounding hides, and the largest ratio allowed between the changes and their prediction.
FULL_PRECISION = (1e-4, 1e-6, 1e-7), 1e-8, 1.2
DOUBLE_PRECISION = (1e-4, 1e-6, 1e-8, 1e-10), 1e-11, 1.2  # logits are float32 in the end
# A logit of 20 is rounded to 0.06, and 0.1 nats change logits by about 0.4. A token may also switch experts.
HALF_PRECISION = (0.1, 0.03), 0.02, 2.0
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
