"""Writes the table of released weights into docs/weights.md.

python -m scripts.weights_table
"""

import pathlib
import re

from resfu_jax.convert.catalogue import RELEASES

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "weights.md"
_HEAD = "| name | backbone | channels | image | licence | MB | file | |"
_TABLE = re.compile(rf"^{re.escape(_HEAD)}\n(\|.*\n)+", re.M)


def page() -> str:
    """The page with the table of today's catalogue."""
    lines = [_HEAD, "|" + "---|" * 8]
    for name, release in RELEASES.items():
        facts = release.facts()
        file = f"[{release.url.rpartition('/')[2]}]({release.url})"
        cells = [facts[k] for k in ("backbone", "channels", "image", "licence", "MB")]
        lines.append(f"| {' | '.join([f'`{name}`', *cells, file, release.note])} |")
    return _TABLE.sub(lambda _: "\n".join(lines) + "\n", PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
