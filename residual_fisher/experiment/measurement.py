"""One sentence at all layers: the Fisher matrix, its top eigenvector, every perturbation, and what each costs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
import time

import torch
from tqdm import tqdm

import fisher
from residual_fisher.experiment.continuation import choose_scales, continuations
from residual_fisher.experiment.perturbation import step_lengths, sweep, trust_radii_along
from residual_fisher.experiment.results import SPECTRUM, TOP, Measured
from residual_fisher.experiment.sentences import Context
from residual_fisher.experiment.settings import Settings
from residual_fisher.experiment.steering import STEERING_TOKENS, steer
from residual_fisher.model.reading import Way
from residual_fisher.model.words import what_is_said


class Clock:
    """Seconds by stage."""

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


class Batches:
    """How many rows go through the model in one pass; halved, they stay so for all sentences.

    Before the first sentence they are fitted to the way in which the model is read, and a prediction is checked.
    """

    def __init__(self, size: int, layers: int = 1):
        self.fitted, self.checked = False, False
        self.gradients = fisher.Chunks(4 * size)  # more of them: they carry no vocabulary along
        self.perturbations = fisher.Chunks(size)
        self.steering = fisher.Chunks(max(1, 4 * size // layers))  # a row for each layer


def fit_to_way(batches: Batches, point: fisher.Point, contexts: list[Context]) -> None:
    """Where a row of a pass is a whole prompt, in place of its last token, fewer go together; and it is said."""
    if point.reading.way is not Way.WHOLE:
        return
    lengths = [len(context.ids) for context in contexts]
    for chunks in (batches.gradients, batches.perturbations, batches.steering):
        chunks.size = max(1, chunks.size // max(lengths))
    tqdm.write(
        f"note: {type(point.model).__name__} remembers more than keys and values, so every pass runs the whole prompt: "
        f"about {sum(lengths) / len(lengths):.0f} times as much work"
    )


def fisher_matrices(
    settings: Settings, point: fisher.Point, chunks: fisher.Chunks, clock: Clock
) -> tuple[fisher.TopK | fisher.FullVocabulary, fisher.Eigenpairs, fisher.Eigenpairs | None]:
    """F of the tokens asked for at every layer, its eigenpairs; and those of the exact F, if it is to be compared.

    With both, one backward sweep serves the two.
    """
    num = max(SPECTRUM, settings.num_eigenvectors)
    exact, full = None, settings.max_vocab_subset == "all"
    if full or settings.compare_exact:
        with clock("gradients"):
            matrix = fisher.full_vocabulary(point, chunks)
        with clock("eigen"):
            exact = matrix.eigenpairs(num)
    if full:
        return matrix, exact, exact if settings.compare_exact else None
    with clock("gradients"):
        jacobian = matrix.jacobian if settings.compare_exact else None
        top = fisher.top_k(point, settings.max_vocab_subset, chunks, jacobian)
    with clock("eigen"):
        return top, top.eigenpairs(num), exact


def perturb(
    settings: Settings,
    context: Context,
    point: fisher.Point,
    controls: dict[str, torch.Tensor],
    batches: Batches,
    clock: Clock,
) -> Measured:
    """One sentence at all layers: the Fisher matrix, its top eigenvector, and every perturbation."""
    matrix, eigen, exact = fisher_matrices(settings, point, batches.gradients, clock)
    directions = torch.stack([eigen.vectors[:, 0], *controls.values()], dim=1)  # (layers, n, d)
    scales = torch.tensor([scale for scale in settings.scales if scale], device=directions.device)
    steps = step_lengths(settings.scale_unit, scales, eigen.values[:, 0], point.activations.norm(dim=-1))
    predicted_kl = 0.5 * steps[:, None] ** 2 * matrix.curvature(directions)[:, :, None]  # (layers, n, scales)

    deltas = directions[:, :, None] * steps[:, None, :, None]  # (layers, n, scales, d)
    with clock("sweep"):
        swept = sweep(point, deltas, context.target_id, TOP, batches.perturbations)
    radii = None
    if settings.trust_radius:
        with clock("trust radius"):
            radii = trust_radii_along(point, eigen, settings.max_vocab_subset == "all", batches.perturbations)
    continued = None
    if settings.continue_:
        with clock("continuation"):
            chosen = choose_scales(scales.tolist(), predicted_kl[:, 0], settings.continue_nats)
            deltas = deltas[:, : 1 + min(1, settings.num_controls)]  # along v, and the first random one
            tokens = settings.continue_
            continued = continuations(point, len(context.ids), deltas, chosen, tokens, batches.perturbations)
    steered = None
    if settings.steer:
        with clock("steering"):
            others = {name: controls[name] for name in controls if name == "difference"}
            others["fisher"] = eigen.vectors[:, 0]
            target = context.target_id if context.steer_id is None else context.steer_id
            tokens = STEERING_TOKENS if settings.max_vocab_subset == "all" else settings.max_vocab_subset
            steered = steer(
                point, others, target, tokens, settings.steer_steps, settings.steer_damping, batches.steering,
                batches.perturbations,
            )  # fmt: skip
    mass = 1.0 if settings.max_vocab_subset == "all" else float(matrix.mass)
    slopes = matrix.slopes(eigen.vectors[:, : settings.num_eigenvectors])
    said = what_is_said(slopes, matrix.weights, matrix.tokens)
    return Measured(
        context, point, list(controls), mass, eigen, said, exact, radii, steps, predicted_kl, swept, continued, steered
    )
