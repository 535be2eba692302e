"""The folder listing is the architecture: which module may import which."""

import ast
from graphlib import TopologicalSorter

import pytest

from scripts import ROOT

# what each script, wing and layer may import beside itself: only what is below it
BELOW = {
    "core_experiment": {"experiment", "fisher", "model", "common"},
    "compute_fisher": {"pipeline", "fisher", "model", "common"},
    "experiment": {"fisher", "model", "common"},
    "pipeline": {"fisher", "model", "common"},
    "residual_fisher": {"experiment", "pipeline"},  # the package itself: what reads results
    "fisher": {"model", "common"},
    "model": {"common"},
    "common": set(),
}
FILES = [path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *ROOT.glob("*/**/*.py")]]
FILES = [path for path in FILES if path.parts[0] not in ("tests", "benchmarks")]
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in FILES}


def imports(module: str) -> set[str]:
    """The modules of this project that one imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(filter(None, [module.rpartition(".")[0] if node.level else "", node.module]))
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def room(module: str) -> str:
    return module.removeprefix("residual_fisher.").partition(".")[0]


def test_the_root_has_three_modules_and_a_package_of_four_rooms():
    assert set(map(room, MODULES)) == BELOW.keys()
    assert {path.stem for path in FILES if len(path.parts) == 1} == {"core_experiment", "compute_fisher", "fisher"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module):
    """So the wings never import each other, and nothing imports a script."""
    imported = set(map(room, imports(module) - {"residual_fisher"}))
    assert imported - {room(module)} <= BELOW[room(module)]


def test_there_is_no_circle():
    TopologicalSorter(
        {module: imports(module) - {module, module.rpartition(".")[0], "residual_fisher"} for module in MODULES}
    ).prepare()
