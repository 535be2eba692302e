"""Progress where there is no terminal: a line at most once a minute."""

import io
import json
import sys

import pytest
from tqdm import auto

import compute_fisher
from residual_fisher.common import progress
from residual_fisher.common.text import duration
from residual_fisher.pipeline import windows
from residual_fisher.pipeline.prompts import Encoded, Prompt
from residual_fisher.pipeline.settings import Settings
import scripts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_at_most_once_a_minute(clock, capsys):
    with progress.progress(200, "perturbing", "sentence", initial=50) as bar:
        for _ in range(60):
            clock[0] += 5.0
            bar.update()
            bar.set_postfix_str("9 tokens/s", refresh=False)
    assert capsys.readouterr().err.splitlines() == [
        "perturbing: 62 of 200 sentences, 1 min, about 12 min left, 9 tokens/s",
        "perturbing: 74 of 200 sentences, 2 min, about 10 min left, 9 tokens/s",
        "perturbing: 86 of 200 sentences, 3 min, about 9.5 min left, 9 tokens/s",
        "perturbing: 98 of 200 sentences, 4 min, about 8.5 min left, 9 tokens/s",
        "perturbing: 110 of 200 sentences, 5 min, about 7.5 min left, 9 tokens/s",
    ]


def test_of_an_unknown_number_nothing_is_said_to_be_left(clock, capsys):
    with progress.progress(None, "Fisher matrices", "prompt") as bar:
        clock[0] += 61
        bar.update(7)
        clock[0] += 58
        bar.update(2)
    assert bar.n == 9 and capsys.readouterr().err == "Fisher matrices: 7 prompts, 1 min\n"


def test_a_terminal_has_a_bar_and_a_silent_process_nothing(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress(3, "perturbing", "sentence") as bar:
        assert isinstance(bar, auto.tqdm)
        bar.update(3)
    assert "\rperturbing: 100%" in terminal.getvalue()
    said = terminal.getvalue()
    with progress.progress(3, "perturbing", "sentence", shown=False) as bar:
        bar.update(3)
    assert terminal.getvalue() == said


def test_a_notebook_has_its_own_bar(monkeypatch):
    made = []
    monkeypatch.setattr(auto, "notebook_tqdm", object)
    monkeypatch.setattr(auto, "tqdm", lambda **options: made.append(options))
    progress.progress(3, "perturbing", "sentence")
    assert made == [{"total": 3, "desc": "perturbing", "unit": "sentence", "initial": 0, "disable": False}]


def test_items_are_tracked_one_by_one(clock, capsys):
    seen = []
    for item in progress.tracked("abc", "Proving", "span"):
        clock[0] += 60
        seen.append(item)
    assert seen == list("abc")
    assert capsys.readouterr().err.splitlines() == [
        "Proving: 1 of 3 spans, 1 min, about 2 min left", "Proving: 2 of 3 spans, 2 min, about 1 min left",
        "Proving: 3 of 3 spans, 3 min, about 0 s left",
    ]  # fmt: skip


# --- prompts, of which the longest come first -----------------------------------------------------


def test_of_uneven_items_only_the_caller_says_how_long_is_left(clock, monkeypatch, capsys):
    with progress.progress(200, "Fisher matrices", "prompt", even=False) as bar:
        clock[0] += 61
        bar.set_postfix_str("about 3 min left", refresh=False)
        bar.update(2)
    assert capsys.readouterr().err == "Fisher matrices: 2 of 200 prompts, 1 min, about 3 min left\n"
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.progress(3, "Fisher matrices", "prompt", even=False) as bar:
        bar.set_postfix_str("about 3 min left", refresh=False)
        bar.update(1)
        bar.refresh()
    assert "| 1/3 [00:00, about 3 min left]" in terminal.getvalue() and "?" not in terminal.getvalue()


def batches_of(lengths: list[list[int]]) -> list[list[Encoded]]:
    return [[Encoded(Prompt(0, 0, ""), [0] * length, False) for length in batch] for batch in lengths]


def seconds_of(batch: list[Encoded]) -> float:
    """What a batch takes here: in proportion to padded tokens, and to what every pass costs."""
    return 0.01 * (len(batch) * max(len(encoded.ids) for encoded in batch) + 256)


def test_what_is_left_is_told_by_tokens_and_at_once(clock, monkeypatch):
    monkeypatch.setattr(windows, "monotonic", lambda: clock[0])
    pace = windows.Pace(Settings(num_prompts=40, batch_size=2), processes=1)
    assert pace.seconds_left() is None
    first, second = batches_of([[900, 800], *[[20, 10]] * 15]), batches_of([[30, 30]] * 4)
    left = sum(map(seconds_of, first))
    later = left * 8 / 32  # the 8 prompts of the next window are taken to be like these
    for numbers, window in ((range(32), first), (range(32, 40), second)):
        pace.plan(windows.Window(numbers, window, 0))
        for batch in window:
            clock[0] += seconds_of(batch)
            left -= seconds_of(batch)
            pace.finish(batch)
            assert pace.seconds_left() == pytest.approx(left + later, abs=1e-9)
        left, later = sum(map(seconds_of, second)), 0
    assert pace.told() == f"about 0 s left, {2390 / (clock[0] - 1000):.0f} tokens/s"


@pytest.mark.parametrize(("wanted", "numbers", "known"), [("all", 32, False), ("all", 31, True), (10**6, 31, True)])
def test_where_the_dataset_ends_is_known_when_it_has_ended(wanted, numbers, known, clock, monkeypatch):
    monkeypatch.setattr(windows, "monotonic", lambda: clock[0])
    pace = windows.Pace(Settings(num_prompts=wanted, batch_size=2), processes=1)
    window = batches_of([[5, 4], [3, 2]])
    pace.plan(windows.Window(range(numbers), window, numbers - 4))  # the others were finished earlier
    clock[0] += seconds_of(window[0])
    pace.finish(window[0])
    assert pace.seconds_left() == (pytest.approx(seconds_of(window[1])) if known else None)


def test_a_run_whose_longest_prompts_come_first_says_what_is_left(
    chat_directory, tmp_path, clock, capsys, monkeypatch, without_pictures
):
    """The lines of a log are right from the first on."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(windows, "monotonic", lambda: clock[0])
    ends, measure = [], compute_fisher.measure

    def taking_its_time(settings, subject, batch):
        clock[0] += seconds_of(batch)
        ends.append(clock[0])
        return measure(settings, subject, batch)

    monkeypatch.setattr(compute_fisher, "measure", taking_its_time)
    data = tmp_path / "data.jsonl"
    lengths = [55] * 2 + [1] * 22
    data.write_text(
        "".join(json.dumps({"prompt": "the " * length + str(i)}) + "\n" for i, length in enumerate(lengths))
    )
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    assert scripts.compute_fisher(chat_directory, data, tmp_path / "out", num_prompts=24) == 0
    first, *lines = [line for line in log.getvalue().splitlines() if line.startswith("Fisher matrices: ")]
    assert first == "Fisher matrices: 0 of 24 prompts, 0 s" and len(lines) == len(ends) == 12
    for line, end in zip(lines, ends, strict=True):
        assert f"about {duration(ends[-1] - end)} left, " in line
