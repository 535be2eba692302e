"""What may stand in an output directory; and counts of prompts and processes."""

from contextlib import contextmanager
import json
import os
from pathlib import Path
import shutil
import tempfile

import numpy as np
import pytest
from residual_fisher.pipeline.run_directory import RunDirectory
import yaml

from residual_fisher import load_fisher_matrices
from residual_fisher.common.files import check_writable
from residual_fisher.common.lock import LOCK, lock_directory
from residual_fisher.common.program import UserError
from residual_fisher.pipeline import processes, store
from residual_fisher.pipeline.scores import SCORES
from residual_fisher.pipeline.settings import Settings
import scripts
from scripts import ROOT, arrays, pipeline_words, records


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("number", ["all", "1000000000000"])
def test_all_prompts_or_more_than_there_are_may_be_asked_for(number, chat_directory, dataset, tmp_path, capsys):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", num_prompts=number) == 0
    assert len(records(tmp_path / "out")) == 40
    said = capsys.readouterr().out
    assert ("only 40 are available" in said) == (number != "all")
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", num_prompts=number) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["x", "0", "-1", "", "2.5", 30 * "9"])
def test_a_number_of_processes_that_is_none_is_one_line(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=f"WORLD_SIZE={size} is no number"), processes.join():
        pass


# --- output directories --------------------------------------------------------------------------


def is_finished(output: Path, overwrite: bool = False) -> bool:
    """As a run asks, once it has locked the directory."""
    with lock_directory(output):
        return RunDirectory(Settings(output_dir=str(output), dataset_name=str(ROOT / "config.yaml"))).is_finished(
            overwrite
        )


def snapshot(folder: Path) -> dict:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name",
    ["prompts.jsonl", "fisher_matrices_compressed.npz", "metadata.yaml", "fisher_spectra.png", ".lock",
     "shards/index.json", "shards/shard_00000.npz", "shards/batch_00000_000.npz"],
)  # fmt: skip
def test_a_folder_in_a_files_place_is_found_first_and_stays(name, overwrite, finished_pipeline, tmp_path):
    output = shutil.copytree(finished_pipeline, tmp_path / "out")
    if not name.startswith((".", "shards")):
        (output / name).unlink()
    (output / name).mkdir(parents=True)
    (output / name / "thesis.txt").write_text("mine")
    before = snapshot(output)
    with pytest.raises(UserError, match=r"did not write|cannot lock"):
        is_finished(output, overwrite)
    assert snapshot(output) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_place_of_the_shards_is_found_first(overwrite, tmp_path):
    (tmp_path / "shards").write_text("mine")
    with pytest.raises(UserError, match="did not write"):
        is_finished(tmp_path, overwrite)
    assert snapshot(tmp_path) == {str(tmp_path / "shards"): b"mine"}


@pytest.mark.parametrize(
    "change",
    [{"config": 3}, {"config": {"batch_size": [8]}}, {"files": 7}, {"files": {}}, {"files": {"../x": [1, None]}},
     {"sources": []}, {"complete": "yes"}, {"hook_layer": None}, {"format": 1}],
    ids=str,
)  # fmt: skip
def test_metadata_of_another_form_is_said_and_only_overwrite_goes_on(change, finished_pipeline, tmp_path):
    output = shutil.copytree(finished_pipeline, tmp_path / "out")
    metadata = yaml.safe_load((output / "metadata.yaml").read_text())
    (output / "metadata.yaml").write_text(yaml.safe_dump({**metadata, **change}))
    with pytest.raises(UserError, match=r"without a readable metadata\.yaml: --overwrite removes them"):
        is_finished(output)
    assert is_finished(output, overwrite=True) is False
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"did not write \(thesis\.txt\)"):
        is_finished(output, overwrite=True)


@pytest.mark.parametrize("content", ["4711", "pid 7", '{"pid": 1}', "[]", 5000 * " "])
def test_a_lock_of_another_program_is_left_alone(content, tmp_path):
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(UserError, match="is of another program"), lock_directory(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == content


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("")
    (tmp_path / LOCK).symlink_to("target")
    with pytest.raises(UserError, match="cannot lock"), lock_directory(tmp_path):
        pass


def test_names_that_only_look_like_shards_are_neither_read_nor_removed(tmp_path):
    names = ["shard_old.npz", "shard_1.npz", "shard_000001.npz", "batch_00000_x.npz", ".mine.npz-1", "notes.npz"]
    (tmp_path / "shards").mkdir()
    for name in (*names, "shard_00000.npz", "shard_100000.npz", "shard_99999.npz", ".index.json-00"):
        (tmp_path / "shards" / name).touch()
    files = store.Store(tmp_path, "full")
    assert [path.name for path in files.shards()] == ["shard_00000.npz", "shard_99999.npz", "shard_100000.npz"]
    assert files.batches(0) == {}
    files.require_no_more_than(100_001)
    files.remove()
    assert sorted(os.listdir(tmp_path / "shards")) == sorted(names)


# --- what an interrupted run has left ------------------------------------------------------------


def result(index: int, d: int = 3, r: int = 2) -> store.Result:
    numbers = dict.fromkeys(store.NUMBERS, 1.0)
    record = {"index": index, "prompt": f"p{index}", **numbers, "singular_values": [1.0] * r}
    return store.Result(record, np.ones(r, np.float32), np.ones((r, d), np.float32))


DAMAGES = {
    "no tokens": lambda r: r.record.pop("tokens"),
    "no index": lambda r: r.record.pop("index"),
    "tokens in words": lambda r: r.record.update(tokens="three"),
    "endless trace": lambda r: r.record.update(trace=10**400),
    "no singular values": lambda r: r.record.update(singular_values=[]),
    "other singular values": lambda r: r.record.update(singular_values=[1.0]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_archive_with_a_record_of_another_form_is_damaged(damage, tmp_path):
    good, bad = result(0), result(1)
    store.write_results(tmp_path / "a.npz", [good, bad], "full")
    assert len(store.read_records(tmp_path / "a.npz")) == 2
    members = list(store._members(good, "full")) + list(store._members(bad, "full"))
    DAMAGES[damage](bad)
    lines = "".join(json.dumps(r.record) + "\n" for r in (good, bad)).encode()
    store.write_archive(tmp_path / "b.npz", [*members, (store.RECORDS, lines)])
    with pytest.raises(store.DamagedFileError):
        store.read_records(tmp_path / "b.npz")


@pytest.mark.parametrize("damage", ["gone", "flat", "longer", "another width"])
def test_an_archive_with_an_array_of_another_form_is_damaged(damage, tmp_path):
    good = result(0)
    members = dict(store._members(good, "full"))
    if damage == "gone":
        del members["S_0.npy"]
    if damage == "flat":
        members["U_0.npy"] = np.ones(3, np.float32)
    if damage == "longer":
        members["S_0.npy"] = np.ones(3, np.float32)
    if damage == "another width":
        members["V_0.npy"] = np.ones((2, 4), np.float32)
    store.write_archive(tmp_path / "b.npz", [*members.items(), (store.RECORDS, store._lines([good.record]))])
    with pytest.raises(store.DamagedFileError):
        store.read_records(tmp_path / "b.npz")


def test_shards_of_several_models_do_not_become_one_file(tmp_path):
    (tmp_path / "shards").mkdir()
    files = store.Store(tmp_path, "full")
    for number, width in enumerate((3, 4)):
        store.write_results(files.shard(number), [result(number, width)], "full")
    with pytest.raises(UserError, match="holds matrices of several shapes: --overwrite starts anew"):
        files.close(2, 1)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"prompts": 2, "prompts_per_shard": 0, "files": []}'])
def test_an_index_of_another_form_and_a_file_that_is_no_archive_are_one_line(content, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load_fisher_matrices(tmp_path)
    (tmp_path / "fisher_matrices_compressed.npz").write_text(content)
    with pytest.raises(UserError, match=r"fisher_matrices_compressed\.npz is damaged"):
        load_fisher_matrices(tmp_path)


@pytest.mark.usefixtures("without_pictures")
def test_a_damaged_index_of_a_finished_run_is_made_again(chat_directory, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "ONE_FILE", 10)
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    index = tmp_path / "out" / "shards" / "index.json"
    before = index.read_text()
    index.write_text("{}")
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    assert "index.json is missing or damaged: computing it again" in capsys.readouterr().err
    assert index.read_text() == before
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    assert "is finished: nothing to do" in capsys.readouterr().out


# --- pictures of damaged records -----------------------------------------------------------------


def redraw(folder: Path, changes: dict, capsys) -> tuple[int, str]:
    found = [{**record, **changes} if number == 1 else record for number, record in enumerate(records(folder))]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    return scripts.as_program("compute_fisher", ["--redraw", str(folder)]), capsys.readouterr().err


@pytest.fixture
def finished_copy(finished_pipeline, tmp_path) -> Path:
    return shutil.copytree(finished_pipeline, tmp_path / "copy")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": "3"}, "tokens is no number (line 2)"),
        ({"z_spectrum": float("nan")}, "z_spectrum is no number (line 2)"),
        ({"odd_words": [1]}, "odd_words are no texts (line 2)"),
        ({"differs_along": 3}, "directions are no lists of tokens (line 2)"),
        (dict.fromkeys(SCORES), "z_strength is no number (line 2)"),
        ({"outlier_score": 10**400}, "outlier_score is no number (line 2)"),
        ({"singular_values": [1.0]}, "1 singular_values, and 4 of the prompts before (line 2)"),
        ({"principal_coordinates": 1}, "principal_coordinates is no list of numbers (line 2)"),
        ({"prompt": None}, "no record of a prompt (line 2)"),
        ({"directions": "three"}, "directions are no lists of tokens (line 2)"),
        ({"directions": [[{"token": "a", "share": 0.5}]]}, "directions are no lists of tokens (line 2)"),
    ],
)
def test_records_of_another_form_are_one_line_that_says_where(changes, said, finished_copy, capsys):
    code, error = redraw(finished_copy, changes, capsys)
    assert code == 2 and error.count("\n") == 1 and said in error
    assert f"no readable prompts.jsonl in {finished_copy}" in error


def test_scores_of_an_earlier_version_are_one_line_that_says_what_to_do(finished_copy, capsys):
    found = [{key: value for key, value in record.items() if key not in SCORES} for record in records(finished_copy)]
    (finished_copy / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    assert scripts.as_program("compute_fisher", ["--redraw", str(finished_copy)]) == 2
    said = capsys.readouterr().err
    assert "the scores of an earlier version (line 1): the command that made the run scores it anew" in said


def test_failed_prompts_and_matrices_that_are_zero_are_drawn(finished_copy, capsys):
    zero = {"singular_values": [0.0] * 4, "trace": 0.0, "captured_mass": 0.0, "failed": "NaN", "outlier_score": 0.0}
    assert redraw(finished_copy, zero, capsys) == (0, "")
    every = [{**record, **zero} for record in records(finished_copy)]
    (finished_copy / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in every))
    assert scripts.as_program("compute_fisher", ["--redraw", str(finished_copy)]) == 0


@pytest.mark.usefixtures("without_pictures")
def test_scores_that_tell_no_prompts_apart_are_noted(chat_directory, tmp_path, capsys):
    (tmp_path / "same.txt").write_text("the same\n" * 40)
    assert scripts.compute_fisher(chat_directory, tmp_path / "same.txt", tmp_path / "out") == 0
    note = "note: all prompts have the same strength and spectrum and directions and words: these scores are 0"
    assert note in capsys.readouterr().err.splitlines()
    assert not any(record["outlier_score"] for record in records(tmp_path / "out"))


# --- places that cannot be written to ------------------------------------------------------------


@contextmanager
def no_rights():
    """As another user, if this is the one who may do everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def open_folder():
    """Where another user may write, which tests' own folder is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


PLACES = ["dangling", "loop", "loop/below", "file", "file/below", "read-only", "unreadable/below"]


def lock(directory: Path) -> None:
    with lock_directory(directory):
        pass


@pytest.mark.parametrize("use", [lock, check_writable])
@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_to_is_found_first(place, use, open_folder):
    (open_folder / "dangling").symlink_to("nowhere")
    (open_folder / "loop").symlink_to("loop")
    (open_folder / "file").touch()
    (open_folder / "read-only").mkdir(mode=0o555)
    (open_folder / "unreadable").mkdir(mode=0o000)
    before = sorted(os.listdir(open_folder))
    with no_rights(), pytest.raises(UserError, match="cannot write to") as caught:
        use(open_folder / place)
    assert "(choose another --output-dir)" in str(caught.value)
    assert sorted(os.listdir(open_folder)) == before


def test_folders_made_for_nothing_are_gone_again_and_used_ones_stay(tmp_path):
    with lock_directory(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert os.listdir(tmp_path) == []
    with lock_directory(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert os.listdir(tmp_path / "a" / "b") == ["result"]


@pytest.mark.usefixtures("without_pictures")
def test_a_name_that_is_not_utf8_or_not_printable_is_written_and_said_escaped(
    model_directory, chat_directory, dataset, tmp_path, capsys
):
    for name in (os.fsdecode(b"caf\xe9"), "red\x1b[31m"):
        shown = name.encode("unicode_escape").decode()
        words = pipeline_words(chat_directory, dataset, tmp_path / name, num_prompts=3)
        assert scripts.as_program("compute_fisher", words) == 0
        assert f"{shown}: fisher_matrices_compressed.npz" in capsys.readouterr().out
        assert scripts.as_program("compute_fisher", words) == 0
        assert f"{shown} is finished" in capsys.readouterr().out
        assert yaml.safe_load((tmp_path / name / "metadata.yaml").read_text())["config"]["output_dir"].endswith(name)
        assert len(arrays(tmp_path / name)) == 9
        assert scripts.core_experiment(model_directory, tmp_path / f"{name} 2", "--num-sentences", "2") == 0
        found, _ = scripts.experiment_results(tmp_path / f"{name} 2")
        assert found["experiment_config"]["output_dir"].endswith(f"{name} 2")
