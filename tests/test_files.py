"""Files appear whole or not at all."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest

from residual_fisher.common import files
from residual_fisher.common.program import UserError
from scripts import ROOT


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        files.write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError), files.atomic_open(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_killed_in_the_middle_the_old_file_stays(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": 1})
    code = (
        "import os, pathlib, signal, sys; from residual_fisher.common import files\n"
        "with files.atomic_open(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT).returncode == -signal.SIGKILL
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(os.listdir(tmp_path)) == 2  # and the half-written one is another file


def test_a_full_disk_is_one_line_and_leaves_the_old_file(small_disk):
    path = small_disk.path / "results.npz"
    files.write_npz(path, {"x": np.arange(3.0)})
    with pytest.raises(UserError, match=rf"cannot write {path}: No space left on device$"):
        files.write_npz(path, {"x": np.arange(1e6)})
    assert os.listdir(small_disk.path) == ["results.npz"]
    with np.load(path) as arrays:
        assert arrays["x"].tolist() == [0, 1, 2]


def test_a_file_that_may_not_grow_is_one_line_and_leaves_the_old_file(tmp_path):
    """What a quota does; unlike a full disk, every machine has it."""
    path = tmp_path / "results.npz"
    files.write_npz(path, {"x": np.arange(3.0)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            files.write_npz(path, {"x": np.arange(1e6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["results.npz"]
    with np.load(path) as arrays:
        assert arrays["x"].tolist() == [0, 1, 2]


def test_a_new_file_has_the_rights_that_the_umask_leaves_which_nobody_touches(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        # the umask is the whole process's: to read it by setting it would open other threads' files to everyone
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is changed"))
        files.write_json(tmp_path / "new.json", {})
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == 0o640


def test_a_file_in_the_way_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(UserError, match="cannot write to"):
            files.check_writable(directory)
    files.check_writable(tmp_path / "new" / "results")
    assert os.listdir(tmp_path) == ["file"]


def test_json_holds_the_digits_of_float32_and_no_more(tmp_path):
    value = float(np.float32(0.1))  # 0.10000000149011612
    files.write_json(tmp_path / "a.json", {"x": {0: [value, np.float64(1) / 3]}, "y": np.eye(2)})
    assert (text := (tmp_path / "a.json").read_text()).count("0.1") == 1
    assert json.loads(text) == {"x": {"0": [0.1, 0.3333333]}, "y": [[1.0, 0.0], [0.0, 1.0]]}


def test_npz_bytes_are_a_function_of_the_arrays(tmp_path):
    for name in ("a.npz", "b.npz"):
        files.write_npz(tmp_path / name, {"x": np.arange(3.0), "layers": np.arange(2)})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_archive_written_member_by_member_is_an_npz(tmp_path):
    members = [("x.npy", np.arange(3.0)), ("about.txt", b"as it is"), ("y.npy", np.eye(2))]
    for name in ("a.npz", "b.npz"):
        files.write_archive(tmp_path / name, iter(members))
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["x"].tolist() == [0, 1, 2] and arrays["y"].shape == (2, 2)
        assert arrays.zip.read("about.txt") == b"as it is"
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
