"""What the name of a model stands for, if it is no model that can be loaded: told before any library reads it."""

import os
from pathlib import Path

from residual_fisher.common.program import not_on_the_hub
from residual_fisher.common.sources import POINTER_SAID, is_pointer

CONFIGS = ("config.json", "adapter_config.json")
WEIGHTS = (".safetensors", ".bin", ".index.json")
TOKENIZERS = ("token", "vocab", "spiece", "spm", "merges", "tekken", ".model", ".tiktoken")  # parts of files' names
GGUF = "GGUF, the format of llama.cpp: give the model that it was made from, in safetensors, by its name or its folder"


def why_no_model(name: str) -> str | None:
    """What a name is and what to give instead; None if it may be a model's folder, or its name on the hub."""
    if os.path.isfile(name):
        return f"it is {GGUF}" if name.lower().endswith(".gguf") else "it is a file: give the folder that holds it"
    if not os.path.isdir(name):
        return not_on_the_hub(name, "model")
    folder, files = Path(name), sorted(os.listdir(name))
    if "snapshots" in files and not any(config in files for config in CONFIGS):
        hub_name = folder.resolve().name.removeprefix("models--").replace("--", "/")
        return f"it is a folder of the hub's cache: give {hub_name}, or the folder in its snapshots"
    only_gguf = any(file.lower().endswith(".gguf") for file in files) and not any(f.endswith(WEIGHTS) for f in files)
    if only_gguf:
        return f"its weights are {GGUF}"
    if not any(config in files for config in CONFIGS):
        inside = next((file for file in files if any((folder / file / config).is_file() for config in CONFIGS)), None)
        hint = f"; did you mean {folder / inside}?" if inside else ""
        return f"it has no config.json, so it is no model's folder{hint}"
    for file in files:
        if (folder / file).is_file() and is_pointer(str(folder / file)):
            return f"its {file} is {POINTER_SAID}"
    if "config.json" not in files:
        return None  # an adapter
    if not any(file.endswith(WEIGHTS) for file in files):
        return "it holds no weights (*.safetensors): is it complete?"
    if not any(part in file.lower() for file in files for part in TOKENIZERS):
        return "it has no tokenizer: save the one of the model that it was made from there, with save_pretrained"
    return None
