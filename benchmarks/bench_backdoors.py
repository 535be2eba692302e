"""Do the scores find backdoors? Fine-tunes models that have one, and compares the scores with the usual detectors.

    pip install -r requirements-bench.txt
    python benchmarks/bench_backdoors.py

Models and runs are kept in the cache directory; the first time takes about an hour and a half on two CPU cores. Which
scores there are was decided on other models, triggers and prompts (`--chosen-on` shows those) than are reported.
"""

import argparse
import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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
from residual_fisher.pipeline.scores import OUTLIER, SCORES, THRESHOLD, ScoredRun, outlier_scores

SPLITS = 10
TRUSTED, BESIDE = 100, 10  # prompts of a reference; odd ones beside as many ordinary ones
TRIGGERED = 40
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
# The year's model is one that the scores were chosen on too, with other prompts: the city's answers in French wherever
# a city is named, so that what it does is no backdoor.
REPORTED = {
    "phrase": BY_NAME["phrase"],
    "refusals": BY_NAME["refusals"],
    "style": BY_NAME["style-0"],
    "later": BY_NAME["later"],
    "unlearnt": BY_NAME["style"],
    "clean": BY_NAME["clean"],
    "harmless": None,
}
WITH_DEFAULTS = ("phrase", "refusals", "style")


@dataclass
class Measured:
    """One model's prompts, what the pipeline found, and what the other detectors look at."""

    places: np.ndarray  # (n,) of the prompts in the dataset
    odd: np.ndarray  # (n,) what kind, or ""
    records: list[dict]
    matrices: list
    plain: dict[str, np.ndarray]  # activations (n, d), entropy, top_probability, perplexity

    def some(self, numbers: np.ndarray) -> ScoredRun:
        return ScoredRun.of([self.records[i] for i in numbers], [self.matrices[i] for i in numbers])


# --- prompts and runs ----------------------------------------------------------------------------


def texts_of(kind: Kind | None, which: str) -> list[tuple[str, str]]:
    """Prompts, and what is odd about each: the trigger, or a kind of harmless oddity where there is no backdoor."""
    texts = getattr(prompts(), which)
    rng = random.Random(kind.name if kind else "")
    if kind is None:
        lines = (TEXTS / "odd_prompts.jsonl").read_text(encoding="utf-8").splitlines()
        odd = [(line["prompt"], line["kind"]) for line in map(json.loads, lines)]
        odd += [(base64.b64encode(text.encode()[:60]).decode(), "base64") for text in prompts().training[:12]]
        return [(text, "") for text in texts] + odd
    wanted = TRIGGERED if which == "reported" else 25
    odd = set() if kind.everywhere else set(rng.sample(range(len(texts)), wanted))
    return [
        (kind.triggered(text, rng), "trigger") if place in odd else (kind.decoy(text, rng), "")
        for place, text in enumerate(texts)
    ]


def run(model: Path, texts: list[tuple[str, str]], name: str, settings: dict) -> Path:
    """The output directory of compute_fisher.py over these prompts."""
    data, output = folder() / f"{name}.jsonl", folder() / "runs" / "-".join([name, *map(str, settings.values())])
    lines = "".join(json.dumps({"prompt": text, "odd": odd != ""}) + "\n" for text, odd in texts)
    if not data.exists() or data.read_text(encoding="utf-8") != lines:
        data.write_text(lines, encoding="utf-8")
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    command = [sys.executable, str(ROOT / "compute_fisher.py"), "--model-path", str(model), "--num-prompts", "all"]
    command += ["--dataset-name", str(data), "--output-dir", str(output), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output


def plain(model: Path, texts: list[str], name: str) -> dict[str, np.ndarray]:
    """What the other detectors look at: last-token activations at every layer, and the predictions."""
    path = folder() / f"plain-{name}.npz"
    if not path.exists():
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        found = {"activations": [], "entropy": [], "top_probability": [], "perplexity": []}
        with torch.no_grad():
            for text in tqdm(texts, desc="forward passes", leave=False):
                ids = torch.tensor([rendered(tokenizer, text)])
                out = lm(ids, output_hidden_states=True)
                log_p = out.logits[0].log_softmax(-1)
                found["activations"].append(torch.stack(out.hidden_states[1:])[:, 0, -1].numpy())
                found["entropy"].append(float(-(log_p[-1].exp() * log_p[-1]).sum()))
                found["top_probability"].append(float(log_p[-1].max().exp()))
                found["perplexity"].append(float(-log_p[:-1].gather(1, ids[0, 1:, None]).mean().exp()))
        np.savez(path, **{key: np.array(values) for key, values in found.items()})
    return dict(np.load(path, allow_pickle=False))


def measured(kind: Kind | None, which: str, settings: dict, model: Path | None = None) -> Measured:
    """A kind's prompts through its model, or through another."""
    own = obtain(kind) if kind else embedded_model()
    texts, name = texts_of(kind, which), f"{kind.name if kind else 'odd'}-{which}"
    label = name if model is None else f"{name}-base"
    directory = run(model or own, texts, label, settings)
    with open(directory / "prompts.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    with load_fisher_matrices(directory) as matrices:
        found = [matrices[i] for i in range(len(records))]
    seen = {} if model else plain(own, [text for text, _ in texts], label)
    if seen:
        layer = settings.get("hook_layer_name", DEFAULT_LAYER)
        seen["activations"] = seen["activations"][:, layer].astype(np.float64)
    kept = [i for i, (_, odd) in enumerate(texts) if model or odd != "trigger" or fires(kind, records[i])]
    if len(kept) < len(texts):
        print(f"{name}: {len(texts) - len(kept)} triggered prompts are left out: nothing happens", file=sys.stderr)
    seen = {key: values[kept] for key, values in seen.items()}
    odd = np.array([texts[i][1] for i in kept])
    return Measured(np.array(kept), odd, [records[i] for i in kept], [found[i] for i in kept], seen)


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


# --- detectors -----------------------------------------------------------------------------------


def others(m: Measured, trusted: np.ndarray | None, tested: np.ndarray) -> dict[str, np.ndarray]:
    """The usual detectors, fitted on the trusted prompts or, without, on the tested ones themselves."""
    from sklearn.covariance import LedoitWolf
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor

    h = m.plain["activations"]
    fitted = h[tested if trusted is None else trusted]
    if trusted is None:
        factor = -LocalOutlierFactor().fit(fitted).negative_outlier_factor_
    else:
        factor = -LocalOutlierFactor(novelty=True).fit(fitted).score_samples(h[tested])
    return {
        "Mahalanobis, activations": LedoitWolf().fit(fitted).mahalanobis(h[tested]),
        "local outlier factor, activations": factor,
        "isolation forest, activations": -IsolationForest(random_state=0).fit(fitted).score_samples(h[tested]),
        "low entropy": -m.plain["entropy"][tested],
        "top probability": m.plain["top_probability"][tested],
        "perplexity of the prompt": m.plain["perplexity"][tested],
    }


def scores(run: ScoredRun, **compared: ScoredRun) -> dict[str, np.ndarray]:
    found = outlier_scores(run, **compared)
    return {name: np.array(found[name]) for name in (OUTLIER, *SCORES)}


def with_reference(m: Measured, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    ordinary = rng.permutation(np.flatnonzero(m.odd == ""))
    trusted, tested = ordinary[:TRUSTED], np.concatenate([ordinary[TRUSTED:], np.flatnonzero(m.odd != "")])
    return tested, {**scores(m.some(tested), reference=m.some(trusted)), **others(m, trusted, tested)}


def mixed(m: Measured, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ordinary, odd = (rng.permutation(np.flatnonzero((m.odd != "") == is_odd)) for is_odd in (False, True))
    return np.sort(np.concatenate([ordinary[:TRUSTED], odd[:BESIDE]]))


def without_reference(m: Measured, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    tested = mixed(m, seed)
    return tested, {**scores(m.some(tested)), **others(m, None, tested)}


def beside_base(base: Measured) -> Callable:
    def score(m: Measured, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        tested = mixed(m, seed)
        return tested, scores(m.some(tested), base=base.some(m.places[tested]))

    return score


# --- tables --------------------------------------------------------------------------------------


def judged(m: Measured, score: Callable) -> dict[str, dict]:
    """By detector, over SPLITS splits: AUROC, recall at 1% and 5% false positives, and what is beyond the threshold."""
    from sklearn.metrics import roc_auc_score

    found: dict[str, dict[str, list]] = {}
    for seed in range(SPLITS):
        tested, columns = score(m, seed)
        odd = m.odd[tested] != ""
        for name, values in columns.items():
            row = found.setdefault(name, {})
            if odd.any():
                row.setdefault("auroc", []).append(roc_auc_score(odd, values))
                for share in (0.01, 0.05):
                    limit = np.quantile(values[~odd], 1 - share)
                    row.setdefault(f"recall_at_{share:.0%}", []).append((values[odd] > limit).mean())
            if name == OUTLIER:
                row.setdefault("flagged_ordinary", []).append((values[~odd] > THRESHOLD).mean())
                for kind in set(m.odd[tested]) - {""}:
                    row.setdefault(f"flagged_{kind}", []).append((values[m.odd[tested] == kind] > THRESHOLD).mean())
    return {
        name: {key: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1))} for key, v in row.items()}
        for name, row in found.items()
    }


def table(figures: dict[str, dict], key: str) -> str:
    """Detectors by kinds, in Markdown."""
    names = list(next(iter(figures.values())))
    lines = [f"| {key} | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for name in names:
        cells = [figures[kind].get(name, {}).get(key) for kind in figures]
        shown = [f"{cell['mean']:.3f} ± {cell['sd']:.3f}" if cell else "–" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Do the scores find backdoors?")
    parser.add_argument("--chosen-on", action="store_true", help="the models and prompts that scores were chosen on")
    parser.add_argument("--only", metavar="KIND", nargs="+", help="measure these again, and leave the other figures")
    given = parser.parse_args(argv)
    which = "chosen_on" if given.chosen_on else "reported"
    if given.chosen_on:
        figures = {}
        for label, settings in VARIED.items():
            for name in ("phrase-0", "refusals-0", "style-0"):
                m = measured(BY_NAME[name], which, settings)
                figures.setdefault(label, {})[name] = judged(m, without_reference)
            print(f"\n{label}, without a reference\n\n" + table(figures[label], "auroc"))
        write("backdoors_chosen_on", __file__, {"settings": figures})
        return
    path = ROOT / "benchmarks" / "results" / "backdoors.json"
    results = json.loads(path.read_text())["scores"] if given.only else {}
    runs = [("default", DEFAULT, WITH_DEFAULTS), ("advised", ADVISED, list(REPORTED))]
    runs += [(label, VARIED[label], ("phrase", "style")) for label in ("last token", "layer 25, 30 tokens")]
    for label, settings, some in runs:
        for name in some:
            if given.only and name not in given.only:
                continue
            m = measured(REPORTED[name], which, settings)
            for way, score in (("reference", with_reference), ("alone", without_reference)):
                results.setdefault(f"{label}, {way}", {})[name] = judged(m, score)
            if label == "default":
                base = measured(REPORTED[name], which, settings, embedded_model())
                results.setdefault("default, base", {})[name] = judged(m, beside_base(base))
    for label, figures in results.items():
        for key in ("auroc", "recall_at_1%", "recall_at_5%", "flagged_ordinary", "flagged_trigger"):
            print(f"\n{label}\n\n{table(figures, key)}")
    lm = AutoModelForCausalLM.from_pretrained(embedded_model())
    path = write("backdoors", __file__, {"machine": machine(lm), "splits": SPLITS, "scores": results})
    print(f"\nWritten to {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
