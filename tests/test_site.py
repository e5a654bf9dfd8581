"""The site of `make docs`: it shows everything that is public, and works on a phone."""

from __future__ import annotations

import html
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import browser
import documentation
import pytest
from documentation import GUIDES, MODULES, README, RESULTS, ROOT, SITE_FILES

import lowbit_muon

PAGES = [path for path in SITE_FILES if path.suffix == ".md"]
ids = [path.relative_to(ROOT).with_suffix("").as_posix() for path in PAGES]
needs_chromium = pytest.mark.skipif(
    browser.find_chromium() is None, reason=f"none of {', '.join(browser.PROGRAMS)} is installed"
)


def public_members(module: ModuleType) -> dict[str, Any]:
    """What a page shows: __all__, or what the module defines and does not hide."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return {name: getattr(module, name) for name in names}


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_described(name: str) -> None:
    module = importlib.import_module(name)
    assert inspect.getdoc(module)
    for member, value in public_members(module).items():
        if inspect.isroutine(value):
            assert inspect.getdoc(value), f"{name}.{member}"
        elif inspect.isclass(value):
            assert value.__doc__, f"{name}.{member}"
            assert not value.__doc__.startswith(f"{member}("), f"{name}.{member}: a dataclass's own"
            for method, found in vars(value).items():
                if not method.startswith("_") and inspect.isroutine(found):
                    assert inspect.getdoc(getattr(value, method)), f"{name}.{member}.{method}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("sphinx", "furo", "myst_parser"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # In a process of its own: Sphinx changes loggers, locales and docutils for good.
    command = [sys.executable, documentation.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def article(page: Path) -> str:
    """What the page itself says, without the frame that all pages share."""
    found = re.search(r"<article.*?</article>", read(page), flags=re.DOTALL)
    assert found, page
    return found[0]


def as_text(code: str) -> str:
    """HTML without tags and without code."""
    without_code = re.sub(r"<(pre|code|dt)\b.*?</\1>", "", code, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", without_code))


def site_page(site: Path, path: Path) -> Path:
    """The page that a Markdown file of the repository became."""
    return (site / path.relative_to(ROOT)).with_suffix(".html")


@pytest.mark.parametrize("name", MODULES)
def test_the_reference_shows_everything_public(name: str, site: Path) -> None:
    page = article(site / "reference" / f"{name}.html")
    module = importlib.import_module(name)
    for member, value in public_members(module).items():
        assert f'id="{name}.{member}"' in page, f"{name}.{member}"
        for method, found in vars(value).items() if inspect.isclass(value) else ():
            # (torch puts a hooked `step` into every class of which there has been an instance)
            inherited = getattr(found, "hooked", False) and value.__name__ != "Muon"
            if not method.startswith("_") and inspect.isroutine(found) and not inherited:
                assert f'id="{name}.{member}.{method}"' in page, f"{name}.{member}.{method}"
    # Indented code whose paragraph did not end in "::".
    assert "<blockquote" not in page


@pytest.mark.parametrize("name", ["Muon", "StateFormat", "HeadRows", "orthogonalize"])
def test_arguments_in_docstrings_are_lists(name: str, site: Path) -> None:
    page = article(site / "reference" / "lowbit_muon.html")
    entry = page.split(f'id="lowbit_muon.{name}"')[1].split('id="lowbit_muon.')[0]
    # Two arguments may share a line.
    listed = re.findall(r"<li><p><strong>([\w, ]+)</strong>", entry)
    arguments = set(inspect.signature(getattr(lowbit_muon, name)).parameters)
    assert arguments <= set(", ".join(listed).split(", "))


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_a_page_has_what_its_file_has(path: Path, site: Path) -> None:
    source, page = read(path), article(site_page(site, path))
    title = source.splitlines()[0].removeprefix("# ")
    assert re.search(rf"<h1>{re.escape(html.escape(title, quote=False))}<a", page)
    assert page.count("<table") == len(re.findall(r"^\|[-|: ]+\|$", source, flags=re.MULTILINE))
    blocks = re.findall(r"^```.*?^```$", source, flags=re.DOTALL | re.MULTILINE)
    assert page.count('<div class="highlight"') >= len(blocks)
    assert page.count("<img") == len(re.findall(r"^!\[", source, flags=re.MULTILINE))


def test_no_markup_is_left(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r"`|\]\(|\{toctree|:\w+:`", as_text(article(page))), page


def test_the_front_page_leads_to_all_others(site: Path) -> None:
    front = read(site / "index.html")
    assert front == read(site_page(site, README))
    for path in [*GUIDES, RESULTS / "README.md"]:
        assert f'href="{site_page(site, path).relative_to(site)}"' in front
    for name in MODULES:
        assert f'href="reference/{name}.html"' in front


def test_links_lead_somewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        targets = re.findall(r'(?:href|src)="([^"]*)"', read(page))
        for target in map(urlsplit, map(html.unescape, targets)):
            if target.scheme or target.netloc:
                continue
            file = page.parent / unquote(target.path) if target.path else page
            assert file.is_file(), (page, target)
            if target.fragment:
                assert f'id="{unquote(target.fragment)}"' in read(file), (page, target)


@needs_chromium
def test_pages_are_whole_and_fit_a_phone(site: Path, tmp_path: Path) -> None:
    found = browser.faults(browser.find_chromium(), site, tmp_path)
    assert len(found) > len(PAGES) + len(MODULES)
    assert not any(found.values()), {page: faults for page, faults in found.items() if faults}


@needs_chromium
def test_faults_of_a_page_are_found(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    viewport = '<meta name="viewport" content="width=device-width">'
    faults = {
        "desk": ("", "a phone would show it as on a desk"),
        "link": (f'{viewport}<a href="none.html">x</a>', "link leads nowhere: /none.html"),
        "place": (f'{viewport}<a href="link.html#x">x</a>', "link leads nowhere: /link.html#x"),
        "picture": (f'{viewport}<img src="none.svg">', "no picture: "),
        "foreign": (f'{viewport}<img src="http://127.0.0.1:9/x.svg">', "loaded from elsewhere: "),
        "wide": (f'{viewport}<div style="width: 391px">x</div>', "scrolls sideways: "),
        "cut": (
            f'{viewport}<div style="overflow: hidden"><p style="width: 391px">x</p></div>',
            "cut off: <p",
        ),
    }
    for name, (body, _) in faults.items():
        code = f"<!doctype html><article>{body}</article>"
        (site / f"{name}.html").write_text(code, encoding="utf-8")
    scrolling = '<div style="overflow-x: auto"><p style="width: 391px">x</p></div>'
    (site / "good.html").write_text(f"<!doctype html><article>{viewport}{scrolling}</article>")
    found = browser.faults(browser.find_chromium(), site, tmp_path / "profile")
    assert found.pop("good.html") == []
    for name, (_, message) in faults.items():
        assert any(fault.startswith(message) for fault in found[f"{name}.html"]), found
