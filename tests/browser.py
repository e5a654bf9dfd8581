"""A site as a browser shows it on a phone: headless Chromium, where one is installed.

All pages are loaded into frames of a phone's width within one page, over HTTP from this process.
The script of that page looks at them once all have loaded, and leaves what it found as its text.
"""

from __future__ import annotations

import functools
import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE_WIDTH = 390  # CSS pixels, of most phones since 2020
PROBE = "probe.html"
_SCRIPT = (Path(__file__).parent / "docs_site" / "probe.js").read_text(encoding="utf-8")


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the folder's files can be loaded."""
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def faults(chromium: str, site: Path, profile: Path) -> dict[str, list[str]]:
    """What is wrong with each page of a site; all pages are there, most with an empty list.

    profile: an empty folder for the browser's own files.
    """
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    frames = "".join(
        f'<iframe src="{page}" width="{PHONE_WIDTH}" height="844"></iframe>' for page in pages
    )
    paths = [f"/{path.relative_to(site).as_posix()}" for path in site.rglob("*")]
    script = f"const files = new Set({json.dumps(paths)});\n{_SCRIPT}"
    probe = site / PROBE
    probe.write_text(f"<!doctype html><body>{frames}<script>{script}</script>", encoding="utf-8")
    try:
        with served(site) as address:
            command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
            # Tests may run where /dev/shm is small, as in containers.
            command += ["--disable-dev-shm-usage", f"--user-data-dir={profile}"]
            done = subprocess.run(
                [*command, f"{address}/{PROBE}"], capture_output=True, text=True, timeout=120
            )
    finally:
        probe.unlink()
    found = re.search(r"<pre>(.*)</pre>", done.stdout, flags=re.DOTALL)
    assert found, f"{chromium} printed no findings: {done.stderr[-2000:]}"
    return json.loads(html.unescape(found[1]))
