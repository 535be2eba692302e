"""Models by name: the embedded small one, a hub id or a local directory; and where their layers are."""

from collections.abc import Iterator
from contextlib import contextmanager
import difflib
import hashlib
from importlib.metadata import version
import platform
import sys

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from common.command_line import EMBEDDED, UserError, first_line, hub_hint
from model.embedded import embedded_model

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
        raise UserError(f"--device {device} is not available: {first_line(error)}") from error
    return torch.device(device)


def load(name: str = EMBEDDED, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False):
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
        hint = hub_hint(error, otherwise=f"give a hub id, a local directory, or {EMBEDDED}")
        raise UserError(f"cannot load model {name!r}: {first_line(error)} ({hint})") from error


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


def vocabulary_size(model: nn.Module) -> int:
    """Tokens that the output head knows, which may be more than the tokenizer's."""
    return model.get_output_embeddings().weight.shape[0]


def longest_prompt(model: nn.Module) -> int | None:
    """Tokens that the model has positions for; None if its configuration names no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or None


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
    modules = {path: module for path, module in model.named_modules() if path}  # "" is the model itself
    if name in modules:
        return name, modules[name]
    first, *_, last = layers
    near = difflib.get_close_matches(name, modules, 1)
    hint = f"; did you mean {near[0]}?" if near and near[0] not in layers else ""
    raise UserError(f"{type(model).__name__} has no module {name!r}: its layers are {first} ... {last}{hint}")
