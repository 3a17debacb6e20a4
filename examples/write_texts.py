"""Writes texts that every installation has: Python's docstrings and reference, memplus's docs.

    python examples/write_texts.py texts

writes ``texts/python`` and ``texts/memplus``, one ``.txt`` file per document. A tenth of the
documents goes to ``texts/python-held-out`` and ``texts/memplus-held-out``, to score models on. The
name of a document decides, so it is held out by every version of the texts, or by none. A second
run replaces the texts of the first.
"""

import argparse
import ast
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parent.parent
# folders of the standard library without text about it
_LEFT_OUT = {"__pycache__", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
_HELD_OUT = 10
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    """Write all folders; print how many documents and characters they have."""
    parser = argparse.ArgumentParser(description="Write texts that every installation has.")
    parser.add_argument("folder", type=Path, help="the folder to write")
    folder = parser.parse_args().folder
    library = Path(sysconfig.get_paths()["stdlib"])
    reference = {f"topic.{name}": text for name, text in topics.items()}
    write(folder, "python", {**docstrings(library), **reference})
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    write(folder, "memplus", sections(pages))


def write(folder: Path, kind: str, documents: dict[str, str]) -> None:
    """Write each document into a file of its name, and hold out a tenth of them.

    Texts of an earlier run are deleted, or one could be in the other folder now. SystemExit: a
    folder has files that this script did not write.
    """
    held_out = {name: text for name, text in documents.items() if is_held_out(name)}
    trained = {name: text for name, text in documents.items() if name not in held_out}
    parts = {folder / kind: trained, folder / f"{kind}-held-out": held_out}
    for place in parts:
        place.mkdir(parents=True, exist_ok=True)
        if any(place.iterdir()) and not _mark(place).exists():
            raise SystemExit(f"{place}: has files that this script did not write; delete it")
    for place, part in parts.items():
        _mark(place).touch()
        for old in place.glob("*.txt"):
            old.unlink()
        for name, text in part.items():
            (place / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{place}: {len(part)} documents of {sum(map(len, part.values())):,} characters")


def _mark(place: Path) -> Path:
    """The empty file next to a folder that says that this script wrote the folder."""
    return place.parent / f".{place.name}-written"


def is_held_out(name: str) -> bool:
    """Whether a document is held out; a tenth of all names are."""
    return zlib.crc32(name.encode()) % _HELD_OUT == 0


def docstrings(library: Path) -> dict[str, str]:
    """A document for each module below ``library``: its docstrings, each after its full name."""
    found = {}
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if _LEFT_OUT & {*parts}:
            continue
        name = ".".join(parts).removesuffix(".__init__")
        module = ast.parse(file.read_bytes())
        if entries := [f"{place}\n\n{text}" for place, text in _entries(name, module)]:
            found[name] = "\n\n".join(entries) + "\n"
    return found


def sections(pages: list[Path]) -> dict[str, str]:
    """A document for each section of the pages; one of a page's beginning."""
    found = {}
    for page in pages:
        parts = re.split(r"^(?=## )", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        found |= {f"{page.stem}-{number:02}": part for number, part in enumerate(parts)}
    return found


def _entries(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """The full name and the docstring of an object, then those of the objects in it."""
    if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
        yield name, text
    for child in ast.iter_child_nodes(node):
        is_named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _entries(f"{name}.{child.name}" if is_named else name, child)


if __name__ == "__main__":
    main()
