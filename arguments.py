"""What both command lines share: argument types, one-line errors, text that is safe to print, an absent network."""

import argparse
import math
import os
from pathlib import Path
import socket
from urllib.parse import urlparse
from urllib.request import getproxies

HUB = "https://huggingface.co"  # the default of HF_ENDPOINT
EMBEDDED = "smollm2-135m"  # the model that comes from the package index: see models.py


class Parser(argparse.ArgumentParser):
    """Answers bad arguments with one line on stderr and exit code 2, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def positive_or_all(text: str) -> int | str:
    return text if text == "all" else positive(text)


def layer_number(text: str) -> int | str:
    return text if text == "all" else count(text)


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def settle_network(*names: str) -> None:
    """Tells the hub's libraries to stay offline if one of `names` may be on the hub, and it has no address here.

    They would else retry for a minute before they fail, or look into their cache. Has to be called
    before they are imported, which is when they read this setting.
    """
    if all(name == EMBEDDED or Path(name).exists() for name in names) or getproxies():
        return
    try:
        socket.getaddrinfo(urlparse(os.environ.get("HF_ENDPOINT", HUB)).hostname, 443)
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def printable(text: str) -> str:
    """`text` with everything a terminal would obey, or not show, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
