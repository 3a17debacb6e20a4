"""Takes the screenshots of the web page in docs/images."""

from pathlib import Path

from playwright.sync_api import Browser, expect

from tests.chromium import chromium
from tests.server.running import running

FOLDER = Path(__file__).parent.parent / "docs" / "images"
MAX_BYTES = 200_000
# name, width, height, colour scheme
SHOTS = (
    ("page-light", 1100, 790, "light"),
    ("page-dark", 1100, 790, "dark"),
    ("page-phone", 390, 844, "light"),
)


def main() -> None:
    """Serve the default model, ask for a definition, and save what the page shows."""
    with running(Path("wordnet")) as server, chromium() as browser:
        for name, width, height, scheme in SHOTS:
            take(browser, server.url, FOLDER / f"{name}.png", width, height, scheme)


def take(browser: Browser, url: str, path: Path, width: int, height: int, scheme: str) -> None:
    """Save one picture as PNG."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto(url)
    expect(page.locator("#load")).to_have_text("ready")
    settings = page.get_by_text("Sampling")
    if width < 900:
        settings.click()
    page.fill("#temperature", "0")
    page.fill("#input", "volcano (noun):")
    page.click("#send")
    expect(page.locator("#end")).to_have_text("end of text")
    expect(page.locator("#token-number")).to_contain_text("of")
    page.get_by_text(" earth", exact=False).first.hover()
    page.mouse.move(0, 0)
    if width < 900:
        settings.click()
        page.evaluate("() => document.getElementById('memory').scrollIntoView()")
    page.screenshot(path=path)
    page.close()
    assert path.stat().st_size < MAX_BYTES, f"{path} is too large"


if __name__ == "__main__":
    main()
