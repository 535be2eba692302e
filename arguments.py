"""Argument types of the command lines: what a flag may hold, and one line when it holds something else."""

import argparse
import math


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
