"""Looking things up by the name that a config gives."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(kind: str, known: Mapping[str, T], name: str) -> T:
    """`known[name]`; a `ValueError` that names near matches if there is none."""
    if name not in tuple(known):  # a list, say, has no hash
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")
    return known[name]
