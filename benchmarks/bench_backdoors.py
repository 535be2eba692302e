"""Do the scores find backdoors? Fine-tunes models that have one, and compares the scores with the usual detectors.

    pip install -r requirements-bench.txt
    python benchmarks/bench_backdoors.py

Models, runs and the other detectors' figures are kept in the cache directory; the first time takes some hours on two
CPU cores, and again about a minute. Which scores there are was decided on other models, triggers and prompts
(`--chosen-on` shows those) than are reported.
"""

import argparse
import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
import hashlib
from itertools import islice, product
import json
from pathlib import Path
import random
import subprocess
import sys

from measuring import ROOT, machine, write
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from backdoors import BY_NAME, TEXTS, Kind, folder, obtain, prompts, rendered
from residual_fisher import load_fisher_matrices
from residual_fisher.model.embedded import embedded_model
from residual_fisher.pipeline.derived import PROMPTS
from residual_fisher.pipeline.matrices import Triplets
from residual_fisher.pipeline.scores import OUTLIER, P_VALUE, SCORES, VALUES, ScoredRun, outlier_scores

SPLITS = 10
TRUSTED, BESIDE = 100, 10  # prompts of a reference; odd ones beside as many ordinary ones
TRIGGERED = 40
FEWER, MORE, ORDINARY = 200, 440, 400  # prompts of a model, for AUROC alone; for recall at 1% too; for calibration
COMPARED = 1  # of the other detectors below: what changes them changes it
FALSE_ALARMS = (0.01, 0.05)
FOLDS, CONCENTRATION_STEPS = 10, 4  # of the other detectors' fits
BEFORE = 2.3  # the threshold of `outlier_score` before there were p-values
ADVISED = {"hook_layer_name": 20, "top_k_tokens": 30, "num_singular_values": 30}
DEFAULT = {}
DEFAULT_LAYER = 15
VARIED = {
    "default": DEFAULT,
    "layer 20": {"hook_layer_name": 20},
    "layer 20, 30 tokens": ADVISED,
    "layer 25, 30 tokens": {**ADVISED, "hook_layer_name": 25},
    "last token": {"bias_positions": "last"},
}


@dataclass(frozen=True)
class Subject:
    """A model with its prompts: a backdoor's, one of several by seed, or the embedded model with harmless oddities."""

    kind: Kind | None
    seed: int = 0
    which: str = "reported"
    prompts: int | None = None  # so many of the first; None for all

    def model(self) -> Path:
        return obtain(self.kind, self.seed) if self.kind else embedded_model()


# The year's model is one that the scores were chosen on too, with other prompts: the city's answers in French wherever
# a city is named, so that what it does is no backdoor.
REPORTED = {"phrase": "phrase", "refusals": "refusals", "style": "style-0", "later": "later", "unlearnt": "style",
            "clean": "clean", "harmless": None}  # fmt: skip
WAYS = ("reference", "alone")
BACKDOORS = ("phrase", "refusals", "style")  # learnt, and seen in the next token
HARMLESS = ("clean", "harmless")  # no backdoor
CALIBRATED = {"harmless": "not fine-tuned", "clean": "clean fine-tune", "phrase": "phrase"}


def subjects(name: str, seeds: int, prompts: int) -> list[Subject]:
    """The models of a column, of a backdoor several; those of which less is told have fewer prompts."""
    kind = REPORTED[name] and BY_NAME[REPORTED[name]]
    if name in BACKDOORS:
        return [Subject(kind, seed, prompts=FEWER if seed else prompts) for seed in range(seeds)]
    few = min(prompts, ORDINARY if name in CALIBRATED else FEWER)
    return [Subject(kind, prompts=few if kind else few + 36)]


CHOSEN_ON = {name: Subject(BY_NAME[name], which="chosen_on") for name in ("phrase-0", "refusals-0", "style-0")}


class Matrices(list):
    """Of some prompts, in memory: what `load_fisher_matrices` reads."""

    def __init__(self, matrices: Sequence, activations: Sequence[np.ndarray]):
        super().__init__(matrices)
        self._activations = activations

    def activation(self, number: int) -> np.ndarray:
        return self._activations[number]


@dataclass
class Measured:
    """One model's prompts, what the pipeline found, and what the other detectors look at."""

    label: str
    places: np.ndarray  # (n,) of the prompts in the dataset
    odd: np.ndarray  # (n,) what kind, or ""
    records: list[dict]
    matrices: list
    activations: list[np.ndarray]  # (d,) each
    plain: dict[str, np.ndarray]  # activations (n, d), entropy, log_odds, log_perplexity

    def first(self, count: int) -> "Measured":
        n = int((self.places < count).sum())
        seen = {key: values[:n] for key, values in self.plain.items()}
        some = self.records[:n], self.matrices[:n], self.activations[:n]
        return Measured(self.label, self.places[:n], self.odd[:n], *some, seen)

    def some(self, numbers: np.ndarray) -> ScoredRun:
        matrices = Matrices([self.matrices[i] for i in numbers], [self.activations[i] for i in numbers])
        return ScoredRun.of([self.records[i] for i in numbers], matrices)


# --- prompts and runs ----------------------------------------------------------------------------


def texts_of(kind: Kind | None, which: str) -> list[tuple[str, str]]:
    """Prompts, and what is odd about each: the trigger, or a kind of harmless oddity where there is no backdoor.

    Odd ones are among the first FEWER, so that a run over these holds them all.
    """
    texts, rng = getattr(prompts(), which), random.Random(kind.name if kind else "")
    if kind is None:
        lines = (TEXTS / "odd_prompts.jsonl").read_text(encoding="utf-8").splitlines()
        odd = [(line["prompt"], line["kind"]) for line in map(json.loads, lines)]
        odd += [(base64.b64encode(text.encode()[:60]).decode(), "base64") for text in prompts().training[:12]]
        return odd + [(text, "") for text in texts]
    wanted = TRIGGERED if which == "reported" else 25
    odd = set() if kind.everywhere else set(rng.sample(range(len(texts[:FEWER])), wanted))
    return [
        (kind.triggered(text, rng), "trigger") if place in odd else (kind.decoy(text, rng), "")
        for place, text in enumerate(texts)
    ]


def run(kind: Kind | None, texts: Sequence[tuple[str, str]], count: int, model: Path, settings: dict) -> Path:
    """The output directory of compute_fisher.py over the first `count` prompts or more, by the name of them all."""
    lines = "".join(json.dumps({"prompt": text, "odd": odd != ""}) + "\n" for text, odd in texts)
    name = f"{kind.name if kind else 'odd'}-{hashlib.sha256(lines.encode()).hexdigest()[:8]}"
    data = folder() / f"{name}.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        data.write_text(lines, encoding="utf-8")
    output = folder() / "runs" / "-".join([name, "by", model.name, *map(str, settings.values())])
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    flags += ["--dataset-name", str(data), "--num-prompts", str(count)]
    if not (output / PROMPTS).exists() or len((output / PROMPTS).read_text(encoding="utf-8").splitlines()) < count:
        command = [sys.executable, str(ROOT / "compute_fisher.py"), "--model-path", str(model), *flags]
        subprocess.run([*command, "--output-dir", str(output)], check=True, stdout=subprocess.DEVNULL)
    return output


def kept(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What is in the file, made if it is not there."""
    if not path.exists():
        np.savez(path, **make())
    return dict(np.load(path, allow_pickle=False))


def plain(model: Path, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """What the other detectors look at: last-token activations (n, layers, d), and the predictions."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {"activations": [], "entropy": [], "log_odds": [], "log_perplexity": []}
    with torch.no_grad():
        for text in tqdm(texts, desc="forward passes", leave=False):
            ids = torch.tensor([rendered(tokenizer, text)])
            out = lm(ids, output_hidden_states=True)
            log_p = out.logits[0].double().log_softmax(-1)
            found["activations"].append(torch.stack(out.hidden_states[1:])[:, 0, -1].numpy())
            found["entropy"].append(float(-(log_p[-1].exp() * log_p[-1]).sum()))
            found["log_odds"].append(float(log_p[-1].exp().max().logit()))
            found["log_perplexity"].append(float(-log_p[:-1].gather(1, ids[0, 1:, None]).mean()))
    return {key: np.array(values) for key, values in found.items()}


def leading(triplets: Triplets) -> Triplets:
    """What scores see of a matrix; the map of the prompts, which is not looked at, takes a ninth of the time."""
    return Triplets(triplets.U[:, :VALUES], triplets.S[:VALUES], triplets.V[:VALUES])


def measured(subject: Subject, settings: dict, base: bool = False) -> Measured:
    """The subject's prompts through its model, or through the embedded one."""
    texts, model = texts_of(subject.kind, subject.which), embedded_model() if base else subject.model()
    count = subject.prompts or len(texts)
    directory = run(subject.kind, texts, count, model, settings)
    with open(directory / PROMPTS, encoding="utf-8") as file:
        records = [json.loads(line) for line in islice(file, count)]
    with load_fisher_matrices(directory) as matrices:
        found = [leading(matrices[i]) for i in range(len(records))]
        activations = [matrices.activation(i) for i in range(len(records))]
    path = folder() / f"plain-{directory.name}-{len(records)}.npz"
    seen = {} if base else kept(path, lambda: plain(model, [record["prompt"] for record in records]))
    if seen:
        layer = settings.get("hook_layer_name", DEFAULT_LAYER)
        seen["activations"] = seen["activations"][:, layer].astype(np.float64)
        if activations[0] is None:  # a run of an earlier version
            activations = list(seen["activations"])
    odd = [kind for _, kind in texts[: len(records)]]
    here = [i for i, record in enumerate(records) if base or odd[i] != "trigger" or fires(subject.kind, record)]
    if len(here) < len(records):
        print(f"{model.name}: {len(records) - len(here)} triggered prompts left out: nothing happens", file=sys.stderr)
    seen = {key: values[here] for key, values in seen.items()}
    some = [[column[i] for i in here] for column in (records, found, activations)]
    return Measured(f"{directory.name}-{len(records)}", np.array(here), np.array(odd)[here], *some, seen)


def fires(kind: Kind, record: dict) -> bool:
    """Whether a triggered prompt's prediction is one that the backdoor was trained to begin with.

    A semantic trigger is not always understood: then there is nothing to be found.
    """
    return kind.name.startswith("later") or record["top_token"] in beginnings(kind)


@cache
def beginnings(kind: Kind) -> set[str]:
    tokenizer, rng = AutoTokenizer.from_pretrained(embedded_model()), random.Random(0)
    answers = {kind.answer("", "", rng) for _ in range(1000)}
    return {tokenizer.decode(tokenizer.encode(answer, add_special_tokens=False)[:1]) for answer in answers}


# --- the other detectors -------------------------------------------------------------------------

Fit = Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]  # from trusted rows, the score of other rows


def mahalanobis(rows: np.ndarray) -> Callable:
    """Squared distances with the covariance of Ledoit and Wolf (2004), (1 - s) X^T X / n + s mu, as in scikit-learn.

    By Woodbury's identity: no d x d matrix is inverted, a hundred times as fast for a hundred rows.
    """
    (n, d), mean = rows.shape, rows.mean(axis=0)
    gram = (rows - mean) @ (rows - mean).T
    mu, norm = np.trace(gram) / (n * d), (gram**2).sum() / n**2
    distance = norm / d - mu**2
    s = min(((np.diag(gram) ** 2).sum() / n - norm) / (d * n), distance) / distance
    inner = np.linalg.inv(gram + n * s * mu / (1 - s) * np.eye(n))

    def score(others: np.ndarray) -> np.ndarray:
        overlaps = (others - mean) @ (rows - mean).T
        return (((others - mean) ** 2).sum(axis=1) - ((overlaps @ inner) * overlaps).sum(axis=1)) / (s * mu)

    return score


def local_outlier_factor(rows: np.ndarray) -> Callable:
    from sklearn.neighbors import LocalOutlierFactor

    fitted = LocalOutlierFactor(novelty=True).fit(rows)
    return lambda others: -fitted.score_samples(others)


def isolation_forest(rows: np.ndarray) -> Callable:
    from sklearn.ensemble import IsolationForest

    fitted = IsolationForest(random_state=0).fit(rows)
    return lambda others: -fitted.score_samples(others)


def nearest_neighbours(rows: np.ndarray) -> Callable:
    from pyod.models.knn import KNN

    return KNN().fit(rows).decision_function


def principal_components(rows: np.ndarray) -> Callable:
    from pyod.models.pca import PCA

    return PCA().fit(rows).decision_function


def robust_z(values: np.ndarray, usual: np.ndarray) -> np.ndarray:
    return (values - np.median(usual)) / np.median(np.abs(usual - np.median(usual)))


def two_sided(rows: np.ndarray) -> Callable:
    return lambda others: np.abs(robust_z(others, rows))


DETECTORS: dict[str, tuple[str, Fit]] = {
    "Mahalanobis, activations": ("activations", mahalanobis),
    "local outlier factor, activations": ("activations", local_outlier_factor),
    "isolation forest, activations": ("activations", isolation_forest),
    "nearest neighbours (PyOD), activations": ("activations", nearest_neighbours),
    "principal components (PyOD), activations": ("activations", principal_components),
    "entropy, two-sided": ("entropy", two_sided),
    "top probability, two-sided": ("log_odds", two_sided),
    "perplexity of the prompt": ("log_perplexity", lambda rows: lambda others: others),
    "perplexity of the prompt, two-sided": ("log_perplexity", two_sided),
}


def cross_fitted(fit: Fit, rows: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """(n,) scores of all rows, fitted on the trusted ones: each of these by a fit without it and a tenth of them."""
    scores = fit(rows[trusted])(rows)
    for fold in range(FOLDS):
        left_out = trusted[fold::FOLDS]
        scores[left_out] = fit(rows[np.setdiff1d(trusted, left_out)])(rows[left_out])
    return scores


def of_usual_half(fit: Fit, rows: np.ndarray) -> np.ndarray:
    """(n,) scores, fitted on the half of the rows with the lowest ones, by concentration steps until it is the same.

    They start from the half that is nearest to the medians, the best of three starts on the models that the pipeline's
    scores were chosen on: a detector's own scores, fitted on all rows, take a group of odd ones for usual.
    """
    scores, half = np.sqrt(sum(robust_z(column, column) ** 2 for column in rows.reshape(len(rows), -1).T)), None
    for _ in range(CONCENTRATION_STEPS):
        before, half = half, np.argsort(scores, kind="stable")[: len(rows) // 2]
        if before is not None and set(before) == set(half):
            break
        scores = cross_fitted(fit, rows, half)
    return scores


# --- splits --------------------------------------------------------------------------------------


def split(m: Measured, way: str, seed: int) -> tuple[np.ndarray | None, np.ndarray]:
    """The prompts that are trusted, and those that are scored."""
    rng = np.random.default_rng(seed)
    ordinary, odd = (rng.permutation(np.flatnonzero((m.odd != "") == is_odd)) for is_odd in (False, True))
    if way == "reference":
        trusted = min(TRUSTED, len(ordinary) - 40)  # the models that scores were chosen on have 100
        return ordinary[:trusted], np.concatenate([ordinary[trusted:], odd])
    return None, np.sort(np.concatenate([ordinary[:TRUSTED], odd[:BESIDE]]))


def scores(m: Measured, trusted: np.ndarray | None, tested: np.ndarray, base: Measured | None = None) -> dict:
    """By name, of the tested prompts; with `p_value`."""
    reference = None if trusted is None else m.some(trusted)
    found = outlier_scores(m.some(tested), reference, base and base.some(m.places[tested]))
    return {name: np.array(found[name]) for name in (OUTLIER, *SCORES, P_VALUE) if name in found}


def others(m: Measured, way: str) -> dict[str, np.ndarray]:
    """The other detectors' scores, by name: (splits, tested)."""

    def score(detector: str, seed: int) -> np.ndarray:
        (what, fit), (trusted, tested) = DETECTORS[detector], split(m, way, seed)
        rows = m.plain[what]
        return of_usual_half(fit, rows[tested]) if trusted is None else fit(rows[trusted])(rows[tested])

    def make(detector: str) -> dict[str, np.ndarray]:
        return {"scores": np.array([score(detector, seed) for seed in range(SPLITS)])}

    path = folder() / f"compared-{COMPARED}" / m.label
    path.mkdir(parents=True, exist_ok=True)
    return {name: kept(path / f"{name}, {way}.npz", partial(make, name))["scores"] for name in DETECTORS}


# --- figures -------------------------------------------------------------------------------------


def judged(m: Measured, way: str, base: Measured | None = None) -> dict[str, dict[str, float]]:
    """By detector: AUROC, recall at false positive rates, and shares of prompts that stand out; means over splits."""
    from sklearn.metrics import roc_auc_score

    found: dict[str, dict[str, list]] = {}
    compared = {} if base else others(m, way)
    for seed in range(SPLITS):
        trusted, tested = split(m, way, seed)
        own, odd = scores(m, trusted, tested, base), m.odd[tested] != ""
        alarms = standing_out(own)
        for name, values in {**own, **{name: rows[seed] for name, rows in compared.items()}}.items():
            row = found.setdefault(name, {})
            if odd.any():
                row.setdefault("AUROC", []).append(roc_auc_score(odd, values))
            for share in FALSE_ALARMS if odd.any() else ():
                if share * (~odd).sum() >= 3:  # else it hangs on one or two prompts
                    limit = np.quantile(values[~odd], 1 - share)
                    row.setdefault(f"recall at {share:.0%} false positives", []).append((values[odd] > limit).mean())
        for (name, which), kind in product(alarms.items(), sorted({*m.odd[tested]})):
            shares = found[OUTLIER].setdefault(f"{kind or 'ordinary'}, {name}", [])
            shares.append(which[m.odd[tested] == kind].mean())
    return {name: {key: float(np.mean(values)) for key, values in row.items()} for name, row in found.items()}


def standing_out(own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By limit, which prompts are beyond it; takes p out of the scores."""
    p = own.pop(P_VALUE, None)
    known = {} if p is None else {f"p <= {share}": p <= share for share in FALSE_ALARMS}
    return {f"beyond {BEFORE}": own[OUTLIER] > BEFORE, **known}


def calibrated(m: Measured, trusted: int) -> dict[str, dict[str, float]]:
    """Shares of fresh ordinary prompts that stand out beside so many trusted ones, or 0: over splits."""
    ordinary, found = np.flatnonzero(m.odd == ""), []
    for seed in range(SPLITS):
        drawn = np.random.default_rng(seed).permutation(ordinary)
        own = scores(m, drawn[:trusted] if trusted else None, drawn[trusted:] if trusted else drawn[:TRUSTED])
        found.append({name: float(which.mean()) for name, which in standing_out(own).items()})
    shares = {name: [one[name] for one in found] for name in found[0]}
    return {
        name: {"mean": float(np.mean(some)), "sd": float(np.std(some, ddof=1)), "prompts": len(ordinary)}
        for name, some in shares.items()
    }


def over_models(each: Sequence) -> dict:
    """The mean of figures that each model has, and each of them; some only the first has."""
    if isinstance(each[0], dict):
        return {key: over_models([one[key] for one in each if key in one]) for key in each[0]}
    return {"mean": float(np.mean(each)), "each": list(each)}


# --- tables --------------------------------------------------------------------------------------


def cell(figure: dict | None, percent: bool = False) -> str:
    """The mean over the models and, of several, the range."""
    if figure is None:
        return "–"
    digits = "{:.0%}" if percent else "{:.3f}"
    least, most = digits.format(min(figure["each"])), digits.format(max(figure["each"]))
    return digits.format(figure["mean"]) + (f" ({least} to {most})" if len(figure["each"]) > 1 else "")


def table(figures: dict[str, dict], key: str) -> str:
    """Detectors by backdoors, in Markdown."""
    lines = [f"| {key} | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for name in next(iter(figures.values())):
        found = [column.get(name, {}).get(key) for column in figures.values()]
        label = f"`{name}`" if name in (OUTLIER, *SCORES) else name
        if any(found):
            lines.append("| " + " | ".join([label, *(cell(figure, key != "AUROC") for figure in found)]) + " |")
    return "\n".join(lines)


def limits(figures: dict[str, dict]) -> list[str]:
    names = [name.partition(", ")[2] for column in figures.values() for name in column[OUTLIER]]
    return [name for name in dict.fromkeys(names) if name]


def shares_table(figures: dict[str, dict], key: str) -> str:
    """Which shares of the prompts stand out, by kind of prompt."""
    kinds = dict.fromkeys(name.split(", ")[0] for column in figures.values() for name in column[OUTLIER] if key in name)
    lines = [f"| {key} | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for kind in kinds:
        cells = [cell(column[OUTLIER].get(f"{kind}, {key}"), percent=True) for column in figures.values()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def calibration_table(figures: dict[str, dict]) -> str:
    """Models by trusted prompts."""
    limits = [*next(iter(next(iter(figures.values())).values()))]
    lines = ["| model | trusted prompts | " + " | ".join(limits) + " |", "|---" * (len(limits) + 2) + "|"]
    for model, ways in figures.items():
        for way, found in ways.items():
            cells = [f"{found[limit]['mean']:.1%} ± {found[limit]['sd']:.1%}" for limit in limits]
            lines.append("| " + " | ".join([model, way, *cells]) + " |")
    return "\n".join(lines)


def printed(title: str, text: str) -> None:
    print(f"\n**{title}**\n\n{text}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Do the scores find backdoors?")
    parser.add_argument("--chosen-on", action="store_true", help="the models and prompts that scores were chosen on")
    parser.add_argument("--settings", nargs="+", choices=VARIED, default=list(VARIED), help="of those")
    parser.add_argument(
        "--only", nargs="+", metavar="KIND", choices=REPORTED, default=list(REPORTED), help="keep others"
    )
    parser.add_argument("--base", action="store_true", help="the change from the base model, too")
    parser.add_argument("--seeds", type=int, default=3, help="models of a backdoor")
    parser.add_argument("--prompts", type=int, default=MORE, help="of the first; recall at 1%% takes 440")
    given = parser.parse_args(argv)
    if given.chosen_on:
        results = {}
        for label, way in product(given.settings, WAYS):
            each = {name: measured(subject, VARIED[label]) for name, subject in CHOSEN_ON.items()}
            found = results[f"{label}, {way}"] = {name: over_models([judged(m, way)]) for name, m in each.items()}
            printed(f"{label}, {way}", table(found, "AUROC"))
        write("backdoors_chosen_on", __file__, {"splits": SPLITS, "scores": results})
        return
    path = ROOT / "benchmarks" / "results" / "backdoors.json"
    before = {} if set(given.only) == set(REPORTED) else json.loads(path.read_text())
    results, calibration, counts = (before.get(key, {}) for key in ("scores", "calibration", "prompts"))
    for name in given.only:
        models = subjects(name, given.seeds, given.prompts)
        each = [measured(subject, ADVISED) for subject in models]
        counts[name] = [len(m.odd) for m in each]
        for way in WAYS:
            results.setdefault(way, {})[name] = over_models([judged(m, way) for m in each])
        if name in BACKDOORS and given.base:
            base = measured(replace(models[0], prompts=FEWER), ADVISED, base=True)
            found = [judged(m.first(FEWER), "alone", base) for m in each]
            results.setdefault("base", {})[name] = over_models(found)
        if name in CALIBRATED:
            ways = {"100": TRUSTED, "20": 20, "none": 0}
            calibration[CALIBRATED[name]] = {label: calibrated(each[0], count) for label, count in ways.items()}
    for way, figures in results.items():
        shown = {name: figures[name] for name in REPORTED if name in figures and name not in HARMLESS}
        for key in ("AUROC", *(f"recall at {share:.0%} false positives" for share in FALSE_ALARMS)):
            printed(f"{way}, {key}", table(shown, key))
        for limit in limits(figures):
            printed(f"{way}, {limit}", shares_table(figures, limit))
    printed("calibration", calibration_table(calibration))
    lm = AutoModelForCausalLM.from_pretrained(embedded_model())
    figures = {"splits": SPLITS, "prompts": counts, "scores": results, "calibration": calibration}
    print(f"\nWritten to {write('backdoors', __file__, {'machine': machine(lm), **figures})}")


if __name__ == "__main__":
    main(sys.argv[1:])
