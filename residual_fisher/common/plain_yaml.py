"""YAML of plain keys and values. What else the language has is refused: tags, aliases, a key twice in a mapping.

An alias can make a short text endless, a tag can make any object of it, and of two equal keys YAML drops one.
"""

from collections import Counter

import yaml


class _Values(yaml.SafeLoader):
    """Numbers, dates and so on are recognised by how they are written."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag not in (None, "!"):
            what = "an alias (*name)" if isinstance(event, yaml.AliasEvent) else "a tag (!name)"
            raise yaml.MarkedYAMLError(problem=f"{what} is not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys[key.value] > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


class _Words(_Values):
    """Every scalar is the text that stands there, except null."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _load(text: str, loader: type):
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise ValueError(f"{reason}{where}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except OverflowError as error:  # of a character's number
        raise ValueError(str(error)) from error


def parse_words(text: str):
    """The value of a YAML text, its scalars as str or None: `010` stays what a command line would have read.

    Raises:
        ValueError: what is wrong with it, in a line.
    """
    return _load(text, _Words)


def parse_values(text: str):
    """The value of a YAML text. Raises ValueError: what is wrong with it, in a line."""
    return _load(text, _Values)
