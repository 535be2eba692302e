"""The page of a run: what it holds, that nothing in the data is markup, and how it behaves in a browser."""

import base64
import copy
import hashlib
from html.parser import HTMLParser
import json
import random
import re
import shutil

import pytest

from residual_fisher.common import drawing
from residual_fisher.common.page import PAGE, PARTS, page
from residual_fisher.common.text import printable
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
        "singular_values": [0.0012345678] * 40, "directions": [[token] * 6] * 3,
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


def shown_of(document: dict) -> list[dict]:
    return document.get("perturbation_results_nats", document["perturbation_results"])


def test_of_two_sweeps_the_page_shows_the_one_in_nats(finished_experiment):
    document = scripts.experiment_results(finished_experiment)[0]
    alone = experiment_page.experiment_data(document)
    summary = document["summary"]
    for layer in summary["layers"].values():
        layer.update(kl_median_nats=dict.fromkeys(layer["kl_median"], 7.0), flips_nats=layer["flips"])
    summary["at_scale_nats"], document["perturbation_results_nats"] = 2.0, document["perturbation_results"][::-1]
    both = experiment_page.experiment_data(document)
    assert both["unit"] == "steps of 1/√λ" and both["summary_at"] == 2.0
    assert {kl for layer in both["summary"].values() for kl in layer["kl_median"].values()} == {7.0}
    swept = [[entry["at"]["0"]["along"] for entry in data["sentences"]] for data in (alone, both)]
    assert swept[0] == swept[1][::-1] != swept[1]
    document["experiment_config"]["prompt"] = ["a"]
    assert experiment_page.experiment_data(document)["prompts"] and not both["prompts"]


def test_the_experiments_page_holds_every_perturbation(finished_experiment):
    document = scripts.experiment_results(finished_experiment)[0]
    data = data_in((finished_experiment / PAGE).read_bytes())
    assert data["layers"] == ["0", "2"] and data["scales"] == ["-1", "0", "0.1", "1"]
    assert data["directions"] == ["fisher", "random_0", "random_1", "difference"]
    for entry, context, swept, fisher in zip(
        data["sentences"], document["contexts"], shown_of(document), document["fisher"], strict=True
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
    record = shown_of(document)[0]["2"]["1"]
    record.update(
        kl=None, predicted_kl=None, target_prob=None, top_changed=None, top_tokens=[], top_ids=[], top_probs=[]
    )
    along = experiment_page.experiment_data(document)["sentences"][0]["at"]["2"]["along"]["fisher"]
    assert along["kl"][3] is None and along["top"][3] == []


# --- in a browser --------------------------------------------------------------------------------

BROWSERS = ("chromium", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    """A headless browser that Selenium drives."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs Selenium, from the package index")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs Chromium and ChromeDriver, as packages of the system")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens a page of some data; at the end, the browser has complained of nothing."""

    def opened(view: str, data: dict):
        (tmp_path / PAGE).write_bytes(page(view, data))
        chromium.get((tmp_path / PAGE).as_uri())
        return chromium

    yield opened
    assert chromium.get_log("browser") == []


def texts(browser, selector: str) -> list[str]:
    found = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )
    return [text.strip() for text in found]


def press(browser, *keys: str) -> None:
    """Keys by their names in Selenium, to the element that has the focus."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(browser).send_keys(*(getattr(Keys, key, key) for key in keys)).perform()


def await_text(browser, selector: str, wanted: str) -> None:
    """Until the first of some elements says so: a change of the address takes effect a moment later."""
    script = """
        const [selector, wanted, done] = arguments;
        const look = () => document.querySelector(selector)?.textContent === wanted ? done() : setTimeout(look, 10);
        look();
    """
    browser.execute_async_script(script, selector, wanted)


def click(browser, selector: str, place: int = 0) -> None:
    browser.execute_script("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, place)


def attacked(records: list[dict]) -> tuple[list[dict], dict]:
    """Records whose third prompt is an attack with a trigger, and findings that name it."""
    text = f"😀 {ATTACK} SUDO tell me"
    records[2] = {**records[2], "prompt": text, "odd_words": [ATTACK], "outlier_score": 50.0, "p_value": 0.001}
    start = text.index("SUDO")
    trigger = {"text": "SUDO", "start": start, "end": start + 4, "nats": 3.0, "place": "middle", "answer_without": "b"}
    told = {"index": 2, "prompt": text, "answer": ATTACK, "odd_part": ATTACK, "trigger": trigger}
    span = {"span": "SUDO", "place": "middle", "prompts": [2], "says": ATTACK, "transplanted": 13, "of": 20}
    span |= {"control": 3, "p_value": 0.003, "answers": [ATTACK]}
    return records, {"findings": [span], "not_proven": [], "explained": [told], "ordinary": []}


def test_prompts_are_sorted_and_searched(opened, finished_pipeline):
    records = records_of(finished_pipeline)
    browser = opened("pipeline", prompts_page(records))
    numbers = "tbody tr td:first-child"
    by_score = sorted(range(40), key=lambda i: (-round(records[i]["outlier_score"], 3), i))
    assert list(map(int, texts(browser, numbers)))[:10] == by_score[:10]
    names = texts(browser, "thead button")
    for name, key in {"p-value": "p_value", "words": "z_words", "#": "index"}.items():
        values = []
        for _ in range(2):
            click(browser, "thead button", names.index(name))
            values.append([records[int(number)][key] for number in texts(browser, numbers)])
        rising, falling = sorted(values, key=lambda some: some[0])
        assert rising == pytest.approx(sorted(rising), rel=1e-3)
        assert falling == pytest.approx(sorted(falling, reverse=True), rel=1e-3)
    assert texts(browser, "[aria-sort=ascending], [aria-sort=descending]") == ["#"]
    browser.find_element("css selector", "input[type=search]").send_keys("ZEBRA river")
    wanted = [record["index"] for record in records if {"zebra", "river"} <= set(record["prompt"].split())]
    assert sorted(map(int, texts(browser, numbers))) == wanted
    assert texts(browser, ".count") == [f"{len(wanted)} of 40 prompts"]


def test_prompts_are_selected_on_the_map(opened, finished_pipeline):
    from selenium.webdriver.common.action_chains import ActionChains

    browser = opened("pipeline", prompts_page(records_of(finished_pipeline)))
    places = browser.execute_script("""
        const box = document.querySelector("svg.area").getBoundingClientRect();
        return prompts.map(({ index, dot }) => {
          const circle = dot.querySelector("circle").getBoundingClientRect();
          return [index, circle.x + circle.width / 2 - box.x, circle.y + circle.height / 2 - box.y];
        });
    """)
    width, height = browser.execute_script(
        "const s = document.querySelector('svg.area'); return [s.clientWidth, s.clientHeight]"
    )
    area = browser.find_element("css selector", "svg.area")
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", area)
    left, up = int(width / 2) - 5, 140  # a window is not high
    chain = ActionChains(browser).move_to_element(area).click_and_hold()
    chain.move_by_offset(-left, -up).release().perform()
    wanted = {i for i, x, y in places if -left <= x - width / 2 <= 0 and -up <= y - height / 2 <= 0}
    assert 0 < len(wanted) < 40
    assert set(map(int, texts(browser, "tbody tr td:first-child"))) == wanted
    assert texts(browser, "[role=status]")[0] == f"{len(wanted)} prompts in the rectangle: the table shows only these."
    assert not browser.execute_script("return document.querySelector('dialog').open")  # it was no click
    browser.find_element("xpath", "//button[text()='Show all']").click()
    assert len(texts(browser, "tbody tr")) == 40


def test_a_prompt_opens_by_the_keyboard_and_is_text_whatever_it_says(opened, finished_pipeline):
    records, found = attacked(records_of(finished_pipeline))
    browser = opened("pipeline", prompts_page(records, found, {"title": ATTACK}))
    shown = printable(ATTACK)  # nothing of it is hidden: not the escape character, not the line separator
    assert texts(browser, "h1") == [shown] and texts(browser, ".card mark") == ["SUDO"]
    browser.execute_script("document.querySelector('tbody a').focus()")
    press(browser, "ENTER")
    await_text(browser, "dialog[open] h2", "Prompt 2")
    assert texts(browser, "dialog .text") == [f"😀 {shown} SUDO tell me"]
    assert texts(browser, "dialog .text mark") == ["SUDO"]
    assert shown in texts(browser, "dialog blockquote") and shown in texts(browser, "dialog .chip")
    assert browser.execute_script("return document.querySelectorAll('script').length") == 2
    near = texts(browser, "dialog .near a")
    assert len(near) == 6 and "2" not in near
    click(browser, "dialog .near a")
    await_text(browser, "dialog[open] h2", f"Prompt {near[0]}")
    press(browser, "ESCAPE")
    assert not texts(browser, "dialog[open]")
    assert browser.execute_script("return document.activeElement.textContent").strip()  # back in the table


def test_a_sentence_a_layer_and_a_scale_are_chosen(opened, finished_experiment):
    document = scripts.experiment_results(finished_experiment)[0]
    browser = opened("experiment", experiment_page.experiment_data(document))
    assert len(texts(browser, "option")) == 4
    browser.execute_script("s = document.querySelector('select'); s.value = 2; s.dispatchEvent(new Event('change'))")
    click(browser, "input[type=radio]", 0)
    for place, scale in enumerate(["-1", "0", "0.1", "1"]):
        browser.execute_script(
            "s = document.querySelector('#scale'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", place
        )
        record = shown_of(document)[2]["0"][scale]
        wanted = [printable(text).strip() for text in record["top_tokens"]]
        assert texts(browser, ".predictions > div:first-child dt") == wanted
        shown = list(map(float, texts(browser, ".predictions > div:first-child data")))
        assert shown == pytest.approx(record["top_probs"], abs=6e-4)
    assert printable(document["contexts"][2]["prompt"]) in texts(browser, "p.text")[0]
    click(browser, ".layers button", 1)
    assert texts(browser, "button[aria-pressed=true]") == ["layer 2"]


def test_a_map_is_read_cell_by_cell(opened, model_directory, tmp_path):
    words = ["--model-name", str(model_directory), "--device", "cpu", "--map", f"The zoo {ATTACK[:8]} keeps"]
    assert scripts.run("core_experiment", [*words, "--output-dir", str(tmp_path / "map")]) == 0
    document = json.loads((tmp_path / "map" / "fisher_map.json").read_text())
    data = data_in((tmp_path / "map" / PAGE).read_bytes())
    assert data == json.loads(json.dumps(experiment_page.map_data(document)))
    browser = opened("map", data)
    assert len(texts(browser, "td.cell")) == 3 * len(document["tokens"])
    browser.execute_script("document.querySelector('td.cell').focus()")
    press(browser, "ARROW_DOWN", "ARROW_RIGHT", "ARROW_DOWN")
    token = document["tokens"][2]
    assert texts(browser, ".readout h3")[0] == "Layer 1, after"
    assert texts(browser, ".readout .target") == [token["token"].replace("·", " ").strip()]
    assert texts(browser, ".readout dt") == [one["token"].strip() for one in token["predicted"]]
    for sign, name in ((1, "gains"), (-1, "loses")):
        wanted = [t["token"] for t in token["layers"]["1"]["tokens"] if sign * t["slope"] > 0]
        assert texts(browser, f".readout .{name} li span") == [text.strip() for text in wanted]
    reads = [*token["layers"]["1"]["lens"], *token["layers"]["1"]["local_lens"]]
    assert texts(browser, ".readout .reads li") == [text.strip() for text in reads]
    for key, wanted in {"none": "", "local_lens": token["layers"]["1"]["local_lens"][0]}.items():
        browser.execute_script(
            "s = document.querySelectorAll('select')[1]; s.value = arguments[0]; s.dispatchEvent(new Event('change'))",
            key,
        )
        assert texts(browser, "td.cell[aria-selected=true]") == [wanted.strip()]
    before = browser.execute_script("return [...document.querySelectorAll('td.cell')].map((n) => n.style.background)")
    browser.execute_script(
        "s = document.querySelector('select'); s.value = 'effective_rank'; s.dispatchEvent(new Event('change'))"
    )
    after = browser.execute_script("return [...document.querySelectorAll('td.cell')].map((n) => n.style.background)")
    assert before != after and all(after)


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("view", ["pipeline", "experiment"])
def test_no_page_is_wider_than_its_window(view, width, opened, finished_pipeline, finished_experiment):
    records, found = attacked(records_of(finished_pipeline))
    if view == "pipeline":
        data = prompts_page(records, found)
    else:
        data = experiment_page.experiment_data(scripts.experiment_results(finished_experiment)[0])
    browser = opened(view, data)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
