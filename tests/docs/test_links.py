"""Links of pages in the repository: files and headings exist, addresses are well formed."""

import re
from urllib.parse import urlsplit

import pytest

from tests.docs.pages import DOCS, PAGES, page_name

LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
CODE = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def links(text: str) -> list[str]:
    """The targets of the links of a page, outside code."""
    # a line break inside a link's text, or code in it, must not hide the link
    prose = CODE.sub(lambda found: "`" if found[0].startswith("`") else "", text)
    return [one or other for one, other in LINK.findall(prose)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in HEADING.findall(re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        place, number = slug, 0
        while place in found:
            number += 1
            place = f"{slug}-{number}"
        found.add(place)
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_headings_or_addresses(page):
    found = links(page.read_text())
    for link in found:
        parts = urlsplit(link)
        if parts.scheme:
            # nobody is asked: tests need no network
            assert parts.scheme == "https" and "." in parts.netloc and " " not in link, link
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        assert target.is_file(), f"{link}: no such file"
        if parts.fragment:
            assert parts.fragment in anchors(target.read_text()), f"{link}: no such heading"
    assert found or page.is_relative_to(DOCS / "api") or page.name == "structure.md"


def test_links_and_anchors_are_found():
    text = (
        '# A `b` c, d\n# A b c d\n[x](y.md#z)\n```\n[no](a)\n# no\n```\n`[no](b)` <img src="p.png">'
    )
    assert links(text) == ["y.md#z", "p.png"]
    assert anchors(text) == {"a-b-c-d", "a-b-c-d-1"}
