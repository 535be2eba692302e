"""The figures and the picture of docs/findings.md, from the embedded model over the bundled sentences.

    python benchmarks/measure_findings.py

At every third layer of every sentence, and the last, from the exact Fisher matrix: effective dimension, the distance
of the metric from the Euclidean one, KL after pushes of equal length along several kinds of direction, similarity of
the top eigenvectors, and the trust radius. Writes benchmarks/results/findings.json and docs/findings.png.
"""

import argparse

import exact
import matplotlib
import numpy as np
import plots
import pushes
import reading
import torch
from tqdm import tqdm

from common import ROOT, diverse_contexts, machine, write
import core_experiment
import fisher

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RANDOM = 2  # random directions at each layer of each sentence
SHARES = (0.01, 0.03, 0.1, 0.3)  # lengths of the pushes in norms of h, along either sign
KINDS = {
    "fisher": "#D55E00",
    "towards another": "#0072B2",
    "between two others": "#009E73",
    "random": "#7A7A7A",
}


def directions(args, activations: torch.Tensor, index: int, v: torch.Tensor, layers: list[int]) -> dict:
    """Unit directions (layers, n, d) by kind. Only "towards another" knows the activation that is pushed."""
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


def push(model: reading.Model, token, read: reading.Reading, u: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """KL (layers, n, shares, 2) after pushes of SHARES of |h| along u (layers, n, d) and -u."""
    lengths = norms[:, None, None, None] * torch.tensor(SHARES)[:, None] * torch.tensor([1.0, -1.0])
    lengths = lengths.expand(-1, u.shape[1], -1, -1)
    deltas = u[:, :, None, None] * lengths[..., None]
    at_layer = torch.arange(len(u)).repeat_interleave(lengths[0].numel())
    swept = pushes.sweep(
        model.lm, model.modules, token, read.prefix, read.point.log_probs, deltas.flatten(0, 3), at_layer
    )
    return swept.kl.unflatten(0, lengths.shape)


def measure(count: int) -> tuple[reading.Model, dict[str, np.ndarray]]:
    """Arrays that begin with (sentences, layers)."""
    args = core_experiment.parse_args([])
    model = reading.load(args.model_name, [*range(0, 30, 3), 29], "float32", "cpu")
    contexts = diverse_contexts(model, count)
    activations = torch.stack([reading.read(model, context).point.activations for context in contexts])
    found = {}

    def keep(**arrays) -> None:
        for name, array in arrays.items():
            found.setdefault(name, []).append(np.asarray(array))

    for index, context in enumerate(tqdm(contexts)):
        read, token = reading.read(model, context), torch.tensor(context.ids[-1])
        matrices = exact.matrices(read.point, fisher.Chunks(1024))
        eigen = matrices.eigenpairs(10)
        spectra = torch.linalg.eigvalsh(matrices.matrix.double()).flip(-1).clamp(min=0)
        cumulative = spectra.cumsum(-1) / spectra.sum(-1, keepdim=True)
        norms = read.point.activations.norm(dim=-1)
        v = eigen.vectors[:, 0]
        kinds = directions(args, activations, index, v, model.layers)
        steps, nats = core_experiment.find_trust_radii(model, token, read, eigen, True, fisher.Chunks())
        shorter = steps.argmin(-1, keepdim=True)  # NaN is the smallest: unknown stays unknown
        keep(
            participation=eigen.effective_rank,
            half=1 + (cumulative < 0.5).sum(-1),
            ninety=1 + (cumulative < 0.9).sum(-1),
            euclidean=1 - eigen.trace / spectra.shape[-1] / eigen.values[:, 0],
            eigenvector=v,
            trust_nats=nats.gather(1, shorter)[:, 0],
            trust_norms=steps.gather(1, shorter)[:, 0] / norms,
            **{f"kl {kind}": push(model, token, read, u, norms) for kind, u in kinds.items()},
        )
    return model, {name: np.stack(arrays) for name, arrays in found.items()}


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
    with plt.rc_context(plots.STYLE):
        figure, ((dimension, kl), (alike, trust)) = plt.subplots(2, 2, figsize=(15, 10))

        def band(panel, values, colour, label, line="-") -> None:
            low, median, high = np.array(values).T
            panel.plot(layers, median, line, color=colour, label=label)
            panel.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)

        band(dimension, figures["participation_ratio_percent_of_d"], "#D55E00", "participation ratio (Σλ)²/Σλ²")
        key = "directions_for_90_percent_of_the_trace_percent_of_d"
        band(dimension, figures[key], "#0072B2", "directions that hold 90% of the trace")
        dimension.set(title="Effective dimension", ylabel="% of d", yscale="log")
        dimension.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])

        for kind, colour in KINDS.items():
            band(
                kl,
                figures["kl_at_share_of_norm"][kind]["0.1"],
                colour,
                "Fisher eigenvector" if kind == "fisher" else kind,
            )
        kl.set(title="KL after a push of 10% of ‖h‖", ylabel="nats", yscale="log")

        names = {
            "within": ("#D55E00", "other sentences, same layer"),
            "between": ("#0072B2", "other sentences, other layers"),
            "next layer, same sentence": ("#009E73", "same sentence, next of these layers"),
        }
        for name, (colour, label) in names.items():
            values = np.array(figures["similarity"][name], dtype=float)  # None becomes NaN
            alike.plot(layers, values, color=colour, label=label)
        alike.axhline(figures["chance"], color="#7A7A7A", linestyle=":", label="random directions")
        alike.set(title="Similarity of top eigenvectors", ylabel="mean |cosine|", ylim=(0, 1))

        band(trust, figures["trust_radius_nats"], "#D55E00", "nats predicted there")
        band(trust, figures["trust_radius_norms"], "#0072B2", "step, in norms of h")
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
    model, found = measure(options.num_sentences)
    d = found["eigenvector"].shape[-1]
    figures = {
        "machine": machine(model.lm),
        "sentences": options.num_sentences,
        "layers": model.layers,
        "chance": float(np.sqrt(2 / (np.pi * d))),
        "unknown_trust_radii": int(np.isnan(found["trust_nats"]).sum()),
        **summarize(found),
    }
    write("findings", __file__, figures)
    picture(model.layers, figures)
    shown = ("participation_ratio_percent_of_d", "distance_from_euclidean", "trust_radius_nats", "trust_radius_norms")
    for name in shown:
        print(name, [float(f"{median:.2g}") for _, median, _ in figures[name]])


if __name__ == "__main__":
    main()
