"""Metadata at the head of a README.md, in YAML, as the Hugging Face Hub reads it. Needs no library."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .text import printable

# texts that YAML reads as texts without quotes: no numbers, no "on", "no" and the like
_PLAIN = re.compile(r"(?!(?i:true|false|yes|no|on|off|null|nan|inf|[yn])\Z)[A-Za-z]\w*([ ./-]\w+)*", re.ASCII)


def front_matter(metadata: Mapping[str, Any]) -> str:
    """The lines of the head: texts, finite numbers, booleans, and mappings and lists of these."""
    return "\n".join(["---", *_lines(metadata), "---", ""])


def _lines(value: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A mapping in block style."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield f"{indent}{key}:"
            yield from _lines(inner, indent + "  ")
        elif isinstance(inner, (list, tuple)):
            yield f"{indent}{key}:"
            for item in inner:
                if isinstance(item, Mapping):
                    first, *rest = _lines(item, indent + "  ")
                    yield f"{indent}- {first.lstrip()}"
                    yield from rest
                else:
                    yield f"{indent}- {_scalar(item)}"
        else:
            yield f"{indent}{key}: {_scalar(inner)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    # a text as in JSON, which YAML reads
    text = json.dumps(printable(value) if isinstance(value, str) else value, allow_nan=False, ensure_ascii=False)
    # YAML 1.1 takes 1e-05 for a text
    return re.sub(r"^(-?\d+)e", r"\1.0e", text) if isinstance(value, float) else text
