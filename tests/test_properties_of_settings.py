"""Whatever stands in a config, in a run's manifest or in its records: it is read, or refused in one printable line."""

from contextlib import contextmanager
import json
from pathlib import Path
import tempfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

import compute_fisher
import core_experiment
from residual_fisher import load_fisher_matrices
from residual_fisher.common import drawing
from residual_fisher.common.program import UserError
from residual_fisher.common.run import FORMAT, Run, short_hash
from residual_fisher.common.text import printable
from residual_fisher.pipeline import figures

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


MANIFEST = {
    "format": FORMAT,
    "program": "compute_fisher.py",
    "identity": {"settings": {"top_k_tokens": 10}, "hook_layer": "model.layers.1", "model": "0"},
    "sources": {"model": None, "data": None},
    "goal": 3,
    "notes": {},
    "complete": True,
    "items": 3,
    "last": 2,
    "primary": {"fisher_matrices_compressed.npz": [1, "0"], "items/records.jsonl": [1, "0"]},
    "derived": {},
}
MANIFEST["checksum"] = short_hash(MANIFEST)


def lines(records: list) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@few
@given(
    content=(changed(MANIFEST) | json_value).map(lambda found: lines([found])) | st.binary(max_size=40),
    overwrite=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:.*is missing or damaged")
def test_any_manifest_is_read_or_refused_in_a_line_and_nothing_is_removed(content, overwrite):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items" / "run.json"
        path.parent.mkdir()
        path.write_bytes(content)
        run = Run(Path(folder), "compute_fisher.py", compute_fisher.FILES, overwrite)
        with one_line_at_most():
            run.open()
            run.is_finished({"top_k_tokens": 10}, MANIFEST["sources"], 3)
            run.examine(MANIFEST["identity"], MANIFEST["sources"], 3)
        with one_line_at_most():
            assert len(load_fisher_matrices(folder)) > 0
        assert [file for file in Path(folder).rglob("*") if file.is_file()] == [path]
        assert path.read_bytes() == content


RECORD = {
    "prompt": "a", "tokens": 3, "captured_mass": 0.5, "outlier_score": 0.1, "p_value": 0.1, "z_strength": 0.1,
    "z_spectrum": 0.1, "z_directions": 0.1, "z_words": 0.1, "z_activations": 0.1, "z_group": 0.1, "odd_words": ["a"],
    "differs_along": 1, "principal_coordinates": [0.1, 0.2], "singular_values": [2.0, 1.0],
    "directions": [[{"token": "a", "id": 1, "share": 0.9, "slope": -0.5}], []],
}  # fmt: skip


@few
@given(content=st.lists(changed(RECORD) | json_value, max_size=3).map(lines) | st.binary(max_size=40))
def test_any_records_are_drawn_or_refused_in_a_line(content):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # the records are read and put into columns; drawing them takes too long to be done so often
        patch.setattr(drawing, "save", lambda folder, pictures: [make() for make in pictures.values()])
        patch.setattr(figures, "spectra_figure", figures.collect)
        (Path(folder) / compute_fisher.PROMPTS).write_bytes(content)
        with one_line_at_most():
            assert compute_fisher.redraw(Path(folder), 0.01, "png") == 0
