"""Whatever stands in a config, in a run's metadata or in its records: it is read, or refused in one printable line."""

from contextlib import contextmanager
import json
from pathlib import Path
import tempfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest
from residual_fisher.pipeline.run_directory import RunDirectory
from residual_fisher.pipeline.store import INDEX, PROMPTS, load_fisher_matrices
import yaml

import compute_fisher
import core_experiment
from residual_fisher.common.program import UserError
from residual_fisher.common.text import printable
from residual_fisher.pipeline import figures, run_directory
from residual_fisher.pipeline.settings import Settings

few = settings(
    max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

WORDS = [
    "batch_size", "output_dir", "seed", "layers", "scales", "trust_remote_code", "num_prompts", "~", "null", "010", "²",
    "all", "nan",
]  # fmt: skip
MARKS = [
    ": ", "\n", "- ", "[", "]", "{", "}", "&x ", "*x", "!!int ", "!", "<<", "'", '"\\U', "|", ">", "%YAML 1", "? ", "#",
]  # fmt: skip
yaml_text = st.lists(st.sampled_from(WORDS + MARKS) | st.text(max_size=3), max_size=12).map("".join)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@contextmanager
def one_line_at_most():
    try:
        yield
    except UserError as error:
        said = printable(str(error))  # as `end_with_error` prints it
        assert said and len(said) < 1000


def changed(record: dict) -> st.SearchStrategy[dict]:
    """`record` with some of its values taken out or replaced by anything."""
    return st.dictionaries(st.sampled_from(sorted(record)), json_value | st.just(...), max_size=3).map(
        lambda other: {key: value for key, value in {**record, **other}.items() if value is not ...}
    )


@few
@given(content=yaml_text.map(str.encode) | st.binary(max_size=40))
def test_any_config_is_read_or_refused_in_a_line(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "c.yaml").write_bytes(content)
        for script in (core_experiment, compute_fisher):
            with one_line_at_most():
                assert isinstance(script.parse(["--config", f"{folder}/c.yaml"]), script.Settings)


METADATA = {
    "format": run_directory.FORMAT,
    "complete": True,
    "hook_layer": "model.layers.1",
    "model_fingerprint": "0",
    "config": {"batch_size": 8},
    "sources": {"model": None, "dataset": None},
    "files": {"fisher_matrices_compressed.npz": [1, "0"], "prompts.jsonl": [1, "0"], "fisher_spectra.png": [1, "0"]},
}


def dumped(metadata: dict) -> bytes:
    return yaml.safe_dump(metadata, allow_unicode=True).encode("utf-8", "replace")


@few
@given(
    content=changed(METADATA).map(dumped) | yaml_text.map(str.encode) | st.binary(max_size=40), overwrite=st.booleans()
)
@pytest.mark.filterwarnings("ignore:.*is missing or damaged")
def test_any_metadata_is_read_or_refused_in_a_line_and_nothing_is_removed(content, overwrite):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metadata.yaml").write_bytes(content)
        directory = RunDirectory(Settings(output_dir=folder, dataset_name=f"{folder}/none"))
        with one_line_at_most():
            directory.is_finished(overwrite)
        assert [path.name for path in Path(folder).iterdir()] == ["metadata.yaml"]
        assert (Path(folder) / "metadata.yaml").read_bytes() == content


RECORD = {
    "prompt": "a", "tokens": 3, "captured_mass": 0.5, "outlier_score": 0.1, "z_strength": 0.1, "z_spectrum": 0.1,
    "z_directions": 0.1, "z_words": 0.1, "odd_words": ["a"], "differs_along": 1,
    "principal_coordinates": [0.1, 0.2], "singular_values": [2.0, 1.0],
    "directions": [[{"token": "a", "id": 1, "share": 0.9, "slope": -0.5}], []],
}  # fmt: skip


def lines(records: list) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@few
@given(content=st.lists(changed(RECORD) | json_value, max_size=3).map(lines) | st.binary(max_size=40))
def test_any_records_are_read_or_refused_in_a_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PROMPTS
        path.write_bytes(content)
        with one_line_at_most():
            found = figures._read_prompts(path)
            assert found["singular_values"].ndim == found["principal_coordinates"].ndim == 2


@few
@given(
    content=changed({"prompts": 3, "prompts_per_shard": 2, "files": ["shard_00000.npz"] * 2}).map(json.dumps)
    | st.text(max_size=9)
)
def test_any_index_of_shards_is_read_or_refused_in_a_line(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "shards").mkdir()
        (Path(folder) / "shards" / INDEX).write_bytes(content.encode("utf-8", "replace"))
        with one_line_at_most():
            assert len(load_fisher_matrices(folder)) > 0
