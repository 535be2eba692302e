"""Files appear whole or not at all."""

import json
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

from errors import UserError
import storage


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    storage.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        storage.write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError), storage.atomic_open(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_killed_in_the_middle_the_old_file_stays(tmp_path):
    path = tmp_path / "results.json"
    storage.write_json(path, {"a": 1})
    code = (
        "import os, pathlib, signal, sys, storage\n"
        "with storage.atomic_open(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], cwd=os.path.dirname(storage.__file__)).returncode == -9
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_line(tmp_path):
    path = tmp_path / "results.npz"
    with pytest.raises(UserError, match="No space left"), storage.atomic_open(path):
        Path("/dev/full").write_bytes(b"x")
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(UserError, match="cannot write to"):
            storage.check_writable(directory)
    storage.check_writable(tmp_path / "new" / "results")
    assert os.listdir(tmp_path) == ["file"]


def test_json_holds_float32_and_no_more(tmp_path):
    value = float(np.float32(0.1))  # 0.10000000149011612
    storage.write_json(tmp_path / "a.json", {"x": {0: [value, np.float64(1) / 3]}, "y": np.eye(2)})
    assert (text := (tmp_path / "a.json").read_text()).count("0.1") == 1
    assert json.loads(text) == {"x": {"0": [0.1, 0.3333333]}, "y": [[1.0, 0.0], [0.0, 1.0]]}


def test_npz_bytes_are_a_function_of_the_arrays(tmp_path):
    for name in ("a.npz", "b.npz"):
        storage.write_npz(tmp_path / name, {"x": np.arange(3.0), "layers": np.arange(2)})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
