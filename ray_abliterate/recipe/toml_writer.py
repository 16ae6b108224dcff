"""Write a recipe's values as TOML; `tomllib` only reads. Knows nothing about what they mean."""

import json
import re
from collections.abc import Mapping
from typing import Any


def to_toml(values: Mapping[str, Any]) -> str:
    """Return a recipe's values as TOML text: a table for each section, the rest inline.

    Args:
        values: By section: a mapping, or a list of mappings, of JSON values without null.
    """
    lines = []
    for section, entries in values.items():
        for table in entries if isinstance(entries, list) else [entries]:
            lines += ["", f"[[{section}]]" if isinstance(entries, list) else f"[{section}]"]
            lines += [f"{_key(name)} = {_inline(value)}" for name, value in table.items()]
    return "\n".join([*lines, ""])


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    # JSON's strings, numbers and truth values are TOML's, but for this character
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name)
