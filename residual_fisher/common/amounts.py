"""Amounts of time and memory, in words; and the most memory that was held."""

from collections.abc import Iterable
import sys

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None

SECONDS = {"days": 86400, "h": 3600, "min": 60, "s": 1}
BYTES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1}


def duration(seconds: float) -> str:
    return _in_units(seconds, SECONDS)


def size(count: float) -> str:
    return _in_units(count, BYTES)


def _in_units(value: float, units: dict[str, float]) -> str:
    """In the largest unit of which there is one, with two digits or more."""
    unit = next((unit for unit in units if value >= units[unit]), list(units)[-1])
    number = value / units[unit]
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def peak_memory(devices: Iterable) -> str:
    """The most memory held so far, in words: of each GPU among the torch `devices`, else of this process."""
    gpus = sorted((device for device in devices if device.type == "cuda"), key=str)
    if gpus:
        import torch  # slow, and whoever only wants the words has no need of it

        total = {gpu: torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus}
        return ", ".join(f"{size(torch.cuda.max_memory_allocated(gpu))} of {size(total[gpu])} on {gpu}" for gpu in gpus)
    if resource is None:
        return "unknown on this system"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return f"{size(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)} of this process"
