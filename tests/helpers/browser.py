"""``python tests/helpers/browser.py``: have a Chromium for the browser tests; ``make test`` runs it before they start.

Found where playwright or the system keeps one, or installed: by playwright, else by apt, once and before any test, so
that neither a test's time nor two processes of the tests depend on it. Without one the browser tests are skipped.
"""

import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
INSTALL = (["playwright", "install", "chromium"], ["apt-get", "install", "-y", "-qq", "chromium"])


def find() -> str | None:
    """Path of a Chromium; None without one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else next(filter(None, map(shutil.which, NAMES)), None)


def main() -> None:
    if os.environ.get("PPOW_INSTALL_BROWSER") == "0":
        return
    for command in INSTALL:
        if find():
            return
        print(f"no Chromium for the browser tests yet: {' '.join(command)}", flush=True)
        if shutil.which(command[0]):
            if command[0] == "apt-get":
                subprocess.run(["apt-get", "update", "-qq"])
            subprocess.run(command)
    if not find():
        print("no Chromium: the browser tests will be skipped. Install one, as `chromium` or with playwright.")


if __name__ == "__main__":
    main()
