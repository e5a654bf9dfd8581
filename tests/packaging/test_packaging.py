"""What is published: absolute links, what a source distribution holds, what needs which package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
URL = "https://forge.test/owner/name"


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, which sets nothing up when it is imported."""
    pytest.importorskip("pybind11")
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("setup_rules", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_relative_links_and_pictures_become_absolute(setup_module: ModuleType) -> None:
    text = "![a\nb](p/q.svg) [c](d.md#e), [f](#g), [h](https://i.j/k), `[l](m)n`[o]"
    assert setup_module.with_absolute_links(text, URL, "v1") == (
        f"![a\nb]({URL}/raw/v1/p/q.svg) [c]({URL}/blob/v1/d.md#e), [f](#g), [h](https://i.j/k), "
        f"`[l]({URL}/blob/v1/m)n`[o]"
    )


def test_no_address_is_made_up(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.delenv("LOWBIT_MUON_URL", raising=False)
    metadata = setup_module.index_metadata()
    assert (metadata["long_description"], metadata["project_urls"]) == (readme, {})
    monkeypatch.setenv("LOWBIT_MUON_URL", f"{URL}/")
    metadata = setup_module.index_metadata()
    assert f"]({URL}/raw/v" in metadata["long_description"]
    assert metadata["project_urls"]["Source"] == URL


def test_a_source_distribution_holds_its_tests(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.split("/", 1)[-1] for name in files.getnames()}
    folders = ("tests", "bench", "csrc", "lowbit_muon", ".ci", ".github")
    needed = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert needed | {"Makefile", "CONTRIBUTING.md", "CHANGELOG.md", "README.md"} <= packed
    assert not [name for name in packed if name.endswith((".pyc", ".so"))]


def run_without(packages: tuple[str, ...], program: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, in which some packages cannot be imported."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
        capture_output=True,
        timeout=300,
    )


def test_the_library_needs_torch_alone() -> None:
    program = (
        "import torch\nfrom lowbit_muon import MuonWithAuxAdam\n"
        "model = torch.nn.Linear(24, 16)\n"
        "optimizer = MuonWithAuxAdam(model, lr=1e-3, aux_adam='adamw')\n"
        "for _ in range(3):\n"
        "    model(torch.ones(2, 24)).square().mean().backward()\n"
        "    optimizer.step()\n"
        "optimizer.load_state_dict(optimizer.state_dict())\n"
        "print('stepped', optimizer.state_bytes() > 0)"
    )
    done = run_without(("numpy", "rich", "matplotlib", "bitsandbytes", "scipy"), program)
    assert (done.returncode, done.stdout) == (0, "stepped True\n"), done.stderr


def test_the_command_line_says_that_it_needs_rich() -> None:
    program = "from lowbit_muon.__main__ import main\nsys.exit(main())"
    done = run_without(("rich",), program)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "lowbit-muon: the command line needs rich: pip install 'lowbit-muon[cli]', or pip install "
        "rich\n"
    )


def test_ci_calls_the_makefile_and_publishes_tags_only() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    jobs = workflow["jobs"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [s["run"] for job in jobs.values() for s in job["steps"] if "run" in s]
    targets = [command.split()[1] for command in commands if command.startswith("make ")]
    assert {"lint", "test", "sdist"} <= set(targets)
    for target in targets:
        assert f"\n{target}: " in makefile
    assert len(jobs["test"]["strategy"]["matrix"]["python"]) == 3
    publish = jobs["publish"]
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert set(publish["needs"]) == set(jobs) - {"publish"}
    assert publish["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"}
