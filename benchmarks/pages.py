"""Tables of the pages that a command writes: what stands between ``<!-- name -->`` and ``<!-- end of name -->``."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
ACCURACY, SPEED = DOCS / "accuracy.md", DOCS / "speed.md"


def show(pictures: Iterable[Path]) -> None:
    """Put pictures where the pages show them."""
    (DOCS / "images").mkdir(exist_ok=True)
    for picture in pictures:
        shutil.copy(picture, DOCS / "images" / picture.name)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines) + "\n"


def rows(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table, row by row, without its head."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def section(page: Path, name: str) -> str:
    """Return what the page holds under a name."""
    return page.read_text().split(f"<!-- {name} -->\n", 1)[1].split(f"<!-- end of {name} -->", 1)[0]


def write(page: Path, name: str, text: str) -> None:
    """Put a text under a name, in the place of what was there."""
    old = section(page, name)
    page.write_text(page.read_text().replace(f"<!-- {name} -->\n{old}", f"<!-- {name} -->\n{text.rstrip()}\n"))
