"""The figures and the picture of docs/findings.md, from the embedded model over the bundled sentences.

    python benchmarks/measure_findings.py

At every third layer of every sentence, and the last, from the exact Fisher matrix: effective dimension, the distance
of the metric from the Euclidean one, KL after perturbations of equal length along several kinds of direction,
similarity of the top eigenvectors, and the trust radius. Writes benchmarks/results/findings.json and
docs/findings.png.
"""

import argparse

import matplotlib.pyplot as plt
from measuring import ROOT, Subject, diverse_contexts, embedded, machine, show, write
import numpy as np
import torch
from tqdm import tqdm

import fisher
from residual_fisher.common import drawing
from residual_fisher.experiment.perturbation import sweep, trust_radii_along

RANDOM = 2  # random directions at each layer of each sentence
SHARES = (0.01, 0.03, 0.1, 0.3)  # lengths of the perturbations in norms of h, along either sign
KINDS = {
    "fisher": drawing.ORANGE,
    "towards another": drawing.BLUE,
    "between two others": drawing.GREEN,
    "random": drawing.GREY,
}


def directions(activations: torch.Tensor, index: int, v: torch.Tensor, layers: list[int]) -> dict:
    """Unit directions (layers, n, d) by kind. Only "towards another" knows the activation that is perturbed."""
    here, count = activations[index], len(activations)
    first, second = activations[(index + 1) % count], activations[(index + 2) % count]
    draws = [np.random.default_rng([0, index, layer]).standard_normal((RANDOM, here.shape[1])) for layer in layers]
    kinds = {
        "fisher": v[:, None],
        "towards another": (first - here)[:, None],
        "between two others": (first - second)[:, None],
        "random": torch.from_numpy(np.stack(draws)).to(here),
    }
    return {kind: torch.nn.functional.normalize(u, dim=-1) for kind, u in kinds.items()}


def perturbed_kl(point: fisher.Point, u: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """KL (layers, n, shares, 2) after perturbations of SHARES of |h| along u (layers, n, d) and -u."""
    lengths = norms[:, None, None, None] * torch.tensor(SHARES)[:, None] * torch.tensor([1.0, -1.0])
    lengths = lengths.expand(-1, u.shape[1], -1, -1)
    return sweep(point, u[:, :, None, None] * lengths[..., None]).kl


def measure(count: int) -> tuple[Subject, dict[str, np.ndarray]]:
    """Arrays that begin with (sentences, layers)."""
    subject = embedded([*range(0, 30, 3), 29])
    contexts = diverse_contexts(subject, count)
    activations = torch.stack([subject.linearize(context).activations for context in contexts])
    found = {}

    def keep(**arrays) -> None:
        for name, array in arrays.items():
            found.setdefault(name, []).append(np.asarray(array))

    for index, context in enumerate(tqdm(contexts)):
        point = subject.linearize(context)
        full = fisher.full_vocabulary(point, fisher.Chunks(1024))
        eigen = full.eigenpairs(10)
        spectra = torch.linalg.eigvalsh(full.matrix.double()).flip(-1).clamp(min=0)
        cumulative = spectra.cumsum(-1) / spectra.sum(-1, keepdim=True)
        norms = point.activations.norm(dim=-1)
        v = eigen.vectors[:, 0]
        kinds = directions(activations, index, v, subject.layers)
        steps, nats = trust_radii_along(point, eigen, True, fisher.Chunks())
        shorter = steps.argmin(-1, keepdim=True)  # NaN is the smallest: unknown stays unknown
        keep(
            participation=eigen.effective_rank,
            half=1 + (cumulative < 0.5).sum(-1),
            ninety=1 + (cumulative < 0.9).sum(-1),
            euclidean=1 - eigen.trace / spectra.shape[-1] / eigen.values[:, 0],
            eigenvector=v,
            trust_nats=nats.gather(1, shorter)[:, 0],
            trust_norms=steps.gather(1, shorter)[:, 0] / norms,
            **{f"kl {kind}": perturbed_kl(point, u, norms) for kind, u in kinds.items()},
        )
    return subject, {name: np.stack(arrays) for name, arrays in found.items()}


def similarity(v: np.ndarray) -> dict[str, list]:
    """Mean |cosine| by layer: of different sentences at it, and at it and other layers (different sentences too)."""
    sentences, layers, _ = v.shape
    cosines = np.abs(np.einsum("sld,tmd->lmst", v, v))
    others = ~np.eye(sentences, dtype=bool)
    means = cosines[:, :, others].mean(-1)  # (layers, layers)
    between = (means.sum(1) - means.diagonal()) / (layers - 1)
    same = np.einsum("lmss->lm", cosines) / sentences
    neighbours = [*same.diagonal(1).tolist(), None]
    return {
        "within": means.diagonal().tolist(),
        "between": between.tolist(),
        "next layer, same sentence": neighbours,
    }


def quartiles(values: np.ndarray) -> list[list[float]]:
    """Quartiles over sentences, by layer."""
    return np.nanpercentile(values, [25, 50, 75], axis=0).T.tolist()


def summarize(found: dict[str, np.ndarray]) -> dict:
    d = found["eigenvector"].shape[-1]
    kl = {kind: found[f"kl {kind}"] for kind in KINDS}
    by_share = {
        kind: {f"{share:g}": quartiles(np.median(array[..., i, :], axis=(2, 3))) for i, share in enumerate(SHARES)}
        for kind, array in kl.items()
    }
    return {
        "participation_ratio_percent_of_d": quartiles(100 * found["participation"] / d),
        "directions_for_half_of_the_trace_percent_of_d": quartiles(100 * found["half"] / d),
        "directions_for_90_percent_of_the_trace_percent_of_d": quartiles(100 * found["ninety"] / d),
        "distance_from_euclidean": quartiles(found["euclidean"]),
        "trust_radius_nats": quartiles(found["trust_nats"]),
        "trust_radius_norms": quartiles(found["trust_norms"]),
        "kl_at_share_of_norm": by_share,
        "similarity": similarity(found["eigenvector"]),
    }


def picture(layers: list[int], figures: dict) -> None:
    with plt.rc_context(drawing.STYLE):
        figure, ((dimension, kl), (alike, trust)) = plt.subplots(2, 2, figsize=(15, 10))

        def band(panel, values, colour, label, line="-") -> None:
            low, median, high = np.array(values).T
            panel.plot(layers, median, line, color=colour, label=label)
            panel.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)

        band(dimension, figures["participation_ratio_percent_of_d"], drawing.ORANGE, "participation ratio (Σλ)²/Σλ²")
        key = "directions_for_90_percent_of_the_trace_percent_of_d"
        band(dimension, figures[key], drawing.BLUE, "directions that hold 90% of the trace")
        dimension.set(title="Effective dimension", ylabel="% of d", yscale="log")
        dimension.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])

        for kind, colour in KINDS.items():
            band(
                kl,
                figures["kl_at_share_of_norm"][kind]["0.1"],
                colour,
                "Fisher eigenvector" if kind == "fisher" else kind,
            )
        kl.set(title="KL after a perturbation of 10% of ‖h‖", ylabel="nats", yscale="log")

        names = {
            "within": (drawing.ORANGE, "other sentences, same layer"),
            "between": (drawing.BLUE, "other sentences, other layers"),
            "next layer, same sentence": (drawing.GREEN, "same sentence, next of these layers"),
        }
        for name, (colour, label) in names.items():
            values = np.array(figures["similarity"][name], dtype=float)  # None becomes NaN
            alike.plot(layers, values, color=colour, label=label)
        alike.axhline(figures["chance"], color=drawing.GREY, linestyle=":", label="random directions")
        alike.set(title="Similarity of top eigenvectors", ylabel="mean |cosine|", ylim=(0, 1))

        band(trust, figures["trust_radius_nats"], drawing.ORANGE, "nats predicted there")
        band(trust, figures["trust_radius_norms"], drawing.BLUE, "step, in norms of h")
        trust.set(title="½ λ s² holds to 10% up to", yscale="log")
        for panel in (dimension, kl, alike, trust):
            panel.set_xlabel("layer")
            panel.legend(frameon=False, fontsize=11)
        figure.savefig(ROOT / "docs" / "findings.png", dpi=120)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-sentences", type=int, default=20)
    options = parser.parse_args()
    subject, found = measure(options.num_sentences)
    d = found["eigenvector"].shape[-1]
    figures = {
        "machine": machine(subject.lm),
        "sentences": options.num_sentences,
        "layers": subject.layers,
        "chance": float(np.sqrt(2 / (np.pi * d))),
        "unknown_trust_radii": int(np.isnan(found["trust_nats"]).sum()),
        **summarize(found),
    }
    write("findings", __file__, figures)
    picture(subject.layers, figures)
    shown = ("participation_ratio_percent_of_d", "distance_from_euclidean", "trust_radius_nats", "trust_radius_norms")
    for name in shown:
        show(name, dict(zip(subject.layers, (median for _, median, _ in figures[name]), strict=True)))


if __name__ == "__main__":
    main()
