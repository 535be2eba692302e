"""A run: items that are kept at once, resumed, extended and merged; derived files that are made again when needed."""

import errno
import json
import zipfile

import numpy as np
import pytest

from residual_fisher.common.archives import DamagedArchiveError, Item, archives_in, read_records, write_items
from residual_fisher.common.files import write_json
from residual_fisher.common.program import UserError
from residual_fisher.common.run import ITEMS, MANIFEST, Run, State, read_manifest
from scripts import calls_of

FILES = ("results.json", "picture.png")
SETTINGS = {"k": 3, "continue_": 0}
SOURCES = {"data": [3, "abc"], "model": None}


def item(number: int) -> Item:
    return Item(number, {"text": f"item {number}"}, {"U": np.full((2, 3), number, np.float32), "S": np.arange(3)})


def identity(**changes) -> dict:
    return {"settings": {**SETTINGS, **changes}, "model": "m", "hook_layer": "1"}


def open_run(folder, goal=6, overwrite=False, read_only=False, about=None) -> tuple[Run, State]:
    run = Run(folder, "script.py", FILES, overwrite, read_only)
    run.open()
    merged = folder / "results.json"
    return run, run.examine(about or identity(), SOURCES, goal, lambda: split(merged), {"note": 1})


def merge(run: Run) -> None:
    found = [(number, record, {k: v.tolist() for k, v in arrays.items()}) for number, record, arrays in run.items()]
    write_json(run.folder / "results.json", {"items": found})
    run.finish(len(found), ["results.json"])


def split(path) -> list[Item]:
    found = json.loads(path.read_text())["items"]
    return [Item(n, r, {k: np.array(v, np.float32 if k == "U" else None) for k, v in a.items()}) for n, r, a in found]


def finished(folder, goal=6) -> Run:
    run, _ = open_run(folder, goal)
    run.append([item(number) for number in range(goal)])
    merge(run)
    return run


def numbers(run: Run) -> list[int]:
    return [found.number for found in run.items()]


def test_items_are_read_back_as_they_were_written(tmp_path):
    run, state = open_run(tmp_path)
    assert state is State.NEW and run.records(range(9)) == {} and numbers(run) == []
    run.append([item(4), item(1)])
    run.append([item(0)])
    for found, number in zip(run.items(), (0, 1, 4), strict=True):
        assert found.number == number and found.record == item(number).record
        for name, array in item(number).arrays.items():
            assert found.arrays[name].dtype == array.dtype and np.array_equal(found.arrays[name], array)
    assert sorted(run.records(range(1, 9))) == [1, 4]


def test_a_stopped_run_is_resumed_with_what_is_finished(tmp_path):
    run, _ = open_run(tmp_path)
    run.append([item(2), item(3)])
    again, state = open_run(tmp_path)
    assert state is State.STARTED and sorted(again.records(range(6))) == [2, 3] and again.last() == 3
    again.begin()
    again.append([item(0)])
    assert numbers(again) == [0, 2, 3]


def test_merging_leaves_primary_files_alone_and_the_run_is_finished(tmp_path):
    finished(tmp_path)
    assert archives_in(tmp_path / ITEMS) == []
    run, state = open_run(tmp_path)
    assert state is State.FINISHED and run.is_finished(SETTINGS, SOURCES, 6)
    assert not run.is_finished(SETTINGS, {**SOURCES, "model": [["weights", 1, 2]]}, 6)  # to be loaded and looked at
    with pytest.raises(UserError, match=r"data have changed .*--overwrite"):
        run.is_finished(SETTINGS, {**SOURCES, "data": [4, "abd"]}, 6)


@pytest.mark.parametrize("goal", [4, 6])
def test_fewer_items_are_there_already(goal, tmp_path):
    finished(tmp_path)
    assert open_run(tmp_path, goal)[1] is State.FINISHED


def test_a_finished_run_is_extended(tmp_path):
    finished(tmp_path)
    run, state = open_run(tmp_path, goal=8)
    assert state is State.STARTED and sorted(run.records(range(8))) == numbers(run) == list(range(6))
    before = (tmp_path / "results.json").read_bytes()
    run.begin()
    assert (tmp_path / "results.json").read_bytes() == before and sorted(run.records(range(8))) == list(range(6))
    run.append([item(6), item(7)])
    merge(run)
    finished(tmp_path / "at once", 8)
    assert (tmp_path / "results.json").read_bytes() == (tmp_path / "at once" / "results.json").read_bytes()


def test_extending_that_is_stopped_at_any_point_loses_nothing(tmp_path, monkeypatch):
    finished(tmp_path)
    run, _ = open_run(tmp_path, goal=8)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            run.begin()
    run, state = open_run(tmp_path, goal=8)
    assert state is State.STARTED and numbers(run) == list(range(6))
    run.begin()
    run.append([item(6)])
    run, state = open_run(tmp_path, goal=8)
    assert state is State.STARTED and numbers(run) == list(range(7))


def stop(*_, **__):
    raise KeyboardInterrupt


def test_archives_of_a_window_become_one_and_a_kill_in_between_doubles_nothing(tmp_path):
    run, _ = open_run(tmp_path)
    run.append([item(0), item(3)])
    run.append([item(1), item(2)])
    run.append([item(4), item(9)])  # reaches beyond the window
    leftover = archives_in(tmp_path / ITEMS)[1][2]
    kept = leftover.read_bytes()
    run.pack(range(5))
    assert [(first, last) for first, last, _ in archives_in(tmp_path / ITEMS)] == [(0, 3), (4, 9)]
    leftover.write_bytes(kept)  # killed before it was removed
    assert numbers(run) == [0, 1, 2, 3, 4, 9] and sorted(run.records(range(4))) == [0, 1, 2, 3]


def test_a_large_run_keeps_its_archives_as_primary_files(tmp_path):
    run, _ = open_run(tmp_path)
    for start in (0, 3):
        run.append([item(start), item(start + 2)])
        run.append([item(start + 1)])
    run.finish(6)
    assert [(first, last) for first, last, _ in archives_in(tmp_path / ITEMS)] == [(0, 2), (3, 5)]
    run, state = open_run(tmp_path, goal=8)
    assert state is State.STARTED and numbers(run) == list(range(6))
    archives_in(tmp_path / ITEMS)[0][2].unlink()
    with pytest.warns(UserWarning, match="00000000-00000002.npz is missing or damaged"):
        run, state = open_run(tmp_path)
    assert state is State.STARTED and sorted(run.records(range(6))) == [3, 4, 5]  # only its items are missing


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_archive_is_named_and_its_items_are_missing(damage, tmp_path):
    run, _ = open_run(tmp_path)
    run.append([item(0)])
    run.append([item(1)])
    path = archives_in(tmp_path / ITEMS)[0][2]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data[:-30] if damage == "cut" else data)
    for read_only in (True, False):
        again, _ = open_run(tmp_path, read_only=read_only)
        with pytest.warns(UserWarning, match="00000000-00000000.npz is damaged: computing it again"):
            assert sorted(again.records(range(6))) == [1]
        assert path.exists() == read_only


def test_an_archive_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path):
    run, _ = open_run(tmp_path)
    run.append([item(0)])
    again, _ = open_run(tmp_path)
    with calls_of(zipfile, "ZipFile", OSError(errno.EIO, "Input/output error")), pytest.raises(OSError):
        again.records(range(6))
    assert sorted(again.records(range(6))) == [0]


def test_an_archive_without_records_is_damaged(tmp_path):
    write_items(tmp_path / "one.npz", [item(0)])
    assert read_records(tmp_path / "one.npz") == {0: {"text": "item 0"}}
    np.savez(tmp_path / "other.npz", U_0=np.zeros(3))
    with pytest.raises(DamagedArchiveError):
        read_records(tmp_path / "other.npz")


def test_a_primary_file_that_changed_is_named_and_computed_again(tmp_path):
    finished(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.warns(UserWarning, match="results.json is missing or damaged: computing it again"):
        run, state = open_run(tmp_path)
    assert state is State.NEW
    run.append([item(0)])
    assert not (tmp_path / "results.json").exists() and numbers(run) == [0]


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (identity(k=4), r"with other settings \(k was 3 and is 4\): --overwrite replaces it"),
        (identity(continue_=1), r"continue was 0 and is 1"),
        ({**identity(), "model": "n"}, r"a run of another model .*--overwrite replaces it"),
        ({**identity(), "hook_layer": "2"}, r"a run of another layer"),
    ],
)
def test_another_run_is_refused_unless_nothing_is_finished(about, message, tmp_path):
    run, _ = open_run(tmp_path)
    run.begin()
    run, state = open_run(tmp_path, about=about)
    assert state is State.NEW  # nothing was finished
    run.append([item(0)])
    for prepare in (lambda: None, lambda: merge(run)):
        prepare()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=message) if about == identity() else pytest.raises(UserError):
            open_run(tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    other, _ = open_run(tmp_path / "other")
    other.append([item(0)])
    with pytest.raises(UserError, match=message):
        open_run(tmp_path / "other", about=about)


def test_what_overwriting_would_throw_away_is_said(tmp_path):
    run, _ = open_run(tmp_path)
    for number, seconds in enumerate((40.0, {"sweep": 30.0, "prefix": 20.0}, 5.0)):
        run.append([Item(number, {"text": "a", "seconds": seconds}, {})])
    archives_in(tmp_path / ITEMS)[2][2].write_bytes(b"damaged")  # which holds nothing
    with pytest.raises(UserError, match=r"--overwrite replaces it, with its 2 finished items \(about 1.5 min\)$"):
        open_run(tmp_path, about=identity(k=4))
    finished(tmp_path / "run")
    with pytest.raises(UserError, match=r"with its 6 finished items$"):  # an earlier version kept no time
        open_run(tmp_path / "run", about=identity(k=4))


def test_texts_that_were_wanted_come_first_among_those_of_an_extended_run(tmp_path):
    texts, path = ["a", "b", "c"], tmp_path / "run"
    run, _ = open_run(path, goal=texts[:2])
    run.append([item(0), item(1)])
    for _ in range(2):
        for goal, reason in (
            (["a"], r"unfinished run of more texts \(the next was 'b'\)"),
            (["b", "a"], "number 1 was 'a'"),
        ):
            with pytest.raises(UserError, match=reason):
                open_run(path, goal=goal)
        assert open_run(path, goal=texts)[1] is State.STARTED
    merge(run)
    assert [open_run(path, goal=goal)[1] for goal in (["a"], texts[:2], texts)] == [
        State.FINISHED, State.FINISHED, State.STARTED,
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"of other texts \(number 2 was 'b', and is 'c'\)"):
        open_run(path, goal=["a", "c"])


def test_overwriting_removes_an_earlier_run_with_the_first_item_and_not_before(tmp_path):
    finished(tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    run, state = open_run(tmp_path, about=identity(k=4), overwrite=True)
    assert state is State.NEW and (tmp_path / "results.json").read_bytes() == before
    run.append([item(5)])
    assert not (tmp_path / "results.json").exists() and numbers(open_run(tmp_path, about=identity(k=4))[0]) == [5]


@pytest.mark.parametrize("step", range(1, 4))
def test_overwriting_that_is_stopped_anywhere_leaves_one_run_or_none(step, tmp_path, monkeypatch):
    run, _ = open_run(tmp_path)
    run.append([item(0)])
    calls, write = [], Run._write_manifest

    def stop_at(self, **changes):
        calls.append(None)
        if len(calls) == step:
            raise KeyboardInterrupt
        write(self, **changes)

    other, _ = open_run(tmp_path, about=identity(k=4), overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_write_manifest", stop_at)
        if step < 3:
            with pytest.raises(KeyboardInterrupt):
                other.begin()
        else:
            other.begin()
    found = numbers(open_run(tmp_path, about=identity(k=4 if step == 3 else 3))[0])
    assert found == ([0] if step == 1 else [])


def test_files_of_others_are_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"files that script.py did not write \(thesis.tex\)"):
            open_run(tmp_path, overwrite=overwrite)
    finished(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")  # a user's notes beside a run are no obstacle
    run, state = open_run(tmp_path / "run", overwrite=True)
    run.append([item(0)])
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_results_without_a_manifest_are_replaced_when_asked(tmp_path):
    finished(tmp_path)
    (tmp_path / ITEMS / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"results without a readable items/run.json: --overwrite"):
        open_run(tmp_path)
    assert open_run(tmp_path, overwrite=True)[1] is State.NEW


def test_a_run_of_another_program_is_refused(tmp_path):
    finished(tmp_path)
    with pytest.raises(UserError, match=r"holds a run of script.py: choose another"):
        Run(tmp_path, "other.py", FILES).open()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (ITEMS, "a file"),
        *((name, "a directory") for name in ("results.json", f"{ITEMS}/{MANIFEST}", f"{ITEMS}/00000000-00000001.npz")),
    ],
)
def test_what_is_in_a_files_place_is_found_at_once(name, kind, tmp_path):
    (tmp_path / name).mkdir(parents=True) if kind == "a directory" else (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"cannot write .*{name}: {kind}"):
        open_run(tmp_path)


def test_a_file_that_vanished_before_it_was_sealed_is_damaged(tmp_path):
    run, _ = open_run(tmp_path)
    run.append([item(0)])
    run.finish(1, ["results.json"])
    run.derive(["picture.png"], 1, lambda: None)
    assert not run.is_derived(["picture.png"], 1)
    with pytest.warns(UserWarning, match="results.json is missing or damaged"):
        assert open_run(tmp_path)[1] is State.NEW


def test_derived_files_are_made_when_missing_damaged_or_of_something_else(tmp_path):
    run, made = finished(tmp_path), []

    def make() -> None:
        made.append(None)
        (tmp_path / "picture.png").write_text("picture")

    def derive(made_from: object) -> bool:
        run, _ = open_run(tmp_path)
        return run.derive(["picture.png"], made_from, make)

    assert derive([1, "a"]) and not derive([1, "a"])
    assert derive([2, "a"]) and not derive([2, "a"])
    (tmp_path / "picture.png").write_text("pixture")
    assert derive([2, "a"])
    (tmp_path / "picture.png").unlink()
    assert derive([2, "a"]) and len(made) == 4
    assert read_manifest(tmp_path)["primary"] == run.manifest["primary"]  # never a reason to compute again
    assert open_run(tmp_path)[1] is State.FINISHED
