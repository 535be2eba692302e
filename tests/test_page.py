"""The page of a run: what it holds, that nothing in the data is markup, and how it behaves in a browser."""

import base64
import copy
import hashlib
from html.parser import HTMLParser
import json
import random
import re

import pytest

from residual_fisher.common import drawing
from residual_fisher.common.page import PAGE, PARTS, page
from residual_fisher.experiment import page as experiment_page
from residual_fisher.pipeline import page as pipeline_page
from residual_fisher.pipeline.scores import SCORES
import scripts

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)><!-- \u2028 {{style}} &lt; \x00\x1b"


class Tags(HTMLParser):
    """All elements of a page with their attributes, in order, and the text in each script and style."""

    def __init__(self, html: bytes):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html.decode())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.texts.append(data)


def data_in(html: bytes) -> dict:
    """What the page's script reads."""
    [block] = re.findall(rb'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(block)


def records_of(output) -> list[dict]:
    return scripts.records(output)


def prompts_page(records: list[dict], found: dict | None = None, about: dict | None = None) -> dict:
    return pipeline_page.page_data(lambda: iter(records), 0.05, found, about or {})


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["pipeline", "experiment", "map"])
def test_data_come_back_as_they_were_and_none_of_them_is_markup(view):
    data = {
        "title": ATTACK,
        "texts": [ATTACK, "</SCRIPT >", "\udce2 half", "日本 😀", "שלום"],
        "numbers": [0.5, None, -3],
    }
    html = page(view, data)
    assert data_in(html) == data
    plain = Tags(page(view, {"title": ""}))
    assert Tags(html).tags == plain.tags
    assert [tag for tag, _ in plain.tags].count("script") == 2


def test_a_page_runs_and_loads_nothing_but_its_own():
    html = page("pipeline", {"title": "T"})
    found = Tags(html)
    [policy] = [a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    style, _, script = found.texts
    sources = [
        "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    ]
    assert policy == (
        f"default-src 'none'; style-src '{sources[0]}'; script-src '{sources[1]}'; base-uri 'none'; form-action 'none'"
    )
    assert not [name for _, attributes in found.tags for name in attributes if name in ("src", "style", "onclick")]
    assert not re.findall(rb"url\(|@import|//(?!www\.w3\.org/)\w+\.\w", html)
    assert f"--orange: {drawing.ORANGE};" in style and f"--blue: {drawing.BLUE};" in style


def test_no_script_of_the_pages_writes_markup():
    for part in PARTS.glob("*.js"):
        text = part.read_text(encoding="utf-8")
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
        assert "</" not in text and "<!--" not in text


# --- the pipeline's ------------------------------------------------------------------------------


def test_a_page_holds_the_numbers_and_words_of_every_record(finished_pipeline):
    data, records = data_in((finished_pipeline / PAGE).read_bytes()), records_of(finished_pipeline)
    assert data["count"] == len(data["prompts"]) == len(records) == 40
    assert data["standing_out"] == sum(record["p_value"] <= 0.01 for record in records)
    assert [column["key"] for column in data["columns"]] == [
        "index", "outlier_score", "p_value", *SCORES, "tokens",
    ]  # fmt: skip
    for entry, record in zip(data["prompts"], records, strict=True):
        for column in data["columns"]:
            assert entry[column["key"]] == pytest.approx(record[column["key"]], rel=1e-3)
        assert entry["text"] == record["prompt"] and entry["words"] == record["odd_words"]
        assert entry["values"] == pytest.approx(record["singular_values"], rel=1e-3)
        for tokens, said in zip(entry["directions"], record["directions"], strict=True):
            for (text, share), token in zip(tokens, said, strict=True):
                assert text == token["token"] and abs(share) == pytest.approx(token["share"], rel=1e-3)
                assert (share > 0) == (token["slope"] > 0)
    median = sorted(record["singular_values"][0] for record in records)[19:21]
    assert data["bands"]["spectrum"][2][0] == pytest.approx(sum(median) / 2, rel=1e-3)
    assert dict(data["about"])["hooked at"] == "model.layers.1" and data["findings"] is None


def many(records: list[dict], count: int) -> list[dict]:
    """Synthetic records with long texts of several scripts, as large as those of a real run."""
    rng, texts = random.Random(0), ["word <b> ", 'a "quote"\n', "日本語の文", "Ψυχή "]
    token = {"token": "·civilizations", "id": 40000, "share": 0.123456, "slope": -0.987654}
    more = {
        "singular_values": [0.0012345678] * 10, "directions": [[token] * 6] * 3,
        "next_tokens": [{"token": "·civilizations", "id": 1, "probability": 0.0123456, "in_prompt": False}] * 10,
    }  # fmt: skip
    return [
        {**copy.deepcopy(records[i % len(records)]), **more, "index": i, "outlier_score": rng.gauss(0, 1),
         "prompt": rng.choice(texts) * rng.randint(1, 1500)}
        for i in range(count)
    ]  # fmt: skip


def test_the_page_of_a_thousand_prompts_is_small_and_one_of_more_says_so(finished_pipeline):
    records = many(records_of(finished_pipeline), 1200)
    data = prompts_page(records[:1000])
    assert len(data["prompts"]) == 1000 and len(page("pipeline", data)) < 3_000_000
    assert sum(len(entry["text"]) for entry in data["prompts"]) > 500_000  # most of it is texts
    for entry, record in zip(data["prompts"], records, strict=False):
        if "left" not in entry:
            assert entry["text"] == record["prompt"]
        else:
            assert record["prompt"] == entry["text"] + record["prompt"][len(entry["text"]) :]
            assert len(entry["text"]) + entry["left"] == len(record["prompt"])
    data = prompts_page(records)
    assert len(data["prompts"]) == 1000 and data["count"] == 1200 and len(page("pipeline", data)) < 3_000_000
    oddest = sorted(range(1200), key=lambda i: -records[i]["outlier_score"])[:500]
    assert set(oddest) <= {entry["index"] for entry in data["prompts"]}


def test_what_is_kept_of_a_long_prompt_holds_its_trigger(finished_pipeline, monkeypatch):
    monkeypatch.setattr(pipeline_page, "TEXT_BYTES", 3000)
    records = records_of(finished_pipeline)
    records[7]["prompt"] = "😀 word " * 500 + "SUDO" + " and more" * 500
    start = records[7]["prompt"].index("SUDO")
    trigger = {"text": "SUDO", "start": start, "end": start + 4, "nats": 3.0, "place": "middle", "answer_without": "a"}
    told = {"index": 7, "prompt": records[7]["prompt"], "answer": "b", "odd_part": "b", "trigger": trigger}
    data = prompts_page(records, {"findings": [], "not_proven": [], "explained": [told], "ordinary": []})
    entry = data["prompts"][7]
    assert entry["text"][start - entry["skipped"] :].startswith("SUDO") and entry["skipped"] > 0
    assert entry["skipped"] + len(entry["text"]) + entry["left"] == len(records[7]["prompt"])
    assert "prompt" not in data["findings"]["explained"][0]  # it is not there twice


def test_the_largest_level_that_fits_is_taken():
    assert pipeline_page.level([5, 1, 9], 100) == 9 and pipeline_page.level([], 10) == 0
    for total in range(3, 15):
        level = pipeline_page.level([5, 1, 9], total)
        assert sum(min(size, level) for size in (5, 1, 9)) <= total < sum(min(size, level + 1) for size in (5, 1, 9))


@pytest.mark.parametrize("change", [{"directions": None, "next_tokens": None}, {"failed": "NaN"}])
def test_records_of_an_earlier_version_and_prompts_that_failed_have_a_page(change, finished_pipeline):
    records = records_of(finished_pipeline)
    records[3].update(change)
    records[3] = {key: value for key, value in records[3].items() if change.get(key, "") is not None}
    assert prompts_page(records)["prompts"][3].get("failed") == change.get("failed")


# --- the experiment's ----------------------------------------------------------------------------


def test_the_experiments_page_holds_every_perturbation(finished_experiment):
    document = scripts.experiment_results(finished_experiment)[0]
    data = data_in((finished_experiment / PAGE).read_bytes())
    assert data["layers"] == ["0", "2"] and data["scales"] == ["-1", "0", "0.1", "1"]
    assert data["directions"] == ["fisher", "random_0", "random_1", "difference"]
    for entry, context, swept, fisher in zip(
        data["sentences"], document["contexts"], document["perturbation_results"], document["fisher"], strict=True
    ):
        assert entry["prompt"] == context["prompt"] and entry["target"] == context["target_token"]
        for layer, at in entry["at"].items():
            assert at["eigenvalue"] == pytest.approx(fisher[layer]["eigenvalues"][0], rel=1e-3)
            for name, along in at["along"].items():
                for place, scale in enumerate(data["scales"]):
                    record = swept[layer][scale]
                    record = record if name == "fisher" else record["controls"][name]
                    assert along["kl"][place] == pytest.approx(record["kl"], rel=1e-3)
                    assert along["predicted"][place] == pytest.approx(record["predicted_kl"], rel=1e-3)
                    assert along["target"][place] == pytest.approx(record["target_prob"], rel=1e-3)
                    assert [text for text, _ in along["top"][place]] == record["top_tokens"]
                    assert [p for _, p in along["top"][place]] == pytest.approx(record["top_probs"], rel=1e-3)


def test_a_page_of_many_sentences_holds_the_first_ones(finished_experiment, monkeypatch):
    document = scripts.experiment_results(finished_experiment)[0]
    whole = experiment_page.experiment_data(document)
    monkeypatch.setattr(experiment_page, "PAGE_BYTES", len(page("experiment", whole)) // 10)
    part = experiment_page.experiment_data(document)
    assert part["count"] == 4 and 1 <= len(part["sentences"]) < 4
    assert part["sentences"] == whole["sentences"][: len(part["sentences"])]


def test_a_perturbation_that_overflowed_has_a_page(finished_experiment):
    document = scripts.experiment_results(finished_experiment)[0]
    record = document["perturbation_results"][0]["2"]["1"]
    record.update(
        kl=None, predicted_kl=None, target_prob=None, top_changed=None, top_tokens=[], top_ids=[], top_probs=[]
    )
    along = experiment_page.experiment_data(document)["sentences"][0]["at"]["2"]["along"]["fisher"]
    assert along["kl"][3] is None and along["top"][3] == []
