"""A pipeline run's output directory: begun, gone on with, finished."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
import json
from pathlib import Path
import zipfile

import numpy as np
import yaml

from arguments import printable
from errors import UserError
import report
import scores
from settings import INCIDENTAL, Settings
from shards import ARRAYS, FOLDER, Store, load_fisher_matrices
import spectra
import storage

FORMAT = "residual-fisher/1"
METADATA = "metadata.yaml"
PROMPTS = spectra.PROMPTS
FILES = (ARRAYS, PROMPTS, METADATA, spectra.SPECTRA)
TOGETHER = 64  # prompts scored at once
STANDING_OUT = 5  # prompts named at the end


def _metadata(directory: Path) -> dict | None:
    """What the directory's metadata says; None if it holds nothing.

    Raises:
        UserError: it holds files of another making.
    """
    path = directory / METADATA
    foreign = UserError(f"{directory} holds files that compute_fisher.py did not write: choose another --output-dir")
    if not path.is_file():
        # a killed process may have left what was to become the metadata
        names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
        if any(not name.startswith(f".{METADATA}-") for name in names) or directory.is_file():
            raise foreign
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise foreign from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise foreign
    return found


def _write_metadata(directory: Path, metadata: dict) -> None:
    with storage.atomic_open(directory / METADATA) as file:
        text = yaml.safe_dump(storage.plain(metadata), sort_keys=False, allow_unicode=True, width=110)
        file.write(text.encode())


def is_finished(settings: Settings, overwrite: bool) -> bool:
    """Whether the output directory already holds all that these settings ask for.

    Raises:
        UserError: it cannot be written to, is not this script's, or holds a run with other settings.
    """
    directory = Path(settings.output_dir)
    store = Store(directory, settings.store)
    found = _metadata(directory)
    storage.check_writable(directory)
    if found is None or overwrite:
        return False
    then, now = found["config"], asdict(settings)
    differing = [key for key in now if key not in INCIDENTAL and then.get(key) != now[key]]
    if differing and (found["complete"] or store.has_results()):
        said = ", ".join(f"{key} was {then.get(key)!r} and is {now[key]!r}" for key in differing)
        raise UserError(f"{directory} holds a run with other settings ({said}): --overwrite removes it")
    return found["complete"] and not differing


def begin(settings: Settings, identity: dict, environment: dict, overwrite: bool) -> None:
    """Makes the output directory ready: emptied of an earlier run, or checked to be of the same model.

    Raises:
        UserError: it holds results of another model.
    """
    directory = Path(settings.output_dir)
    store = Store(directory, settings.store)
    found = _metadata(directory)
    if overwrite and found is not None:
        # Killed in between, the directory is still this script's, and unfinished.
        _write_metadata(directory, {**found, "complete": False})
        store.remove()
        for name in FILES:
            if name != METADATA:
                (directory / name).unlink(missing_ok=True)
    elif found is not None and store.has_results():
        for key, now in identity.items():
            if found[key] != now:
                said = f"{key} was {found[key]!r} and is {now!r}"
                raise UserError(f"{directory} holds a run of another model ({said}): --overwrite removes it")
    store.remove_leftovers(FILES)
    about = {"format": FORMAT, "complete": False, **identity, "config": asdict(settings), "environment": environment}
    _write_metadata(directory, about)


def finish(settings: Settings, store: Store, per_shard: int, skipped: int) -> str:
    """Turns a run whose shards are all there into its final files, and says what it found.

    Interrupted at any point, it can be called again.

    Raises:
        UserError: a shard is damaged, or a file cannot be written.
    """
    directory = store.directory
    try:
        columns = _columns(store.records())
        count = len(columns["tokens"])
        store.close(count, per_shard)
    except zipfile.BadZipFile as error:
        raise UserError(f"a file in {store.folder} is damaged ({error}): the same command computes it again") from error
    with load_fisher_matrices(directory) as matrices:
        scored = standing_out(matrices)
        bias_dim, num_singular_values = matrices[0].U.shape
    with storage.atomic_open(directory / PROMPTS) as file:
        for index, record in enumerate(store.records()):
            record.update({name: column[index].tolist() for name, column in scored.items()})
            file.write((json.dumps(storage.plain(record), ensure_ascii=False) + "\n").encode())
    spectra.draw(directory)
    metadata = _metadata(directory)
    statistics = summarize(columns, skipped)
    metadata.update(
        complete=True,
        num_prompts=count,
        bias_dim=bias_dim,
        num_singular_values=num_singular_values,
        arrays=ARRAYS if (directory / ARRAYS).exists() else f"{FOLDER}/",
        statistics=statistics,
    )
    _write_metadata(directory, metadata)
    if (directory / ARRAYS).exists():
        store.remove()
    return final_table(directory, statistics)


def clean_up(settings: Settings) -> None:
    """Removes shards that a finished run was stopped from removing."""
    directory = Path(settings.output_dir)
    if (directory / ARRAYS).exists():
        Store(directory, settings.store).remove()


def _columns(records: Iterable[dict]) -> dict[str, np.ndarray]:
    """What the summary needs of all records, as arrays: there may be millions."""
    keys = ("tokens", "truncated", "captured_mass", "trace", "effective_rank", "seconds")
    rows = ([*(record[key] for key in keys), record["singular_values"][0]] for record in records)
    table = np.fromiter(chain.from_iterable(rows), dtype=np.float64).reshape(-1, len(keys) + 1)
    return dict(zip([*keys, "lambda_1"], table.T, strict=True))


def standing_out(matrices: Sequence) -> dict[str, np.ndarray]:
    """By prompt: how unusual its log lambda_1, its subspace's distance from the mean one, and its coordinates are."""
    mean, principal = scores.mean_subspace(matrices), scores.PrincipalCoordinates(matrices)
    first, distance, coordinates = [], [], []
    for start in range(0, len(matrices), TOGETHER):
        several = [matrices[index] for index in range(start, min(start + TOGETHER, len(matrices)))]
        first += [triplets.S[0] for triplets in several]
        distance += [scores.subspace_distance(triplets, mean) for triplets in several]
        coordinates.append(principal.of(several))
    log_first = np.log(np.maximum(first, np.finfo(np.float32).tiny))
    z_lambda, z_subspace = scores.robust_z(log_first), scores.robust_z(np.array(distance))
    coordinates = np.concatenate(coordinates)
    z_principal = np.abs([scores.robust_z(column) for column in coordinates.T]).max(axis=0)
    return {
        "z_log_lambda": z_lambda,
        "subspace_distance": np.array(distance),
        "z_subspace": z_subspace,
        "principal_coordinates": coordinates,
        "z_principal": z_principal,
        "outlier_score": np.max([np.abs(z_lambda), z_subspace, z_principal], axis=0),
    }


def summarize(columns: dict[str, np.ndarray], skipped: int) -> dict:
    """The run in numbers."""

    def largest(key: str) -> list[int]:
        return np.argsort(-columns[key], kind="stable")[:STANDING_OUT].tolist()

    keys = ("lambda_1", "trace", "effective_rank", "captured_mass", "tokens")
    return {
        **{key: _spread(columns[key]) for key in keys},
        "total_tokens": int(columns["tokens"].sum()),
        "skipped_rows": skipped,
        "truncated_prompts": int(columns["truncated"].sum()),
        "longest_prompts": largest("tokens"),
        "slowest_prompts": largest("seconds"),
        "compute_seconds": float(columns["seconds"].sum()),  # of all processes together
    }


def _spread(values: np.ndarray) -> dict:
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def final_table(directory: Path, statistics: dict) -> str:
    """What a run found, for a terminal."""
    rows = [
        [label, *(f"{statistics[key][part]:.4g}" for part in ("median", "min", "max"))]
        for key, label in {
            "lambda_1": "lambda 1, nats per unit²",
            "trace": "trace of F",
            "effective_rank": "effective rank",
            "captured_mass": "captured mass",
            "tokens": "tokens",
        }.items()
    ]
    lines = [report.table(["", "median", "least", "most"], rows)]
    for kind in ("longest", "slowest"):
        lines.append(f"{kind}: prompts {', '.join(map(str, statistics[f'{kind}_prompts']))}")
    skipped, truncated = statistics["skipped_rows"], statistics["truncated_prompts"]
    lines.append(f"{skipped} rows without a text skipped, {truncated} prompts shortened to --max-length")
    leading = sorted(_read_prompts(directory), key=lambda r: -r["outlier_score"])[:STANDING_OUT]
    cells = [
        [str(r["index"]), f"{r['outlier_score']:.1f}", f"{r['z_log_lambda']:+.1f}", f"{r['z_subspace']:+.1f}",
         f"{r['z_principal']:.1f}", "  " + excerpt(r["prompt"])]
        for r in leading
    ]  # fmt: skip
    lines.append("Prompts that stand out, in robust standard deviations:")
    header = ["prompt", "score", "lambda 1", "subspace", "principal"]
    title, *numbers = report.table(header, [row[:-1] for row in cells]).splitlines()
    lines += [title, *(line + row[-1] for line, row in zip(numbers, cells, strict=True))]
    return "\n".join(lines)


def _read_prompts(directory: Path) -> list[dict]:
    keys = ("index", "prompt", "outlier_score", "z_log_lambda", "z_subspace", "z_principal")
    with open(directory / PROMPTS, encoding="utf-8") as file:
        leading: list[dict] = []
        for line in file:  # a few at a time: there may be millions
            record = json.loads(line)
            leading.append({key: record[key] for key in keys})
            if len(leading) > 1000:
                leading = sorted(leading, key=lambda r: -r["outlier_score"])[:STANDING_OUT]
    return leading


def excerpt(text: str, length: int = 60) -> str:
    """The beginning of a text, in a line of printable characters."""
    text = printable(" ".join(text[: 4 * length].split()))
    return text if len(text) <= length else text[: length - 1] + "…"
