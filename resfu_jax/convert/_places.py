"""Finds a module's entries in a checkpoint, where wrappers and larger models put a prefix to them.

`DistributedDataParallel` names them `module.*`, `torch.compile` `_orig_mod.*`, a segmentor
`backbone.*`, a trainer `state_dict.*`, DINO `teacher.backbone.*`, and all of these in any order: no
list of prefixes is known here. What counts is that all entries are there, with their shapes.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from resfu_jax.convert._state import Misfit, shorten

T = TypeVar("T")


def load_from(
    entries: Mapping[str, Any],
    load: Callable[[dict[str, Any]], T],
    *,
    prefix: str | None,
    sections: Collection[str] | None = None,
) -> tuple[T, str]:
    """Loads the entries at the top or, with all of their names, below one prefix.

    Args:
      entries: of the whole file, by name.
      load: makes the module from its own entries, or raises a `Misfit`.
      prefix: where they are, or where to look for them; what stands before it (`state_dict.`,
        `module.`) may be left out if it is always the same. None looks everywhere, `""` nowhere
        but at the top.
      sections: None if the module may be a part of a larger model. Else a prefix that is not given
        is taken only if all entries have it, or all of one of these sections: the dictionaries,
        such as `"state_dict."`, that a checkpoint keeps beside an optimiser's and others.

    Returns:
      What `load` returns, and the prefix.

    Raises:
      ValueError: there is no such place, or several.
    """
    if prefix == "":
        return load(dict(entries)), ""
    base = "" if prefix is None else _base(entries, f"{prefix.removesuffix('.')}.")
    if base and sections is not None:
        sections = ()
    found, at = _search(below(entries, base), load, base, sections)
    return found, base + at


def _base(entries: Mapping[str, Any], prefix: str) -> str:
    """The prefix with what stands before it."""
    before = {"" if name.startswith(prefix) else _before(name, prefix) for name in entries}
    before = {""} if "" in before else before - {None}
    if not before:
        raise ValueError(f"no name begins with prefix {prefix!r}; {beginnings(entries)}")
    if len(before) > 1:
        listed = ", ".join(repr(shorten(b + prefix)) for b in sorted(before)[:8])
        raise ValueError(f"prefix {prefix!r} is in {len(before)} places: choose one of {listed}")
    return before.pop() + prefix


def _before(name: str, prefix: str) -> str | None:
    at = name.find(f".{prefix}")
    return None if at < 0 else name[: at + 1]


def _search(
    entries: Mapping[str, Any],
    load: Callable[[dict[str, Any]], T],
    base: str,
    sections: Collection[str] | None,
) -> tuple[T, str]:
    """What `load_from` does below `base`."""
    try:
        return load(dict(entries)), ""
    except Misfit as error:
        at_top = error

    # Places that have all entries: with what was loaded, or what is there besides.
    places: dict[str, T | Misfit] = {}
    if not at_top.lacks:
        places[""] = at_top
    nearest, nearest_at = at_top, ""
    for at in _candidates(entries, at_top.wanted):
        inside = below(entries, at)
        try:
            found: T | Misfit = load(inside)
        except Misfit as error:
            if error.lacks:
                if error.lacks < nearest.lacks:
                    nearest, nearest_at = error, at
                continue
            found = error
        # `load` may know a prefix itself: then it has found the same entries from further out.
        outer = [p for p in places if at.startswith(p) and _same(places[p], at[len(p) :], inside)]
        if not outer:
            places[at] = found
        elif isinstance(places[outer[0]], Misfit) and not isinstance(found, Misfit):
            del places[outer[0]]
            places[at] = found

    if len(places) > 1:
        listed = ", ".join(repr(base + p) if base + p else "the top" for p in list(places)[:8])
        more = f" and {len(places) - 8} more" if len(places) > 8 else ""
        raise ValueError(
            f"{at_top.source} has the entries of {at_top.owner} in {len(places)} places, "
            f"{listed}{more}: choose one with prefix=..."
        )
    if not places:
        raise _explained(nearest, base + nearest_at, entries)
    ((at, found),) = places.items()
    if isinstance(found, Misfit):
        raise _explained(found, base + at, entries)
    section = next((s for s in sections or () if at.startswith(s)), "")
    if sections is not None and len(below(entries, section)) > len(below(entries, at)):
        place = base + at
        raise ValueError(
            f"{at_top.source} has the entries of {at_top.owner} below {place!r}, and others beside "
            f"them ({beginnings(entries)}): say that you mean these with prefix={place!r}"
        )
    return found, at


def below(entries: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The entries whose names begin with the prefix, without it."""
    return {n.removeprefix(prefix): v for n, v in entries.items() if n.startswith(prefix)}


def beginnings(names: Mapping[str, Any]) -> str:
    """Says how the names begin."""
    if not names:
        return "it has no entries"
    first = Counter(name.partition(".")[0] + "." * ("." in name) for name in names)
    common = ", ".join(f"{shorten(p, 40)!r} ({n})" for p, n in first.most_common(5))
    if len(first) == 1:
        return f"all its names begin with {shorten(next(iter(first)), 60)!r}"
    return f"its names begin with {common}{', ...' if len(first) > 5 else ''}"


def _candidates(entries: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Prefixes that enough entries have, the shortest first; a fused entry may stand for three."""
    counts: Counter[str] = Counter()
    for name in entries:
        parts = name.split(".")
        counts.update(".".join(parts[:i]) + "." for i in range(1, min(len(parts), 12)))
    return sorted((p for p, n in counts.items() if 3 * n >= len(wanted)), key=len)


def _same(found: Any, prefix: str, inside: Mapping[str, Any]) -> bool:
    """Whether what was found from further out are the entries inside: it had a use for them."""
    if not isinstance(found, Misfit):
        return True
    unused = sum(prefix + name in found.unexpected_names for name in inside)
    return 2 * unused < len(inside)


def _explained(error: Misfit, at: str, entries: Mapping[str, Any]) -> Misfit:
    """The error with the cause that the names tell."""
    if len(error.missing) == len(error.wanted):
        error.causes.append(f"it has none of the names of {error.owner}; {beginnings(entries)}")
    elif at:
        error.causes.append(f"of the entries below {at!r}")
    if error.misshapen and not error.missing and not error.unexpected and not error.problems:
        error.causes.append("all names are right, so the arguments or sizes are others")
    return error
