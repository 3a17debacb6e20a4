"""Starts Debian's Chromium for tests of the web page and for its screenshots."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, sync_playwright


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium; AssertionError with the command that installs it if it is missing."""
    path = shutil.which("chromium")
    assert path, "the web page needs Chromium: apt-get install --no-install-recommends chromium"
    # Chromium's sandbox does not run as root
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        try:
            yield browser
        finally:
            browser.close()
