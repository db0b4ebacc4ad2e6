"""The classes of one's own label maps: read from a file, or found in the label maps.

A class file has a line for each class, in the order of the class indices:

    road                     the number of a class in the label maps is its position, from 0,
    7 = road                 or the number that is given,
    road, 128, 64, 128       or its colour (R, G, B), if the label maps hold no others
    0 = ignore               numbers and colours of pixels that do not count
"""

import json
import os
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resfu_jax._output import counted
from resfu_jax.data.info import DataError
from resfu_jax.data.raw import label_table, map_label, palette

IGNORE = 255
HINT = """\
A label map is a PNG file of the size of its image. Its pixels are the numbers of the classes, their
positions in the class file from 0 and 255 for what is ignored, or others that the class file gives
(`7 = road`); or their colours, if it has one for each (`road, 128, 64, 128`)."""
Colour = tuple[int, int, int]


class Classes(NamedTuple):
    """Classes, and what numbers and colours in label maps mean: a class index, or `IGNORE`.

    Attributes:
      names: of the classes.
      palette: a colour for each, in pictures.
      numbers: of each number.
      colours: of each colour; None if not every class has one of its own.
    """

    names: list[str]
    palette: list[Colour]
    numbers: dict[int, int]
    colours: dict[Colour, int] | None


class Contents(NamedTuple):
    """What a label map holds.

    Attributes:
      path: of the file.
      kind: see `resfu_jax.images.Mask`.
      pixels: how many have each number.
      colours: of each number.
    """

    path: Path
    kind: str
    pixels: dict[int, int]
    colours: dict[int, Colour]


# ------------------------------------------------------------------------------------- class files
def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty and do not begin with #, with their numbers.

    The text is UTF-8, or UTF-16 with a byte order mark; its letters are composed (NFC).

    Raises:
      DataError: it is in another encoding; names the file and the first line of that kind.
    """
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: this is not {encoding.removesuffix('-sig').upper()} "
            f"({error.reason} at byte {error.start}). Save the file as UTF-8: editors have that "
            "choice where they save, and `iconv -f WINDOWS-1252 -t UTF-8` converts."
        ) from error
    if "\0" in text:
        raise DataError(
            f"{path} holds null characters, as UTF-16 without a byte order mark does; save it as "
            "UTF-8."
        )
    text = unicodedata.normalize("NFC", text)
    lines = _of_json(text, path) if path.suffix.lower() == ".json" else text.splitlines()
    kept = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    return [(number, line) for number, line in kept if line and not line.startswith("#")]


def _of_json(text: str, path: Path) -> list[str]:
    """The lines that a list of names, or an object of names and colours or numbers, stands for."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, list | dict):
        raise DataError(
            f'{path} must be a list of names, or an object such as {{"road": [128, 64, 128]}} or '
            '{"road": 7}.'
        )
    lines = []
    for name in content:
        value = content[name] if isinstance(content, dict) else []
        if isinstance(value, list):
            lines.append(", ".join(map(str, [name, *value])))
        else:
            lines.append(f"{value} = {name}")
    return lines


def read_classes(source: str | os.PathLike | Sequence[str]) -> Classes:
    """Classes as a file or its lines say.

    Args:
      source: path of a file, see the beginning of this file; .json has a list of names, or an
        object of names and colours or numbers. Or a sequence of lines. Empty lines and those that
        begin with # do not count. In pictures, classes without a colour get one.

    Raises:
      DataError: naming the line.
    """
    if isinstance(source, str | os.PathLike):
        lines, source = read_lines(Path(source)), str(source)
    else:
        lines, source = list(enumerate(map(str.strip, source), 1)), "classes"
    entries = [
        (f"{source}, line {at}", *_entry(f"{source}, line {at}", line)) for at, line in lines
    ]
    names: list[str] = []
    shown: list[Colour] = []
    numbers: dict[int, int] = {}
    colours: list[tuple[Colour, int]] = []
    for position, (where, number, name, colour) in enumerate(entries):
        if (number is None) != (entries[0][1] is None):
            raise DataError(f"{where}: all lines have a number (NUMBER = name), or none has.")
        if name != "ignore" and name not in names:
            shown.append(colour or palette(len(names) + 1)[-1])
            names.append(name)
        elif name in names and number is None:
            raise DataError(f"{where}: the class {name!r} is there twice.")
        if number in numbers:
            raise DataError(f"{where}: the number {number} is there twice.")
        meaning = IGNORE if name == "ignore" else names.index(name)
        numbers[position if number is None else number] = meaning
        colours += [(colour, meaning)] if colour else []
    if not 2 <= len(names) <= IGNORE:
        found = counted(len(names), "class", "classes")
        raise DataError(f"{source} has {found}; it needs 2 to {IGNORE}.")
    complete = {*range(len(names))} <= {meaning for _, meaning in colours}
    own = len(dict(colours)) == len(colours)
    return Classes(names, shown, numbers, dict(colours) if complete and own else None)


def _entry(where: str, line: str) -> tuple[int | None, str, Colour | None]:
    """Number, name and colour of a line."""
    number, equals, text = line.partition("=")
    if not (equals and number.strip().isdecimal()):
        number, text = "", line
    name, *colour = (field.strip() for field in text.split(","))
    values = [int(c) if c.isdecimal() else 256 for c in colour]
    if not name or len(values) not in (0, 3) or max([*values, int(number or 0)]) > 255:
        raise DataError(
            f"{where}: {line!r} is neither 'name' nor 'name, R, G, B' nor 'NUMBER = name' with "
            "numbers from 0 to 255."
        )
    return int(number) if number else None, name, tuple(values) or None


def read_values(path: Path, names: Sequence[str]) -> dict[int, int]:
    """What the numbers in the label maps mean: class indices, or 255 for pixels to ignore.

    Args:
      path: one number a line, `255 = road` with the name of a class, or `255 = ignore`.
      names: the classes.

    Raises:
      DataError: naming the line.
    """
    classes = {name: index for index, name in enumerate(names)} | {"ignore": IGNORE}
    values: dict[int, int] = {}
    for number, line in read_lines(path):
        value, equals, name = (part.strip() for part in line.partition("="))
        if not (equals and value.isdecimal() and int(value) < 256 and name in classes):
            raise DataError(
                f"{path}, line {number}: {line!r} is not 'NUMBER = NAME' with a number from 0 to "
                f"255 and ignore or a class of classes.txt ({', '.join(names[:5])}"
                f"{', ...' if names[5:] else ''})."
            )
        if int(value) in values:
            raise DataError(f"{path}, line {number}: the number {value} is there twice.")
        values[int(value)] = classes[name]
    if not values:
        raise DataError(f"{path} is empty; without the file, labels are positions in classes.txt.")
    return values


# ---------------------------------------------------------------------------- what label maps hold
def find_classes(contents: Sequence[Contents], ignore_label: int | None) -> tuple[list[str], str]:
    """Classes as label maps suggest them, without names.

    Numbers are taken in their order, and colours where numbers cannot be meant: in RGB, and in
    palettes that differ from file to file. 255 is ignored if two other numbers occur.

    Args:
      contents: of all label maps.
      ignore_label: the number to ignore; None: 255.

    Returns:
      The lines of a class file, and a table of them with their shares of the pixels.

    Raises:
      DataError: fewer than two classes, or more than there can be.
    """
    if _hold_colours(contents):
        kind, pixels = "colour", _pixels_of_colours(contents)
        lines = [f"class_{k},{_text(colour)}" for k, colour in enumerate(sorted(pixels))]
        if ignore_label is not None:
            raise DataError(
                f"ignore_label is {ignore_label}, but these label maps hold colours, not numbers. "
                f"Name classes, and the colour to `ignore`:\n    {_argument(lines)}"
            )
    else:
        kind, pixels = "number", _pixels_of_numbers(contents)
        if ignore_label is None and len(pixels) > 2:
            ignore_label = IGNORE
        lines = [f"{n}={'ignore' if n == ignore_label else f'class_{n}'}" for n in sorted(pixels)]
        if all(each.kind == "palette" for each in contents):
            colours = {n: colour for each in contents for n, colour in each.colours.items()}
            colours = [_text(colours[n]) for n in sorted(pixels)]
            lines = [f"{line},{colour}" for line, colour in zip(lines, colours, strict=True)]
    shares = _table([(pixels[key], line) for key, line in zip(sorted(pixels), lines, strict=True)])
    text = (
        f"{len(contents)} label maps hold {counted(len(lines), kind)}; their shares of all pixels:"
        f"{shares}"
    )
    if not 2 <= sum("=ignore" not in line for line in lines) <= IGNORE:
        raise DataError(f"{text}\nA dataset has 2 to {IGNORE} classes.")
    return lines, f"{text}\nTo name them, or to `ignore` some, edit and add\n    {_argument(lines)}"


def colours_count(contents: Sequence[Contents], classes: Classes) -> bool:
    """Whether the colours of label maps say their classes, because all of them are of classes.

    Else their numbers do.

    Args:
      contents: of all label maps.
      classes: what there may be in them.

    Raises:
      DataError: neither colours nor numbers are all of classes; names files.
    """
    known = classes.colours or {}
    others = [each for each in contents if not known.keys() >= set(each.colours.values())]
    if not others:
        return True
    if _hold_colours(contents):
        others = [each for each in others if each.kind == "rgb"] or others
        pixels = _pixels_of_colours(others)
        unknown = [(count, colour) for colour, count in pixels.items() if colour not in known]
        rows = [(count, _text(colour)) for count, colour in sorted(unknown, reverse=True)]
        raise DataError(
            f"{others[0].path} holds colours that are of no class{_others(others)}. There are, "
            f"with their shares of the pixels:{_table(rows, pixels.total())}\n"
            "Name them in the class file, `name, R, G, B`, and `ignore, R, G, B` for pixels that "
            "do not count. Colours between others come from label maps that were smoothed or "
            f"compressed.\n{HINT}"
        )
    table = label_table(classes.numbers)
    if wrong := [each for each in contents if any(table[n] < 0 for n in each.pixels)]:
        try:
            map_label(np.array([[*wrong[0].pixels]]), table, wrong[0].path, "image_folder")
        except DataError as error:
            raise DataError(f"{error}{_others(wrong)}\n{HINT}") from error
    return False


def check_255(contents: Sequence[Contents], classes: Classes) -> None:
    """Raises a `DataError` if 255 is ignored and all the rest is one class.

    Binary masks are often 0 and 255. Whoever means 255 to be ignored says so.
    """
    pixels = _pixels_of_numbers(contents)
    occur = {classes.numbers[number] for number in pixels} - {IGNORE}
    if 255 in pixels and len(occur) < 2:
        never = [name for index, name in enumerate(classes.names) if index not in occur]
        raise DataError(
            f"The label maps have at most one class: {listed(never)} never "
            f"occur{'s' if len(never) == 1 else ''}, and {pixels[255] / pixels.total():.1%} of the "
            "pixels are 255, which is ignored. If 255 is a class, as in masks of 0 and 255, say so "
            "in --classes, or in a file labels.txt beside classes.txt:\n"
            f"    0 = {classes.names[0]}\n    255 = {classes.names[1]}\n"
            "If it is to be ignored, the second line is\n    255 = ignore\nor --ignore-label 255."
        )


def _hold_colours(contents: Iterable[Contents]) -> bool:
    """Whether numbers cannot be meant: RGB, or palettes that differ."""
    colours: dict[int, Colour] = {}
    for each in contents:
        if each.kind == "rgb":
            return True
        if each.kind == "palette" and any(
            colours.setdefault(number, colour) != colour for number, colour in each.colours.items()
        ):
            return True
    return False


def _pixels_of_numbers(contents: Iterable[Contents]) -> Counter[int]:
    pixels: Counter[int] = Counter()
    for each in contents:
        pixels.update(each.pixels)
    return pixels


def _pixels_of_colours(contents: Iterable[Contents]) -> Counter[Colour]:
    pixels: Counter[Colour] = Counter()
    for each in contents:
        for number, count in each.pixels.items():
            pixels[each.colours[number]] += count
    return pixels


def _text(colour: Colour) -> str:
    return ",".join(map(str, colour))


def _table(rows: Sequence[tuple[int, str]], total: int | None = None, most: int = 50) -> str:
    """Lines of shares and what has them."""
    total = total or sum(count for count, _ in rows)
    lines = [f"\n  {count / total:6.2%}  {text}" for count, text in rows[:most]]
    return "".join(lines) + (f"\n  and {len(rows) - most} more" if rows[most:] else "")


def _argument(lines: Sequence[str]) -> str:
    return f"--classes {shlex.join(lines)}"


def _others(contents: Sequence[Contents]) -> str:
    names = [each.path.name for each in contents[1:]]
    do = "does" if len(names) == 1 else "do"
    return f" (as {do} {counted(len(names), 'other')}: {listed(names)})" if names else ""


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, with commas."""
    return ", ".join(names[:most]) + (", ..." if names[most:] else "")
