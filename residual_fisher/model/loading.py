"""Loading models by name (the embedded small one, a hub id or a local directory), and finding their layers."""

from collections.abc import Iterator
from contextlib import contextmanager
import difflib
import hashlib
from importlib.metadata import version
from importlib.util import find_spec
import json
import logging
import math
import os
from pathlib import Path
import pickle
import platform
import sys
import warnings

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from residual_fisher.common.program import EMBEDDED, UserError, hub_hint, is_out_of_memory
from residual_fisher.common.text import excerpt, first_line
from residual_fisher.model.embedded import embedded_model
from residual_fisher.model.passes import UnsupportedModelError, gradient_at_tokens, hooked
from residual_fisher.model.paths import why_no_model

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
# The backward passes of fused attention and of grouped experts have no batching rule.
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
# Share of a GPU's free memory that weights may fill; larger models are spread over devices. The rest is for
# activations, the batched backward pass and the logits.
WEIGHTS_SHARE = 0.9
FIXED_ROTATIONS = {"default", "linear", "yarn", "llama3", "proportional"}  # whatever the length of the prompt


class TooLargeError(UserError):
    def __init__(self):
        super().__init__(
            "the model is larger than the free memory of the GPUs, and gradients need all weights at once, so that "
            "offloading to the CPU saves none: try a smaller dtype, more GPUs, or a smaller model"
        )


def pick_device(device: str = "auto") -> torch.device:
    """The device to run on. "auto" takes cuda, then mps, then cpu."""
    if device == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        torch.empty(1, device=device)
        if torch.device(device).type == "meta":
            raise RuntimeError("it stores no numbers")
    except (RuntimeError, AssertionError) as error:
        reason = "this is no Mac with a chip of Apple's" if device == "mps" else first_line(error).split(". ")[0]
        here = ["cpu", *(f"cuda:{gpu}" for gpu in range(torch.cuda.device_count()))]
        here += ["mps"] * torch.backends.mps.is_available()
        raise UserError(
            f"device {device} is not available: {excerpt(reason, 100)} (here: {', '.join(here)})"
        ) from error
    return torch.device(device)


def load(name: str = EMBEDDED, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False):
    """A causal language model, frozen and in evaluation mode, and its tokenizer.

    Args:
        name: "smollm2-135m", a hub id or a local directory.
        dtype: a key of DTYPES, or "auto": bfloat16 on CUDA, float32 elsewhere.
        device: "auto", or a torch device. With "auto", a model larger than one GPU is spread over all of them. A GPU
            named here becomes CUDA's current one.
    Raises:
        UserError: there is no such model or device, the embedded model cannot be fetched, the files are damaged or
            incomplete, or the model is larger than all GPUs.
        torch.OutOfMemoryError: the weights do not fit.
    """
    if name != EMBEDDED and (reason := why_no_model(name)):
        raise UserError(f"cannot load model {name!r}: {reason}")
    place = pick_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if place.type == "cuda" else "float32"
    if place.index is not None and place.type == "cuda":
        torch.cuda.set_device(place)  # kernels that a model brings along run on the current one
    options = {"dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code, **PLAIN}
    with _explain_failures(name):
        source = str(embedded_model()) if name == EMBEDDED else name
    damaged = os.stat(source).st_ino if name == EMBEDDED else None
    try:
        with _explain_failures(name):
            return _from_files(source, options, place, device)
    except UserError as error:
        if name != EMBEDDED or isinstance(error, TooLargeError):
            raise
        print(f"note: {error}: converting it again", file=sys.stderr)
    with _explain_failures(name):
        return _from_files(str(embedded_model(damaged)), options, place, device)


@contextmanager
def _explain_failures(name: str) -> Iterator[None]:
    """Replaces errors and logs of the libraries about a model's files by a one-line error message.

    The logs of a success are shown at the end of the block.
    """
    # The embedded model loads faster than one can read a progress bar; a log file needs no bar.
    hide_bars = (name == EMBEDDED or not sys.stderr.isatty()) and transformers_logging.is_progress_bar_enabled()
    if hide_bars:
        transformers_logging.disable_progress_bar()
    handlers, logs = logging.getLogger("transformers").handlers, []
    hold = logs.append  # as a filter it drops the record, since it returns None
    for handler in handlers:
        handler.addFilter(hold)
    try:
        yield
    except BaseException as error:
        logs.clear()
        if isinstance(error, UserError) or not isinstance(error, Exception) or is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            what = "it brings code of its own, which only --trust-remote-code runs: read it before"
            raise UserError(f"cannot load model {name!r}: {what}") from error
        hint = hub_hint(error, f"give a hub id, a local directory, or {EMBEDDED}")
        if name == EMBEDDED or Path(name).is_dir():
            hint = "are its files complete, and of one model?"
        elsewhere = "" if name == EMBEDDED or Path(name).is_dir() else "no such folder, and on the hub: "
        raise UserError(f"cannot load model {name!r}: {elsewhere}{excerpt(_reason(error), 300)} ({hint})") from error
    finally:
        if hide_bars:
            transformers_logging.enable_progress_bar()
        for handler in handlers:
            handler.removeFilter(hold)
            for record in logs:
                handler.handle(record)


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle that torch refuses as unsafe, not safetensors"
    if "trust_remote_code" in str(error):
        return (
            "it brings code of its own, which is run only with trust_remote_code (--trust-remote-code): read it first"
        )
    if isinstance(error, OSError):
        return first_line(error)
    if "sentencepiece" in str(error) or "tiktoken" in str(error):
        return "its tokenizer has no tokenizer.json; reading it needs `pip install sentencepiece protobuf tiktoken`"
    if type(error) in (ValueError, ImportError, RuntimeError):
        return str(error)
    return f"{type(error).__name__}: {error}"  # the text alone may say little, as in KeyError: 'weight_map'


def _from_files(source: str, options: dict, place: torch.device, device: str):
    trust = options["trust_remote_code"]
    base = base_of(source)
    with_tokenizer = source if base == source or find_file(source, "tokenizer_config.json") else base
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer, trust_remote_code=trust)
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust)
    spread = place.type == "cuda" and device == "auto" and _exceeds_gpu(config, options)
    model, found = model_class(config).from_pretrained(
        source,
        **options,
        device_map="auto" if spread else {"": place},  # straight to the device, past host memory
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported in `found` instead of raised
    )
    if missing := found["missing_keys"]:  # transformers has drawn them at random
        raise ValueError(f"its checkpoint lacks {len(missing)} of the weights, {min(missing)} among them")
    if mismatched := found["mismatched_keys"]:  # these too
        key, *shapes = min(mismatched)
        own, wanted = (" x ".join(map(str, shape)) for shape in shapes)
        raise ValueError(f"{len(mismatched)} of its weights have another shape: {key} is {own}, not {wanted}")
    if any(p.is_meta for p in model.parameters()):
        raise TooLargeError
    model.eval().requires_grad_(False)
    with torch.no_grad():  # wrong values that no library has checked fail here
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return model, tokenizer


def model_class(config) -> type:
    """The class that loads a model for text; of a model that also sees images, the one for both."""
    kind, causal = type(config).__name__.removesuffix("Config"), type(config) in AutoModelForCausalLM._model_mapping
    if config.is_encoder_decoder and not causal:
        raise ValueError(f"{kind} is an encoder-decoder, not a decoder-only language model")
    if causal or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    raise ValueError(f"transformers has no causal language model for {kind}")


def find_file(source: str, name: str) -> str | None:
    """The path of a file of a hub repository or local directory; None if it is missing or the hub does not answer."""
    causes = ("missing_entries", "connection_errors", "gated_repo")
    return cached_file(source, name, **{f"_raise_exceptions_for_{cause}": False for cause in causes})


def base_of(source: str) -> str:
    """The model that an adapter (LoRA and others of the package peft) adapts; a complete model is its own base."""
    if find_file(source, "config.json") or not (adapter := find_file(source, "adapter_config.json")):
        return source
    if find_spec("peft") is None:
        raise ValueError("it is an adapter, which needs another package: `pip install peft`")
    base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if reason := why_no_model(base):
        raise ValueError(f"it adapts {base!r}, which cannot be loaded: {reason}")
    return base


def _exceeds_gpu(config, options: dict) -> bool:
    """Whether a model is larger than CUDA's current GPU. Raises TooLargeError: it is larger than all GPUs."""
    with torch.device("meta"):
        model = model_class(config).from_config(config, trust_remote_code=options["trust_remote_code"])
    size = sum(p.numel() for p in model.parameters()) * options["dtype"].itemsize

    def room(gpu: int) -> float:  # asking takes a CUDA context there, of hundreds of megabytes
        return WEIGHTS_SHARE * torch.cuda.mem_get_info(gpu)[0]

    if size <= room(torch.cuda.current_device()):
        return False
    if size > sum(map(room, range(torch.cuda.device_count()))):  # before minutes of loading
        raise TooLargeError
    return True


def fix_arithmetic(model: nn.Module) -> None:
    """For the rest of the process: float32 products keep their digits, and on CUDA equal calls give equal bits.

    Whatever the process was told, there is no TF32: an exact eigenpair's residual is 5e-5 with it, and 1e-6 without. A
    model that has no deterministic kernel for one of its operations goes without, with a warning.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # in convolutions, which recurrent models have
    if model.device.type != "cuda":
        return
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written
    torch.use_deterministic_algorithms(
        True
    )  # not `warn_only`, which leaves the backward pass of fused attention as it is
    try:
        gradient_at_tokens(model, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2]))
    except Exception as error:  # of all others the run will tell
        if "deterministic" in str(error):
            torch.use_deterministic_algorithms(False)
            reason = excerpt(first_line(error), 100)
            warnings.warn(f"equal runs of {type(model).__name__} may differ by rounding: {reason}", stacklevel=2)


def _arithmetic(device: torch.device) -> dict:
    """What results record of `fix_arithmetic`, and of the kernels that fused attention may run in."""
    precision = {"float32_matmul_precision": torch.get_float32_matmul_precision()}
    if device.type != "cuda":
        return precision
    names = ("flash", "mem_efficient", "math", "cudnn")
    with hooked():
        kernels = [name for name in names if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    return {**precision, "deterministic": torch.are_deterministic_algorithms_enabled(), "attention_kernels": kernels}


def describe(model: nn.Module) -> dict:
    """What results record of the model and the machine."""
    device = model.device
    return {
        "model_class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "depth": text_config(model).num_hidden_layers,
        "hidden_size": text_config(model).hidden_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **_arithmetic(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


# Configuration keys that change no prediction, or that this project sets itself.
VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
BLOCK = 1 << 14  # 32-bit words that are summed up at a time


def fingerprint(model: nn.Module, tokenizer) -> str:
    """A hash of all that predictions depend on: configuration, tokenizer, chat template, weights and saved buffers.

    Buffers that a checkpoint does not hold are left out: they follow from the configuration, and some depend on the
    prompts that were run. Of offloaded weights only names, shapes and dtypes count.
    """
    config = json.loads(
        model.config.to_json_string(use_diff=False),
        object_hook=lambda part: {key: value for key, value in part.items() if key not in VOLATILE},
    )
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    digest = hashlib.sha256(json.dumps([config, vocabulary, tokenizer.chat_template], sort_keys=True).encode())
    for name, values in model.state_dict().items():
        digest.update(_described(name, values).encode())
    return digest.hexdigest()[:32]


def _described(name: str, values) -> str:
    if hasattr(values, "__tensor_flatten__"):  # made of other tensors, as a quantised one is
        inner, _ = values.__tensor_flatten__()
        return "".join(_described(f"{name}.{part}", getattr(values, part)) for part in inner)
    if not isinstance(values, torch.Tensor):
        return ""
    return f"{name} {tuple(values.shape)} {values.dtype} {None if values.is_meta else _checksum(values)}"


def _checksum(values: torch.Tensor) -> str:
    """SHA-256 of two sums of each block of a tensor's 32-bit words, which are computed where the tensor is.

    A word is weighted with two odd scrambled numbers of its place; sums are modulo 2^64, and exact: the same on every
    device. Were the weights drawn at random, a change of one word would never be missed, and any other change with a
    probability of 2^-64 at most: words differ by less than 2^32, so each of the two sums is missed with 2^-32
    (multilinear hashing: Carter and Wegman, "Universal classes of hash functions", 1979).
    """
    data = values.detach().contiguous().flatten().view(torch.uint8)
    weights = _scrambled(torch.arange(2 * BLOCK, device=data.device)).unflatten(0, (2, BLOCK))
    at_once = 8 * BLOCK if data.device.type == "cpu" else 1 << 26  # bytes: for a CPU's cache, for a GPU's work
    digest = hashlib.sha256()
    for some in data.split(at_once):
        words = nn.functional.pad(some, (0, -len(some) % (4 * BLOCK))).view(torch.int32).unflatten(0, (-1, BLOCK))
        sums = torch.stack([(words * weight).sum(-1) for weight in weights], dim=-1)  # (blocks, 2)
        digest.update(sums.cpu().numpy())
    return digest.hexdigest()


def _scrambled(numbers: torch.Tensor) -> torch.Tensor:
    """Odd numbers int64 without the order of `numbers` (after the SplitMix64 generator)."""
    numbers = (numbers + 1) * -0x61C8864680B583EB
    numbers = (numbers ^ (numbers >> 30)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ (numbers >> 27)) * -0x6B2FB644ECCEEE15
    return (numbers ^ (numbers >> 31)) | 1


def dtype_advice(model: nn.Module) -> str:
    """What to add to a message about NaN or infinity: in half precision, a wider dtype may help."""
    return " (try dtype float32)" if model.dtype.itemsize < 4 else ""


# --- the layers of any decoder -------------------------------------------------------------------


def text_config(model: nn.Module):
    """The configuration of the decoder; in a model that also sees images, it is a part of the model's own."""
    return model.config.get_text_config(decoder=True)


def vocabulary_size(model: nn.Module) -> int:
    """How many tokens the output head has, which may be more than the tokenizer's."""
    return model.get_output_embeddings().weight.shape[0]


def rotations(model: nn.Module) -> list[tuple[str, dict]]:
    """Kind and settings of a model's rotation of positions; of several kinds of layers, of each."""
    config = text_config(model).to_dict()
    parts = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    parts += [inner for part in parts for inner in part.values() if isinstance(inner, dict)]
    return [(part.get("rope_type") or part.get("type") or "default", part) for part in parts]


def rotation_change(model: nn.Module) -> float:
    """The length above which a pass rotates all its positions differently (Phi-3's longrope); infinite if none does."""
    places = [part for kind, part in rotations(model) if kind not in FIXED_ROTATIONS]
    places += [text_config(model).to_dict()] * bool(places)
    return min((p.get("original_max_position_embeddings") or math.inf for p in places), default=math.inf)


def longest_prompt(model: nn.Module) -> int | None:
    """How many positions the model has; None if its configuration names no limit."""
    return getattr(text_config(model), "max_position_embeddings", None) or None


def require_fixed_rotation(model: nn.Module, ids: torch.Tensor) -> None:
    """Raises UnsupportedModelError for prompts (..., tokens) above the own length of a model with dynamic NTK scaling.

    There every length has a base of its own, and transformers keeps that of the longest prompt that was run.
    """
    longest = longest_prompt(model) or ids.shape[-1]
    if ids.shape[-1] > longest and any("dynamic" in kind for kind, _ in rotations(model)):
        raise UnsupportedModelError(f"above {longest} tokens its rotation (dynamic NTK) depends on the prompts before")


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers of a causal LM, by module path, in order: {"model.layers.0": module, ...}.

    They are a module list of the length that the configuration gives for the decoder. It is looked for in the part that
    transformers calls the decoder, then anywhere. Of several such lists, the outermost is taken (a vision tower is
    deeper inside), then the one with the most parameters. Raises UserError if there is none.
    """
    depth = getattr(text_config(model), "num_hidden_layers", None)
    paths = {module: path for path, module in model.named_modules()}
    for part in (model.get_decoder(), model):
        lists = [m for m in part.modules() if isinstance(m, nn.ModuleList) and len(m) == depth and m in paths]
        if depth and lists:
            layers = max(lists, key=lambda m: (-paths[m].count("."), sum(p.numel() for p in m.parameters())))
            return {f"{paths[layers]}.{index}": layer for index, layer in enumerate(layers)}
    raise UserError(f"{type(model).__name__} has no list of {depth} decoder layers to hook")


def find_module(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """(path, module) by the path ("model.layers.15"), or of a decoder layer by its number ("15"); else UserError."""
    modules = {path: module for path, module in model.named_modules() if path}  # "" is the model itself
    if name in modules:
        return name, modules[name]
    layers = decoder_layers(model)
    if name.isdecimal() and int(name) < len(layers):
        return list(layers.items())[int(name)]
    first, *_, last = layers
    near = difflib.get_close_matches(name, modules, 1)
    hint = f"; did you mean {near[0]}?" if near and near[0] not in layers else ""
    raise UserError(f"{type(model).__name__} has no module {name!r}: its layers are {first} ... {last}{hint}")
