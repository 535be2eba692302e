"""README and docs: every command and Python block runs, every link leads somewhere."""

import ast
import importlib
from pathlib import Path
import re
import shlex
from typing import NamedTuple

import pytest

from scripts import ROOT

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")), "benchmarks/README.md"]
LONG = ("docs/cookbook.md",)  # its blocks run with `pytest -m long`
SCRIPTS = ("core_experiment.py", "compute_fisher.py")
# What is added to each command, so that it takes seconds: the later of two flags counts.
SMALLER = {
    "core_experiment.py": ["--num-sentences", "2", "--layers", "0", "5", "10", "15", "--max-vocab-subset", "20"],
    "compute_fisher.py": ["--num-prompts", "6", "--hook-layer-name", "28", "--top-k-tokens", "3", "--overwrite"],
}
OTHER_COMMANDS = ("pip install ", "python -m pytest", "python -m venv ", "source ", "hf auth login", "sbatch ", "git ")


class Block(NamedTuple):
    language: str
    needs_hub: bool  # it is only parsed
    text: str


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    found = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)
    return [Block(language, "needs-hub" in info, text) for language, info, text in found]


def commands(text: str) -> list[str]:
    """One command each, of lines that may go on after a backslash or hold several."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = (part.strip() for line in lines for part in re.split(r"&&|;", line.partition(" #")[0]))
    return [part for part in parts if part and not part.startswith("#")]


def script_words(command: str) -> tuple[str, list[str]] | None:
    """The script that a command starts, with python or torchrun, and the words after it."""
    words = shlex.split(command)
    found = [word for word in words if word in SCRIPTS]
    return (found[0], words[words.index(found[0]) + 1 :]) if found else None


def parse(command: str):
    """The script's own settings of a command; ends the program if it cannot be parsed."""
    script, words = script_words(command)
    module = importlib.import_module(script.removesuffix(".py"))
    return module, module.parse(words)


def all_commands() -> list[tuple[str, str]]:
    """Those of the pages' blocks, of the Slurm script, and of the scripts' own docstrings."""
    found = [(page, c) for page in PAGES for b in blocks(page) if b.language == "bash" for c in commands(b.text)]
    found += [("docs/slurm.sh", c) for c in commands(read("docs/slurm.sh")) if c.startswith("srun")]
    for script in SCRIPTS:
        lines = ast.get_docstring(ast.parse(read(script))).splitlines()
        found += [(script, line.strip()) for line in lines if re.match(r" +(python|torchrun) ", line)]
    return found


@pytest.mark.parametrize(("page", "command"), all_commands())
def test_every_command_is_one_that_exists(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    if script_words(command):
        parse(command)
    elif match := re.match(r"python (\S+\.py)", command):
        assert (ROOT / match[1]).is_file()
    else:
        assert command.startswith(OTHER_COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_every_script_that_is_named_exists(page):
    for name in re.findall(r"(?:python|torchrun) (?:[^`\n]* )?([\w/]+\.py)", read(page)):
        assert (ROOT / name).is_file(), name


def run(command: str) -> None:
    script, words = script_words(command)
    module = importlib.import_module(script.removesuffix(".py"))
    settings = module.parse(words)
    if not settings.redraw:
        smaller = SMALLER[script][2 if getattr(settings, "prompt", None) else 0 :]  # prompts are all taken
        settings = module.parse([*words, *smaller])
    assert module.main(settings) == 0, command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a reader is: in the repository, but for what the commands write."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("data", "configs", "config.yaml", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    return folder


# README comes first: it says how the results are made that the other pages read.
@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.long] if p in LONG else []) for p in PAGES])
def test_a_page_runs_from_top_to_bottom_as_it_stands(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {"__name__": page}
    for block in blocks(page):
        if block.language == "python":
            code = compile(block.text, page, "exec")
            if not block.needs_hub:
                exec(code, names)
        elif block.language == "bash" and not block.needs_hub:
            for command in commands(block.text):
                if script_words(command) and not command.startswith("torchrun"):
                    run(command)
    shown = capsys.readouterr().out
    if page == "README.md":
        assert "nats; predicted" in shown and "6 prompts; (576, 3) (3,) (3, 576)" in shown
        top, whole = (names[name].eigenpairs() for name in ("top", "whole"))
        assert whole.values.shape == (30, 1) and whole.vectors.shape == (30, 1, 576)
        assert ((top.values / whole.values > 0.5) & (top.values / whole.values < 1)).all()


def test_the_readme_can_be_read_in_two_minutes():
    assert len(read("README.md").splitlines()) <= 150


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_anchor_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
