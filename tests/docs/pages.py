"""The Markdown pages of the repository: their paths, and the code blocks that are marked."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# pages that the repository shows and that the site has too, or README.md
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
# a comment on the line before a block, which no reader sees
_MARK = re.compile(r"<!-- (runnable|output) -->")
_FENCE = re.compile(r"```(\w*)")
_INDENT = "    "


class Block(NamedTuple):
    """A marked block.

    Attributes:
        kind: ``runnable``, or ``output``: what the block before it prints; ``...`` is any text.
        language: that of the fence; an indented block is ``bash``.
        text: its lines, without indentation.
        line: number of its first line in the page, counted from 1.
    """

    kind: str
    language: str
    text: str
    line: int


def page_name(page: Path) -> str:
    """The path of a page in the repository."""
    return str(page.relative_to(ROOT))


def marked_blocks(text: str) -> list[Block]:
    """The marked blocks of a page, in order.

    Raises:
        ValueError: a mark is not followed by a block.
    """
    lines, blocks = text.splitlines(), []
    for number, line in enumerate(lines):
        if not (mark := _MARK.fullmatch(line)):
            continue
        start = number + 1
        while start < len(lines) and not lines[start]:
            start += 1
        rest = lines[start:]
        if rest and (fence := _FENCE.fullmatch(rest[0])) and "```" in rest[1:]:
            found, language, first = rest[1 : rest.index("```", 1)], fence[1], start + 2
        elif rest and rest[0].startswith(_INDENT):
            found, language, first = _indented(rest), "bash", start + 1
        else:
            raise ValueError(f"line {number + 1}: no block follows {line}")
        blocks.append(Block(mark[1], language, "\n".join(found) + "\n", first))
    return blocks


def _indented(lines: list[str]) -> list[str]:
    found = []
    for line in lines:
        if line and not line.startswith(_INDENT):
            break
        found.append(line.removeprefix(_INDENT))
    return found
