"""What stands behind `core_experiment.py`, `compute_fisher.py` and `fisher.py`. It reads what the two have written:

from residual_fisher import load_fisher_matrices, load_results
"""

import runpy

__all__ = ["FisherMatrices", "Triplets", "load_fisher_matrices", "load_results"]


def __getattr__(name: str):
    """Imports what is asked for, and no earlier: the scripts import parts of the package before slow libraries."""
    if name == "load_results":
        from residual_fisher.experiment.frame import load_results

        return load_results
    if name in __all__:
        from residual_fisher.pipeline import matrices

        return getattr(matrices, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The commands that pip installs: each is its script, from the first line to the last.


def core_experiment() -> None:
    runpy.run_module("core_experiment", run_name="__main__", alter_sys=True)


def compute_fisher() -> None:
    runpy.run_module("compute_fisher", run_name="__main__", alter_sys=True)
