"""What bench.versions and bench.mutants make of pytest's reports; neither is run here."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import mutants, versions

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_good"/>
<testcase classname="tests.a" name="test_skipped"><skipped message="no GPU"/></testcase>
<testcase classname="tests.a" name="test_bad"><failure message="wrong: 1&#10;more"/></testcase>
<testcase classname="tests.a" name="test_setup"><error message="no fixture"/></testcase>
<testcase classname="tests.t" name="test_resources[gram-3-sm_80]">
<properties><property name="spills" value="22"/></properties><failure message="assert 22 == 0"/>
</testcase>
<testcase classname="tests.t" name="test_resources[gram-4-sm_80]">
<properties><property name="spills" value="0"/></properties></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted() -> None:
    row = versions.Row("2.9.1", "3.6.0", ["tests"])
    versions.read_report(row, ElementTree.fromstring(REPORT))
    assert (row.passed, row.failed, row.skipped) == (2, 3, 1)
    assert row.failures["tests.a::test_bad"] == "wrong: 1"
    assert row.spills == {"gram-3-sm_80": 22}
    assert "2 passed, 3 failed, 1 skipped" in versions.shown(row)


def test_pairs_are_parsed() -> None:
    assert versions.parse_pairs(",".join(versions.PAIRS)) == list(versions.PAIRS)
    with pytest.raises(SystemExit, match=r"--pairs: expected TORCH:TRITON,.. got '2.9.1'"):
        versions.parse_pairs("2.9.1")


def test_the_tests_are_there() -> None:
    for path in (*versions.TESTS, *versions.NOT_RUN):
        assert (versions.ROOT / path).exists(), path
    for fault in mutants.FAULTS:
        assert fault.old != fault.new
        for path in fault.tests:
            assert (mutants.ROOT / path).exists(), path


def test_a_fault_is_made_found_and_undone(tmp_path: Path) -> None:
    package, tests = tmp_path / "lowbit_muon", tmp_path / "tests"
    package.mkdir()
    tests.mkdir()
    source = package / "sum.py"
    source.write_text("def add(a, b):\n    return a + b  # exact\n")
    (tests / "test_sum.py").write_text(
        "from lowbit_muon.sum import add\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    )
    for old, new, status in (
        ("a + b", "a - b", "killed"),
        ("# exact", "# about", "survived"),
        ("a * b", "a / b", "gone"),
    ):
        found = mutants.tried(mutants.Fault("sum.py", old, new, ("tests/test_sum.py",)), tmp_path)
        assert found.status == status
        assert found.killed_by == ("tests/test_sum.py::test_add" if status == "killed" else None)
    assert "a + b  # exact" in source.read_text()
