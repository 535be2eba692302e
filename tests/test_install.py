"""Installed by pip, the project works from any directory."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

from scripts import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that pip has installed a copy of the project into, without its dependencies."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("site")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    source = tmp_path_factory.mktemp("source")  # pip builds in the source's folder
    for name in filter(None, files.split("\0")):
        if not name.startswith(("tests/", "docs/", "benchmarks/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", folder]
    subprocess.run([*pip, source], check=True, capture_output=True)
    return folder


def run(installed: Path, elsewhere: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *words], cwd=elsewhere, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_its_modules_and_data_come_along(installed, tmp_path):
    code = (
        "import fisher; from residual_fisher import load_fisher_matrices\n"
        "from residual_fisher.experiment.settings import Settings\n"
        "from residual_fisher.experiment.sentences import find_sentences\n"
        "print(fisher.__file__, len(find_sentences(Settings().data, 'animals').sentences))"
    )
    parts = {path.name for path in (ROOT / "residual_fisher" / "common" / "page_parts").iterdir()}
    assert {path.name for path in (installed / "residual_fisher" / "common" / "page_parts").iterdir()} == parts
    path, sentences = run(installed, tmp_path, "-c", code).split()
    assert path == str(installed / "fisher.py") and int(sentences) > 100


@pytest.mark.parametrize("command", ["core_experiment", "compute_fisher"])
def test_both_commands_are_their_scripts(command, installed, tmp_path):
    assert run(installed, tmp_path, str(installed / "bin" / command), "--help").startswith(f"usage: {command}.py")
