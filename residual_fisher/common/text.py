"""Text for a terminal: excerpts, tables, amounts."""

SECONDS = {"days": 86400, "h": 3600, "min": 60, "s": 1}
BYTES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1}


def printable(text: str) -> str:
    """`text` with an escape for every character that a terminal would obey or not show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def excerpt(text: str, length: int) -> str:
    """The beginning of a text: one line of at most `length` printable characters."""
    text = printable(" ".join(text[: 4 * length].split()))
    return text if len(text) <= length else text[: length - 1] + "…"


def excerpt_end(text: str, length: int) -> str:
    """The end of a text: at most `length` printable characters."""
    text = printable(text)
    return text if len(text) <= length else "…" + text[1 - length :]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in [header, *rows]:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def model_line(name: str, environment: dict) -> str:
    """One line about the model, from the result of `model.loading.describe`."""
    size, place = f"{environment['parameters']:,} parameters", f"{environment['dtype']} on {environment['device']}"
    return f"{printable(name)}: {size}, {place}"


def duration(seconds: float) -> str:
    return _in_units(seconds, SECONDS)


def size(count: float) -> str:
    """Bytes in words."""
    return _in_units(count, BYTES)


def _in_units(value: float, units: dict[str, float]) -> str:
    """Two digits or more, in the largest unit that makes the number 1 or more."""
    unit = next((unit for unit in units if value >= units[unit]), list(units)[-1])
    number = value / units[unit]
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"
