"""One sentence at all layers: the Fisher matrix, its top eigenvector, every perturbation, and what each costs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
import time
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import fisher
from residual_fisher.experiment.continuation import Continuations, choose_scales, continuations
from residual_fisher.experiment.lens_audit import LensErrors, audit, lens_for
from residual_fisher.experiment.perturbation import TrustRadii, step_lengths, trust_radii_along
from residual_fisher.experiment.sentences import Context
from residual_fisher.experiment.settings import Settings
from residual_fisher.model.loading import decoder_layers
from residual_fisher.model.passes import ways_of
from residual_fisher.model.predictions import Sweep, sweep
from residual_fisher.model.reading import PrefixMode
from residual_fisher.model.steering import STEERING_TOKENS, Steered, steer_along
from residual_fisher.model.words import TokenShares, token_shares

SPECTRUM = 10  # leading eigenvalues recorded per sentence and layer
TOP = 5  # most probable tokens recorded for every perturbation
FELT_KL = 0.05  # nats: below it a perturbation has hardly moved a prediction


class Perturbed(NamedTuple):
    """What the perturbations of one unit did, at all layers. Directions: the Fisher eigenvector, then the controls."""

    steps: Tensor  # (layers, scales without 0): signed lengths
    predicted_kl: Tensor  # (layers, directions, scales without 0), nats
    sweep: Sweep  # of the same shape

    @property
    def too_short(self) -> bool:
        """Whether at any layer no step along the eigenvector is predicted to move the prediction."""
        return bool((self.predicted_kl[:, 0].amax(-1) < FELT_KL).any())


@dataclass
class Measured:
    """What one sentence gave, at all layers."""

    context: Context
    point: fisher.Point
    controls: list[str]  # names of the directions after the eigenvector
    mass: float  # probability that the top-k tokens hold
    eigen: fisher.Eigenpairs
    shares: TokenShares  # of the leading eigenvalues, (layers, m, tokens)
    exact: fisher.Eigenpairs | None  # of the whole vocabulary, if a comparison was asked for
    perturbed: Perturbed
    in_nats: Perturbed | None  # at the same scales, if the steps in `perturbed` are too short
    trust_radii: TrustRadii | None = None  # this and what follows: if asked for
    lens: LensErrors | None = None
    continuations: Continuations | None = None
    steered: Steered | None = None
    said_steered: Continuations | None = None  # after the perturbations of `steered`, one direction; goals are scales

    @property
    def far_enough(self) -> Perturbed:
        """The perturbations after which the text is continued: those in nats where the others are too short."""
        return self.in_nats or self.perturbed


class Clock:
    """Seconds by stage, since they were taken last."""

    def __init__(self, devices: Iterable[torch.device] = ()):
        self.seconds, self.devices = {}, devices  # the devices that the stages run on

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        for device in self.devices:
            if device.type == "cuda":  # kernels run on after the call that asked for them
                torch.cuda.synchronize(device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


class Batches:
    """How many rows go through the model in one pass. What running out of memory halves stays so for all sentences."""

    def __init__(self, size: int, layers: int = 1):
        self._modes, self._checked = set(), False  # ways of reading seen so far
        self.gradients = fisher.Chunks(4 * size)  # more of them: they carry no vocabulary along
        self.perturbations = fisher.Chunks(size)
        self.steering = fisher.Chunks(max(1, 4 * size // layers))  # a row for each layer

    def prepare(self, point: fisher.Point, contexts: Sequence[Context]) -> None:
        """Before the first of all sentences: fits the sizes to the mode of reading, and checks what F predicts.

        Raises:
            UnsupportedModelError: a small perturbation does not do what F predicts.
        """
        mode = point.reading.mode
        more = ""
        if mode is PrefixMode.WHOLE and not self._modes:  # a row is a whole prompt, not its last token
            lengths = [len(context.ids) for context in contexts]
            for chunks in self._chunks().values():
                chunks.size = max(1, chunks.size // max(lengths))
            more = f": about {sum(lengths) / len(lengths):.0f} times as much work"
        if mode not in {PrefixMode.SHARED, *self._modes}:
            why = ways_of(point.model).get(mode.value)
            how = f"{type(point.model).__name__} is not read in the fastest way, but by {mode.value}"
            tqdm.write(f"note: {how}{f' ({why})' if why else ''}{more}")
        self._modes.add(mode)
        moved = partial(fisher.perturb, point, at=point.layers[0])
        self._checked = self._checked or fisher.check_prediction(point, moved, self.gradients)

    def _chunks(self) -> dict[str, fisher.Chunks]:
        return {name: chunks for name, chunks in vars(self).items() if isinstance(chunks, fisher.Chunks)}

    def halved(self) -> dict[str, str]:
        """What running out of memory has left of the sizes: for the results, like `ways_of`."""
        return {f"{name} at once": f"{c.size}: out of memory" for name, c in self._chunks().items() if c.halved}


def fisher_matrices(
    settings: Settings, point: fisher.Point, chunks: fisher.Chunks, clock: Clock
) -> tuple[fisher.TopK | fisher.FullVocabulary, fisher.Eigenpairs, fisher.Eigenpairs | None]:
    """F of the tokens asked for at every layer, its eigenpairs; and those of the exact F, if it is to be compared.

    With both, one backward sweep serves the two.
    """
    num, k = max(SPECTRUM, settings.num_eigenvectors), settings.max_vocab_subset
    exact = jacobian = None
    if k == "all" or settings.compare_exact:
        with clock("gradients"):
            matrix = fisher.full_vocabulary(point, chunks)
        with clock("eigen"):
            exact, jacobian = matrix.eigenpairs(num), matrix.jacobian
    if k == "all":
        return matrix, exact, exact if settings.compare_exact else None
    with clock("gradients"):
        top = fisher.top_k(point, k, chunks, jacobian)
    with clock("eigen"):
        return top, top.eigenpairs(num), exact


def measure_sentence(
    settings: Settings,
    context: Context,
    point: fisher.Point,
    controls: dict[str, Tensor],
    batches: Batches,
    clock: Clock,
    also_nats: bool | None = None,
) -> Measured:
    """One sentence at all layers: the Fisher matrix, its top eigenvector, and every perturbation.

    Args:
        also_nats: whether steps in nats are taken too; None: if the others are too short, and no unit was asked for.
    """
    if context.target_id is None:
        context = replace(context, target_id=int(fisher.most_probable(point.log_probs, 1)[1]))
    matrix, eigen, exact = fisher_matrices(settings, point, batches.gradients, clock)
    v, full = eigen.vectors[:, 0], settings.max_vocab_subset == "all"
    directions = torch.stack([v, *controls.values()], dim=1)  # (layers, n, d)
    scales = torch.tensor([scale for scale in settings.scales if scale], device=directions.device)
    curvature, norms = matrix.curvature(directions), point.activations.norm(dim=-1)

    def deltas_of(steps: Tensor, count: int | None = None) -> Tensor:
        """(layers, n, scales, d), along the first of the directions."""
        return directions[:, :count, None] * steps[:, None, :, None]

    def perturb(unit: str) -> Perturbed:
        steps = step_lengths(unit, scales, eigen.values[:, 0], norms)
        predicted_kl = 0.5 * steps[:, None] ** 2 * curvature[:, :, None]  # (layers, n, scales)
        with clock("sweep"):
            swept = sweep(point, deltas_of(steps), context.target_id, TOP, batches.perturbations)
        return Perturbed(steps, predicted_kl, swept)

    perturbed = perturb(settings.unit)
    if also_nats is None:
        also_nats = settings.scale_unit == "auto" and perturbed.too_short
    in_nats = perturb("nats") if also_nats else None
    slopes = matrix.slopes(eigen.vectors[:, : settings.num_eigenvectors])
    shares = token_shares(slopes, matrix.weights, matrix.tokens)
    mass = 1.0 if full else float(matrix.mass)
    measured = Measured(context, point, list(controls), mass, eigen, shares, exact, perturbed, in_nats)
    if settings.trust_radius:
        with clock("trust radius"):
            measured.trust_radii = trust_radii_along(point, eigen, full, batches.perturbations)
    if settings.lens:
        with clock("lens"):
            depth, width = len(decoder_layers(point.model)), v.shape[-1]
            lens = lens_for(settings.lens, settings.layers, depth, width)
            measured.lens = audit(point, lens, settings.seed, batches.perturbations)
    if settings.continue_:
        with clock("continuation"):
            far = measured.far_enough
            chosen = choose_scales(scales.tolist(), far.predicted_kl[:, 0], settings.continue_nats)
            deltas = deltas_of(far.steps, 1 + min(1, settings.num_controls))  # along v, and the first random one
            measured.continuations = continuations(
                point, len(context.ids), deltas, chosen, settings.continue_, batches.perturbations
            )
    if settings.steer:
        with clock("steering"):
            others = {name: controls[name] for name in controls if name == "difference"} | {"fisher": v}
            target = context.target_id if context.steer_id is None else context.steer_id
            tokens = STEERING_TOKENS if full else settings.max_vocab_subset
            measured.steered = steer_along(
                point, others, target, tokens, settings.steer_steps, settings.steer_damping, batches.steering,
                batches.perturbations,
            )  # fmt: skip
            measured.said_steered = continue_steered(settings, context, measured.steered, point, batches)
    return measured


def continue_steered(
    settings: Settings, context: Context, steered: Steered, point: fisher.Point, batches: Batches
) -> Continuations | None:
    """What the model goes on to say where steering has reached a goal, if continuations are asked for."""
    reached = steered.deltas.isfinite().all(-1).nonzero().tolist()
    if not settings.continue_ or not reached:
        return None
    chosen, deltas = [(row, goal) for row, goal in reached], steered.deltas[:, None]  # (layers, 1, goals, d)
    return continuations(point, len(context.ids), deltas, chosen, settings.continue_, batches.perturbations)
