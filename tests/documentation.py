"""README, guides and the site: the code and links in them, and how the site is made of them.

    python tests/documentation.py FOLDER      writes the site: these, measurements and reference

`tests/test_readme.py`, `tests/test_docs.py` and `tests/test_site.py` use the rest.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "lowbit_muon" / "guides").glob("*.md"))
# What users import from; everything else is described in CONTRIBUTING.md.
MODULES = (
    "lowbit_muon",
    "lowbit_muon.state.coded_products",
    "lowbit_muon.linalg.newton_schulz",
)
SITE = ROOT / "tests" / "docs_site"  # settings, contents and the pages of the reference
RESULTS = ROOT / "bench" / "results"
SITE_FILES = (
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *GUIDES,
    RESULTS / "README.md",
    *sorted(RESULTS.rglob("*.svg")),
)
_HIDDEN = re.compile(r"```.*?```|`[^`\n]*`", flags=re.DOTALL)  # nothing in code is a link


def code_blocks(path: Path, language: str = "") -> list[str]:
    """The fenced blocks of a language, or those that name none."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def run_python(path: Path) -> dict[str, object]:
    """Run the Python blocks of a file, one after the other; returns the names they leave."""
    names: dict[str, object] = {}
    for number, block in enumerate(code_blocks(path, "python"), start=1):
        exec(compile(block, f"{path.name}, block {number}", "exec"), names)
    return names


def commands(path: Path, program: str = "lowbit-muon") -> list[list[str]]:
    """Arguments of each call of the program, in blocks without a language and in code in a line."""
    text = path.read_text(encoding="utf-8")
    lines = [line for block in code_blocks(path) for line in block.splitlines()]
    lines += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    calls = [shlex.split(line, comments=True) for line in lines if line.startswith(program + " ")]
    return [call[1:] for call in calls]


def relative_links(path: Path) -> list[str]:
    """Targets of links and pictures that are no web addresses."""
    text = _HIDDEN.sub("", path.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in found if not re.match(r"\w+://", target)]


def named_tests(path: Path) -> set[tuple[str, str]]:
    """(file, function) of every test that is named as in `tests/test_x.py::test_y`."""
    text = path.read_text(encoding="utf-8")
    return set(re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", text))


def write_sources(folder: Path) -> None:
    """What Sphinx reads: the pages where the repository has them, so that links work in both."""
    for path in SITE_FILES:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copytree(SITE / "reference", folder / "reference")
    # The site's contents: a forge would show their directives in README.
    with (folder / README.name).open("a", encoding="utf-8") as front_page:
        front_page.write((SITE / "contents.md").read_text(encoding="utf-8"))


def build_site(folder: Path) -> int:
    """Write the site; returns the exit status. A warning of Sphinx's is an error."""
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory() as scratch:
        sources = Path(scratch, "sources")
        write_sources(sources)
        options = ["--quiet", "--fail-on-warning", "--keep-going"]
        options += ["--conf-dir", str(SITE), "--doctree-dir", f"{scratch}/doctrees"]
        status = build_main([*options, str(sources), str(folder)])
    if status == 0:
        shutil.copy(folder / "README.html", folder / "index.html")
    return status


if __name__ == "__main__":
    site = Path(sys.argv[1])
    status = build_site(site)
    print(f"written to {site / 'index.html'}" if status == 0 else f"not complete: {site}")
    sys.exit(status)
