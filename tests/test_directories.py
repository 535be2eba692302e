"""What may stand in an output directory, and what of it is made again; counts of prompts and processes."""

from contextlib import contextmanager
import errno
import fcntl
import json
import os
from pathlib import Path
import shutil
import tempfile
import time

import pytest
import transformers as hf
import yaml

import compute_fisher
from residual_fisher import load_fisher_matrices
from residual_fisher.common.files import check_writable
from residual_fisher.common.lock import LOCK, STALE, lock_directory
from residual_fisher.common.program import UserError
from residual_fisher.common.run import Run
from residual_fisher.pipeline import matrices, processes
from residual_fisher.pipeline.scores import SCORES
import scripts
from scripts import arrays, calls_of, contents, flip, pipeline_words, records


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("number", ["all", "1000000000000"])
def test_all_prompts_or_more_than_there_are_may_be_asked_for(number, chat_directory, dataset, tmp_path, capsys):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", num_prompts=number) == 0
    assert len(records(tmp_path / "out")) == 40
    said = capsys.readouterr().out
    assert ("only 40 are available" in said) == (number != "all")
    table = said[said.index("lambda 1") : said.index("slowest:")]
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", num_prompts=number) == 0
    said = capsys.readouterr().out
    assert "is finished: nothing to do" in said and table in said  # it is told again


@pytest.mark.parametrize("size", ["x", "0", "-1", "", "2.5", 30 * "9"])
def test_a_number_of_processes_that_is_none_is_one_line(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=f"WORLD_SIZE={size} is no number"), processes.join():
        pass


# --- output directories --------------------------------------------------------------------------


def enter(output: Path, overwrite: bool = False) -> None:
    """As a run does before anything else."""
    with Run(output, "compute_fisher.py", compute_fisher.FILES, overwrite).locked():
        pass


@pytest.fixture
def finished_copy(finished_pipeline, tmp_path) -> Path:
    return shutil.copytree(finished_pipeline, tmp_path / "copy")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", [*compute_fisher.FILES, "items/run.json", "items/00000000-00000031.npz", "items/1000000000-1000000007.npz",
             LOCK],
)  # fmt: skip
def test_a_folder_in_a_files_place_is_found_first_and_stays(name, overwrite, finished_copy):
    (finished_copy / name).unlink(missing_ok=True)
    (finished_copy / name).mkdir(parents=True)
    (finished_copy / name / "thesis.txt").write_text("mine")
    before = contents(finished_copy)
    with pytest.raises(UserError, match=r"a directory has its place|cannot lock"):
        enter(finished_copy, overwrite)
    assert contents(finished_copy) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_place_of_the_items_is_found_first(overwrite, tmp_path):
    (tmp_path / "items").write_text("mine")
    with pytest.raises(UserError, match="a file, or a link that leads nowhere, has its place"):
        enter(tmp_path, overwrite)
    assert contents(tmp_path) == {str(tmp_path / "items"): b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_never_touched(overwrite, tmp_path):
    for name in ("thesis.txt", "prompts.jsonl", "items/00000000-00000031.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        before = contents(tmp_path)
        with pytest.raises(UserError, match=r"files that compute_fisher\.py did not write \(thesis\.txt\)"):
            enter(tmp_path, overwrite)
        assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [{"identity": 3}, {"primary": {}}, {"primary": {"../x": [1, None]}}, {"sources": []}, {"complete": False},
     {"program": "core_experiment.py"}, {"items": 41}, {"format": "residual-fisher/1"}, {"checksum": None}],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_was_changed_is_said_and_only_overwrite_goes_on(change, finished_copy):
    manifest = json.loads((finished_copy / "items" / "run.json").read_text())
    (finished_copy / "items" / "run.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(UserError, match=r"without a readable items/run\.json: --overwrite replaces them"):
        enter(finished_copy)
    enter(finished_copy, overwrite=True)
    (finished_copy / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"did not write \(thesis\.txt\)"):
        enter(finished_copy, overwrite=True)


@pytest.mark.usefixtures("without_pictures")
def test_only_files_of_its_own_are_read_or_removed(chat_directory, dataset, tmp_path):
    """The folder of the items may be a link to another disk, and hold other files."""
    output, elsewhere = tmp_path / "out", tmp_path / "disk"
    output.mkdir()
    elsewhere.mkdir()
    (output / "items").symlink_to(elsewhere)
    other = {"0-1.npz", "00000000-x.npz", "00000000-00000001.npz.bak", ".mine.npz-1", "notes.npz"}
    for name in other:
        (elsewhere / name).write_text("mine")
    (elsewhere / ".00000000-00000001.npz-00").write_text("what a killed process was writing")
    for k in (6, 5):
        options = {"num_prompts": 3, "overwrite": True, "top_k_tokens": k}
        assert scripts.compute_fisher(chat_directory, dataset, output, **options) == 0
    assert (output / "items").is_symlink()
    assert {path.name for path in elsewhere.iterdir()} == {*other, "run.json", "records.jsonl"}


# --- what of a finished run is made again ---------------------------------------------------------


@pytest.mark.parametrize("name", ["fisher_spectra.png", "prompts.jsonl", "metadata.yaml", "report.html"])
def test_a_derived_file_is_made_again_and_nothing_is_computed(name, finished_copy, chat_directory, dataset, capsys):
    path, primary = finished_copy / name, finished_copy / "fisher_matrices_compressed.npz"
    before, stamp = contents(finished_copy), primary.stat().st_mtime_ns
    for damage in (Path.unlink, flip):
        damage(path)
        with calls_of(hf.AutoTokenizer, "from_pretrained") as loaded:
            assert scripts.compute_fisher(chat_directory, dataset, finished_copy) == 0
        assert not loaded and capsys.readouterr().err == ""
        assert contents(finished_copy) == before and primary.stat().st_mtime_ns == stamp


def test_what_another_matplotlib_has_redrawn_is_drawn_again_and_nothing_is_computed(
    finished_copy, chat_directory, dataset, capsys
):
    before = contents(finished_copy)
    assert scripts.as_program("compute_fisher", ["--redraw", str(finished_copy)]) == 0
    assert contents(finished_copy) == before  # the same matplotlib
    picture = finished_copy / "fisher_spectra.png"
    picture.write_bytes(picture.read_bytes() + b"another version")
    with calls_of(hf.AutoTokenizer, "from_pretrained") as loaded:
        assert scripts.compute_fisher(chat_directory, dataset, finished_copy) == 0
    assert not loaded and contents(finished_copy) == before


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", ["fisher_matrices_compressed.npz", "items/records.jsonl"])
def test_a_primary_file_is_named_and_computed_again(
    name, finished_copy, finished_pipeline, chat_directory, dataset, capsys
):
    for damage in (Path.unlink, flip):
        damage(finished_copy / name)
        assert scripts.compute_fisher(chat_directory, dataset, finished_copy) == 0
        assert f"{name} is missing or damaged: computing it again" in capsys.readouterr().err
        scripts.assert_same_results(finished_copy, finished_pipeline)
        assert scripts.compute_fisher(chat_directory, dataset, finished_copy) == 0
        assert "is finished: nothing to do" in capsys.readouterr().out


@pytest.mark.usefixtures("without_pictures")
def test_a_damaged_archive_of_a_large_finished_run_alone_is_computed_again(
    chat_directory, dataset, finished_pipeline, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(matrices, "ONE_FILE", 10)
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    flip(output / "items" / "00000032-00000039.npz")
    with calls_of(compute_fisher, "measure") as calls:
        assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    assert sum(len(batch) for *_, batch in calls) == 8
    assert "00000032-00000039.npz is missing or damaged: computing it again" in capsys.readouterr().err
    with load_fisher_matrices(output) as found:
        assert len(found) == 40 and (found[39].U == load_fisher_matrices(finished_pipeline)[39].U).all()
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out


# --- the lock ------------------------------------------------------------------------------------


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


def test_where_files_cannot_be_locked_a_fresh_file_is_a_lock_and_an_old_one_is_not(tmp_path):
    with calls_of(fcntl, "flock", OSError(errno.ENOLCK, "no locks here")):
        with lock_directory(tmp_path), pytest.raises(UserError, match="is in use by process"), lock_directory(tmp_path):
            pass
        (tmp_path / LOCK).write_text("{}")  # of a node that crashed
        os.utime(tmp_path / LOCK, (time.time() - 2 * STALE,) * 2)
        with lock_directory(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


# --- pictures of damaged records -----------------------------------------------------------------


def redraw(folder: Path, changes: dict, capsys) -> tuple[int, str]:
    """Of the two prompts that stand out most, with one of them changed."""
    found = sorted(records(folder), key=lambda record: record["outlier_score"])[-2:]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (found[0], {**found[1], **changes})))
    return scripts.as_program("compute_fisher", ["--redraw", str(folder)]), capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [{"effective_rank": "3"}, {"odd_words": [1]}, dict.fromkeys(SCORES), {"outlier_score": 10**400},
     {"singular_values": [1.0]}, {"principal_coordinates": 1}, {"prompt": None}, {"directions": "three"},
     {"directions": [[{"token": "a", "share": 0.5}]] * 3}],
    ids=str,
)  # fmt: skip
def test_records_of_another_form_are_one_line(changes, finished_copy, capsys):
    code, error = redraw(finished_copy, changes, capsys)
    assert code == 2 and error.count("\n") == 1
    assert f"no readable prompts.jsonl in {finished_copy}: the command that made it makes it again" in error


def test_failed_prompts_and_matrices_that_are_zero_are_drawn(finished_copy, capsys):
    zero = {"singular_values": [0.0] * 4, "trace": 0.0, "captured_mass": 0.0, "failed": "NaN", "outlier_score": 0.0}
    assert redraw(finished_copy, zero, capsys) == (0, "")
    every = [{**record, **zero} for record in records(finished_copy)]
    (finished_copy / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in every))
    assert scripts.as_program("compute_fisher", ["--redraw", str(finished_copy)]) == 0


@pytest.mark.usefixtures("without_pictures")
def test_a_run_of_one_text_has_no_scores_and_says_so(chat_directory, tmp_path, capsys):
    (tmp_path / "same.txt").write_text("the same\n" * 40)
    assert scripts.compute_fisher(chat_directory, tmp_path / "same.txt", tmp_path / "out") == 0
    note = "note: fewer than 8 different prompts (1) do not say what is usual: all scores are 0"
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
        assert len(arrays(tmp_path / name)) == 12
        assert scripts.core_experiment(model_directory, tmp_path / f"{name} 2", "--num-sentences", "2") == 0
        found, _ = scripts.experiment_results(tmp_path / f"{name} 2")
        assert found["experiment_config"]["output_dir"].endswith(f"{name} 2")


@pytest.mark.parametrize("script", ["core_experiment", "compute_fisher"])
def test_pictures_are_drawn_for_papers(script, finished_experiment, finished_pipeline, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished_experiment if script == "core_experiment" else finished_pipeline, folder)
    for kind, start in {"pdf": b"%PDF", "svg": b"<?xml"}.items():
        assert scripts.as_program(script, ["--redraw", str(folder), "--format", kind]) == 0
        drawn = sorted(path.stem for path in folder.glob(f"*.{kind}"))
        assert drawn == sorted(path.stem for path in folder.glob("*.png"))
        assert all((folder / f"{name}.{kind}").read_bytes().startswith(start) for name in drawn)
        assert all(f"{name}.{kind}" in capsys.readouterr().out for name in drawn[:1])
    assert scripts.as_program(script, ["--format", "pdf"]) == 2
    assert "argument --format: it has no effect without --redraw" in capsys.readouterr().err
