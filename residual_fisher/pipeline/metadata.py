"""A run's metadata: what it is of, and by what its files are known again."""

import os
from pathlib import Path

from residual_fisher.common.files import sha256
from residual_fisher.common.options import parse_values
from residual_fisher.common.text import excerpt
from residual_fisher.pipeline.store import ARRAYS, FOLDER, INDEX, PROMPTS, SHARD

FORMAT = "residual-fisher/1"
METADATA = "metadata.yaml"
SPECTRA = "fisher_spectra.png"
MAX_HASHED = 1 << 30  # bytes of a file: of a larger one only the size is compared
# what a run's metadata has from its start
KEYS = {"complete": bool, "config": dict, "sources": dict, "hook_layer": str, "model_fingerprint": str}


def read_metadata(directory: Path) -> dict | None:
    """What is certain to have what this project reads of it, or None."""
    try:
        found = parse_values((directory / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if _is_metadata(found) else None


def _is_metadata(found) -> bool:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return False
    if not all(isinstance(found.get(key), kind) for key, kind in KEYS.items()):
        return False
    if not all(isinstance(value, str | int | float | None) for value in found["config"].values()):
        return False
    return not found["complete"] or _are_seals(found.get("files"))


def _are_seals(files) -> bool:
    """Whether these are the files of a finished run: the records, the picture, and the arrays in one file or shards."""
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files):
        return False
    arrays = files.keys() - {PROMPTS, SPECTRA}
    own = (ARRAYS, f"{FOLDER}/{INDEX}")
    known = all(name in own or SHARD.fullmatch(name.removeprefix(f"{FOLDER}/")) for name in arrays)
    return known and len(arrays) > 0 and {PROMPTS, SPECTRA} <= files.keys()


def shown(value) -> str:
    return excerpt(repr(value), 60)


def seal(path: Path) -> list | None:
    """Size and hash of a file, by which a change is seen; None if it is not there."""
    if not os.path.isfile(path):  # a name may be too long for a path
        return None
    size = path.stat().st_size
    return [size, sha256(path) if size <= MAX_HASHED else None]
