"""README, guides and the reference pages: the code and links in them, and how the pages are made.

    python tests/documentation.py FOLDER      writes the reference, with the guides, as HTML

`tests/test_readme.py` and `tests/test_docs.py` use the rest.
"""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "lowbit_muon" / "guides").glob("*.md"))
# What users import from; everything else is described in CONTRIBUTING.md.
MODULES = (
    "lowbit_muon",
    "lowbit_muon.state.coded_products",
    "lowbit_muon.linalg.newton_schulz",
    "lowbit_muon.guides",
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


def build_reference(folder: Path) -> None:
    """Write the pages. A warning of pdoc's is an error.

    The guides are one page: their links to each other become links within it.
    """
    from pdoc import doc, render

    render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modules = {name: doc.Module.from_name(name) for name in MODULES}
        # By its __all__ the package has none, and no page would lead to theirs.
        modules["lowbit_muon"].__dict__["submodules"] = list(modules.values())[1:]
        pages = {
            f"{name.replace('.', '/')}.html": render.html_module(module, modules)
            for name, module in modules.items()
        }
        pages |= {"index.html": render.html_index(modules)}
        pages |= {"search.js": render.search_index(modules)}
    for guide in GUIDES:
        name = "lowbit_muon/guides.html"
        pages[name] = pages[name].replace(f'href="{guide.name}"', f'href="#{guide.stem}"')
    for name, page in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    build_reference(Path(sys.argv[1]))
    print(f"written to {Path(sys.argv[1]) / 'index.html'}")
