"""A hook of MkDocs: files of the repository that pages link to become part of the site.

On the repository's own view a link such as ``../benchmarks/facts/results/results.csv`` works as it
is. The site has only ``docs/``, so the hook adds each linked file below ``files/`` and rewrites the
links. A Markdown file becomes a page, whose links are treated in the same way.
"""

import os
import re
from pathlib import Path
from urllib.parse import urldefrag

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).resolve().parent.parent
_DOCS = _ROOT / "docs"
_ADDED = "files"
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the linked files, and those that they link to."""
    ahead = [_ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    while ahead:
        page = ahead.pop()
        for link in _LINK.findall(page.read_text()):
            target = _target(page, link)
            if not target.is_file() or target.is_relative_to(_DOCS):
                continue  # MkDocs names a link that leads nowhere
            place = f"{_ADDED}/{target.relative_to(_ROOT)}"
            if files.get_file_from_path(place) is not None:
                continue
            options = {"abs_src_path": str(target), "inclusion": InclusionLevel.NOT_IN_NAV}
            files.append(File.generated(config, place, **options))
            if target.suffix == ".md":
                ahead.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page lead to the places that its targets have on the site."""
    here = Path(page.file.src_uri)
    is_added = here.parts[0] == _ADDED
    source = _ROOT / (here.relative_to(_ADDED) if is_added else "docs" / here)

    def moved(found: re.Match[str]) -> str:
        target = _target(source, found[1])
        if not target.is_file():
            return found[1]
        is_page = target.is_relative_to(_DOCS)
        place = target.relative_to(_DOCS) if is_page else _ADDED / target.relative_to(_ROOT)
        anchor = urldefrag(found[1]).fragment
        link = os.path.relpath(place, here.parent)
        return f"{link}#{anchor}" if anchor else link

    return _LINK.sub(moved, markdown)


def _target(page: Path, link: str) -> Path:
    return Path(os.path.normpath(page.parent / urldefrag(link).url))
