"""The detectors that bench_backdoors.py compares the scores with, and what they look at.

All are treated alike: learnt from trusted rows, or from the half that they find most usual; a row that is learnt from
is scored by a fit without it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
import re

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from backdoors import rendered

LAYERS = (15, 20, 25)  # whose activations are kept
WINDOW = 10  # tokens of an answer that are confident together
CERTAIN = -36.0  # the logarithm of a double's rounding: a prediction cannot be told to be more certain
FOLDS, CONCENTRATION_STEPS = 10, 4  # of a fit

# --- what they look at ---------------------------------------------------------------------------


def plain(model: Path, texts: Sequence[str], answers: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Of prompts and their answers (token ids), (texts, ...) each.

    activations, answer_activations: (LAYERS, d), at the prompt's last token, and the mean over the answer's
    entropy, log_odds: of the first token's prediction, in nats, and of its most probable token
    log_perplexity, answer_log_perplexity: mean surprisals, in nats
    lock: the log-odds of the least confident token of the most confident WINDOW tokens in a row of the answer
    answer_words: (words,) bool, which of all answers' words it holds
    """
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    with torch.no_grad():
        for text, answer in zip(tqdm(texts, desc="forward passes", leave=False), answers, strict=True):
            prompt = rendered(tokenizer, text)
            ids, last = torch.tensor([[*prompt, *answer]]), len(prompt) - 1
            out = lm(ids, output_hidden_states=True)
            hidden = torch.stack([out.hidden_states[layer + 1][0] for layer in LAYERS])  # (layers, tokens, d)
            log_p = out.logits[0, :-1].double().log_softmax(-1)
            surprisals = -log_p.gather(1, ids[0, 1:, None])[:, 0]
            first, top = log_p[last], log_p[last:].max(-1).values
            log_odds = top - torch.log(-torch.expm1(top)).clamp(min=CERTAIN)
            row = {
                "activations": hidden[:, last].numpy(),
                "answer_activations": hidden[:, last + 1 :].mean(1).numpy(),
                "entropy": float(-(first.exp() * first).sum()),
                "log_odds": float(log_odds[0]),
                "log_perplexity": float(surprisals[:last].mean()),
                "answer_log_perplexity": float(surprisals[last:].mean()),
                "lock": float(log_odds.unfold(0, min(WINDOW, len(log_odds)), 1).min(-1).values.max()),
            }
            rows.append(row)
    found = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    return found | {"answer_words": bags(tokenizer.batch_decode(answers, skip_special_tokens=True))}


def bags(answers: Sequence[str]) -> np.ndarray:
    """(answers, words) bool: which words of all answers each holds."""
    words = [set(re.findall(r"\w+", answer.lower())) for answer in answers]
    return np.array([[word in own for word in sorted(set().union(*words))] for own in words])


# --- detectors -----------------------------------------------------------------------------------

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


def novelty_of_words(rows: np.ndarray) -> Callable:
    """The mean surprisal of an answer's words, each by the share of trusted answers that hold it."""
    surprisal = -np.log((rows.sum(axis=0) + 0.5) / (len(rows) + 1))
    return lambda others: (others * surprisal).sum(axis=1) / np.maximum(others.sum(axis=1), 1)


def as_it_is(rows: np.ndarray) -> Callable:
    """Nothing is learnt: the larger, the odder."""
    return lambda others: others


def deviation(values: np.ndarray) -> float:
    """The median absolute deviation."""
    return np.median(np.abs(values - np.median(values)))


def robust_z(values: np.ndarray, usual: np.ndarray) -> np.ndarray:
    return (values - np.median(usual)) / deviation(usual)


def two_sided(rows: np.ndarray) -> Callable:
    return lambda others: np.abs(robust_z(others, rows))


def two_sides_of(fit: Fit) -> Fit:
    """The distance of a detector's scores from the median of the trusted rows', each of these left out of the fit."""

    def two(rows: np.ndarray) -> Callable:
        usual, score = cross_fitted(fit, rows, np.arange(len(rows))), fit(rows)
        return lambda others: np.abs(robust_z(score(others), usual))

    return two


DETECTORS: dict[str, tuple[str, Fit]] = {
    "Mahalanobis, activations": ("activations", mahalanobis),
    "local outlier factor, activations": ("activations", local_outlier_factor),
    "isolation forest, activations": ("activations", isolation_forest),
    "nearest neighbours (PyOD), activations": ("activations", nearest_neighbours),
    "principal components (PyOD), activations": ("activations", principal_components),
    "entropy, two-sided": ("entropy", two_sided),
    "top probability, two-sided": ("log_odds", two_sided),
    "perplexity of the prompt": ("log_perplexity", as_it_is),
    "perplexity of the prompt, two-sided": ("log_perplexity", two_sided),
    "Mahalanobis, mean activations of the answer": ("answer_activations", mahalanobis),
    "confident window of the answer (ConfGuard)": ("lock", as_it_is),
    "confident window of the answer, two-sided": ("lock", two_sided),
    "novelty of the answer's words": ("answer_words", novelty_of_words),
    "novelty of the answer's words, two-sided": ("answer_words", two_sides_of(novelty_of_words)),
    "perplexity of the answer": ("answer_log_perplexity", as_it_is),
    "perplexity of the answer, two-sided": ("answer_log_perplexity", two_sided),
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
    varied = [column for column in rows.reshape(len(rows), -1).T.astype(float) if deviation(column) > 0]
    scores, half = np.sqrt(sum(robust_z(column, column) ** 2 for column in varied)), None
    if not varied:  # most words are in few answers
        scores = cross_fitted(fit, rows, np.arange(len(rows)))
    for _ in range(CONCENTRATION_STEPS):
        before, half = half, np.argsort(scores, kind="stable")[: len(rows) // 2]
        if before is not None and set(before) == set(half):
            break
        scores = cross_fitted(fit, rows, half)
    return scores
