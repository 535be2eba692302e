"""Points, where a model is linearised: a zero bias added to the residual stream h, and the graph from it to the head.

`linearize` and its kin make them. `pull_back` gives gradients at the biases; `PushForward` what a change of h does at
the head's input x, and `perturb` to the predictions; `carry` what h itself is in the last layer's stream.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from residual_fisher.model.each_token import EachToken
from residual_fisher.model.eigen import float64
from residual_fisher.model.head import OutputHead, cotangents_through, is_linear
from residual_fisher.model.last_token import LAST_TOKEN_ATTENTION, prefill_prompts, prefix_memory
from residual_fisher.model.loading import (
    decoder_layers,
    require_fixed_rotation,
    rotation_change,
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
)
from residual_fisher.model.reading import PrefixMode, Reading, choose_mode, read, share_prefixes

# Largest relative error of a gradient that is rounding, by dtype: sums in another order, through all layers.
GRADIENT_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}


class NumericalError(ArithmeticError):
    """NaN, infinity, a Fisher matrix that is zero, or an eigensolver that failed: there is no result.

    `layer` and `prompt` are the indices in the point of the first layer, and of the first prompt or row, where it
    appeared; None if no layer is at fault, or for one prompt.
    """

    def __init__(self, message: str, layer: int | None = None, prompt: int | None = None):
        super().__init__(message)
        self.layer, self.prompt = layer, prompt


class Point:
    """Where the model is linearised: what was read at the last token of each prompt, and the graph from h to x."""

    def __init__(
        self,
        model: nn.Module,
        streams: list[Tensor],
        biases: list[Tensor],
        captured,
        logits: Tensor,
        tokens: int = 1,
        final: Tensor | None = None,
    ):
        logits = logits.to(captured.raw_logits.device)  # a model that is spread over devices returns them on the first
        self.model = model
        # (layers, ..., d) float32, the residual stream h leaving each hooked module
        self.activations = torch.stack([h.float().to(logits.device) for h in streams])
        self.biases = biases  # one leaf (..., d) for each layer, added to h; gradients are taken at it
        self.tokens = tokens  # that a backward pass runs through for each row
        self.final = final  # (..., d), the stream that leaves the last layer, for `carry`; None if it is not known
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

    def __init__(self, *linearised, layers: dict[int, nn.Module], reading: Reading, final: Tensor | None):
        super().__init__(*linearised, final=final)
        self.layers, self.modules = list(layers), list(layers.values())  # numbers and modules of the hooked layers
        self.reading = reading  # for the passes that perturb it


def _require_finite(values: Tensor, what: str, places: int) -> None:
    """Raises NumericalError if `values` are not finite. Their first `places` axes are layers and prompts."""
    finite = values.flatten(places).isfinite().all(dim=-1)
    if not finite.all():
        layer, *prompt = (~finite).nonzero()[0].tolist()
        layer = None if what == "logits" else layer
        raise NumericalError(f"the {what} hold NaN or infinity", layer, *prompt)


# --- one prompt, all tokens of a text, a batch of prompts -----------------------------------------


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
    ids, wrapped, model = one_prompt(ids), model, unwrapped(model)
    chosen = numbered_layers(model, layers)
    reading = read(model, ids, choose_mode(wrapped, ids))
    biases, streams, hooks = _zero_biases(chosen.values(), lambda h: h[0, -1], add_at)  # (d,) for each layer
    final, keep = _last_stream(model, lambda h: h[0, -1])  # after the biases: it has that of the last layer
    with torch.enable_grad(), hooked(*hooks, keep), capture_head(model) as head:
        logits = reading.logits()[0]  # (V,)
    if not logits.requires_grad:
        raise UnsupportedModelError("no gradient leads from its layers to its prediction (is it quantised?)")
    if len(biases) != len(chosen):
        raise UnsupportedModelError(
            f"some of its layers {list(chosen)} do not run, or not once, in a pass: choose others"
        )
    final = final[-1] if final else None
    return PromptPoint(model, streams, biases, head, logits, layers=chosen, reading=reading, final=final)


def one_prompt(ids: Sequence[int] | Tensor | Mapping) -> Tensor:
    """(tokens,) int64 on the CPU."""
    ids = ids["input_ids"] if isinstance(ids, Mapping) else ids
    if isinstance(ids, str):
        raise ValueError("token ids are wanted, not a text: tokenizer(text)")
    ids = torch.as_tensor(ids).cpu().clone()  # usable outside of inference mode
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"the token ids of one prompt are wanted, not a tensor of shape {tuple(ids.shape)}")
    return ids


def numbered_layers(model: nn.Module, layers: int | Sequence[int] | None) -> dict[int, nn.Module]:
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


def _last_stream(model: nn.Module, pick: Callable) -> tuple[list, tuple]:
    """(streams, hook): pick(h) of the stream h that leaves the last layer is added to the list in each pass."""
    streams = []
    *_, last = decoder_layers(model).values()
    return streams, edit_stream(last, lambda h: streams.append(pick(h)) or h)


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
    ids, wrapped, model = one_prompt(ids), model, unwrapped(model)
    chosen = numbered_layers(model, layers)
    if choose_mode(wrapped, ids) is not PrefixMode.SHARED:
        raise UnsupportedModelError(f"prompts are read by {choose_mode(wrapped, ids).value}")
    if len(ids) > rotation_change(model):
        raise UnsupportedModelError("positions are rotated otherwise from some token on")
    text, start = EachToken(model), 0
    for part in ids.split(block):
        biases, streams, hooks = _zero_biases(chosen.values(), lambda h: h[0], torch.add)  # (tokens, d) for each layer
        final, keep = _last_stream(model, lambda h: h[0])
        with torch.enable_grad(), hooked(*hooks, keep), capture_head(model) as head:
            logits = text.logits(part)  # (tokens, V)
        point = Point(model, streams, biases, head, logits, final=final[-1] if final else None)
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
    model: nn.Module,
    module: nn.Module,
    ids: Tensor,
    lengths: Tensor,
    last_only: bool = False,
    predicted: int = 1,
    prefix: DynamicCache | None = None,
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
        prefix: what `prefill_prompts` gives of them, if that has been run for something else.
    Raises:
        UnsupportedModelError: the module's output has another shape or does not lead to the predictions.
    """
    wrapped, model, lengths = model, unwrapped(model), lengths.cpu()
    require_fixed_rotation(model, ids)
    prompts, last = torch.arange(len(ids)), lengths - 1
    places = (last[:, None] + torch.arange(predicted)).clamp(max=ids.shape[1] - 1)  # (prompts, n)
    memory, kind = {}, nullcontext()
    if last_only and share_prefixes(wrapped, ids, lengths, predicted - 1):
        prefix = prefill_prompts(model, ids, lengths) if prefix is None else prefix
        memory, kind = prefix_memory(model, prefix, lengths, predicted), attention(model, LAST_TOKEN_ATTENTION)
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


# --- J = dx/dh: cotangents pulled back, directions pushed forward ---------------------------------


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
        self.at_x, self.at_biases = _backward_pass(point.x, point.biases)

    def __call__(self, tangents: Tensor, chunks: Chunks | None = None) -> Tensor:
        """J u (layers, ..., m, d_head) float32 for u (layers, ..., m, d), each through its own layer alone."""
        layers, m = len(tangents), tangents.shape[-2]
        by_row = tangents.movedim(-2, 1).flatten(0, 1)  # (layers * m, ..., d)
        own = torch.arange(layers, device=tangents.device).repeat_interleave(m)

        def chunk(u: Tensor, own: Tensor) -> Tensor:  # (rows, prompts, 1, d_head)
            own = own.reshape(-1, *(1 for _ in u.shape[1:]))
            seeds = [torch.where(own == layer, u, 0).to(g) for layer, g in enumerate(self.at_biases)]
            with _through_backward():
                return batched_gradients(self.model, self.at_biases, [self.at_x], seeds)[0]

        pushed = (chunks or Chunks()).join(chunk, by_row, own).to(tangents)
        pushed = pushed.reshape(layers, m, *tangents.shape[1:-2], -1).movedim(1, -2)
        _require_finite(pushed, "derivatives", places=pushed.ndim - 2)
        return pushed


def _backward_pass(output: Tensor, biases: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A cotangent z at an output, which is zero, and J^T z at each bias, with a graph that is linear in z."""
    z = torch.zeros_like(output, requires_grad=True)
    with torch.enable_grad():
        return z, torch.autograd.grad(output, biases, z, create_graph=True)


@contextmanager
def _through_backward() -> Iterator[None]:
    """Raises UnsupportedModelError where a backward pass cannot be differentiated."""
    try:
        yield
    except RuntimeError as error:
        if "derivative for" not in str(error) or "not implemented" not in str(error):
            raise
        raise UnsupportedModelError("torch cannot differentiate its backward pass, as this needs") from error


def carry(point: Point) -> Tensor:
    """J h (layers, ..., d) float32: the streams h of a prompt, or of each token of a text, carried to the last layer.

    J is the Jacobian of the last layer's stream by this layer's, at this very point; at the last layer it is 1. A layer
    takes one product, found as in `PushForward`, which runs through the layers above it alone.

    Raises:
        UnsupportedModelError: the point is not of `linearize` or `linearize_each`; see also `PushForward`.
    """
    with _through_backward():
        z, at_biases = _backward_pass(_final_stream(point), point.biases)
        products = [
            torch.autograd.grad(at_bias, z, h.to(at_bias), retain_graph=True)[0]
            for at_bias, h in zip(at_biases, point.activations, strict=True)
        ]
    carried = torch.stack([product.to(point.activations) for product in products])
    _require_finite(carried, "derivatives", places=carried.ndim - 1)
    _require_transposed(point, carried[0])
    return carried


def _final_stream(point: Point) -> Tensor:
    """(..., d), of the last layer. Raises UnsupportedModelError: it is not known."""
    if point.final is None:
        raise UnsupportedModelError("the stream of its last layer is not known at this point")
    return point.final


def _require_transposed(point: Point, carried: Tensor) -> None:
    """Raises UnsupportedModelError unless h^T (J^T z) is |J h| for z along J h (..., d), at the first layer.

    A kernel of a model's own may leave the graph of its backward pass. Then J h lacks what it does, without an error.
    """
    length = carried.norm(dim=-1)
    z = (carried / length[..., None]).to(point.final)  # of unit length: float16 overflows
    (back,) = torch.autograd.grad(point.final, point.biases[:1], z, retain_graph=True)
    error = ((back.to(carried) * point.activations[0]).sum(-1) / length - 1).abs().max()
    if not error <= GRADIENT_ROUNDING[point.x.dtype]:
        raise UnsupportedModelError(f"its derivatives forward and backward differ by {error:.1g}")


def stream_jacobians(model: nn.Module, ids: Sequence[int] | Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """J (layers, d, d) float32 at a prompt's last token: of the last layer's stream, by the stream leaving each layer.

    It takes d backward rows. The mean over prompts is a Jacobian lens (`model/lens.py`). The arguments and errors are
    those of `linearize`.
    """
    point = linearize(model, ids, layers)
    model, final = point.model, [_final_stream(point)]
    identity = torch.eye(len(final[0]), dtype=final[0].dtype, device=final[0].device)

    def chunk(rows: Tensor) -> Tensor:  # (layers, rows, d)
        return torch.stack([g.float() for g in batched_gradients(model, final, point.biases, [rows])])

    jacobians = Chunks().join(chunk, identity, dim=1)
    _require_finite(jacobians, "derivatives", places=1)
    return jacobians


# --- perturbations --------------------------------------------------------------------------------


def perturb(point: PromptPoint, deltas: Tensor, at: int | Tensor) -> Tensor:
    """Next-token logits (rows, V) float32 after h + delta. All rows run in one batched pass.

    Args:
        deltas: (rows, d) float32, added to the residual stream at the prompt's last token. The logits have a graph if
            these require gradients.
        at: number of the layer where they are added, one of `point.layers`: one for all rows, or (rows,) int64,
            ascending.
    Raises:
        ValueError: `deltas` are not rows of the stream's width; `at` is not ascending, or not of the point's layers; or
            the point is of a batch.
    """
    at = _places(point, at, deltas)
    with torch.set_grad_enabled(deltas.requires_grad):
        return point.reading.perturbed_logits(point.modules, deltas, at).to(point.log_probs.device)


def _places(point: PromptPoint, at: int | Tensor, deltas: Tensor) -> Tensor:
    """(rows,) int64: where in `point.layers` the number of each row's layer stands."""
    if not isinstance(point, PromptPoint):
        raise ValueError("only the point of one prompt, from `linearize`, can be perturbed")
    width = point.activations.shape[-1]
    if deltas.ndim != 2 or deltas.shape[-1] != width:
        raise ValueError(f"deltas are {tuple(deltas.shape)}, not (rows, {width}): of one direction give delta[None]")
    numbers = torch.as_tensor(at).cpu().expand(len(deltas)).tolist()
    if unknown := set(numbers) - set(point.layers):
        raise ValueError(f"the point has no layer {min(unknown)}: its layers are {point.layers}")
    return torch.tensor([point.layers.index(number) for number in numbers])


def linearize_perturbed(point: PromptPoint, deltas: Tensor, at: int | Tensor) -> Point:
    """Linearises the model at h + delta; the arguments and errors are those of `perturb`.

    The result's "layers" axis has length one, and its "..." are the rows: G is (1, rows, k, d).
    """
    at = _places(point, at, deltas)
    leaf = deltas.detach().float().clone().requires_grad_()
    with capture_head(point.model, lambda x: x[-len(deltas) :]) as head:  # the rows before these are unperturbed
        logits = perturb(point, leaf, torch.tensor(point.layers)[at])  # (rows, V)
    streams = point.activations[at] + deltas.to(point.activations)  # (rows, d)
    return Point(point.model, [streams], [leaf], head, logits)
