"""Progress where there is no terminal: a line at most once a minute."""

import io
import sys

import pytest
from tqdm import auto

from residual_fisher.common import progress


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
