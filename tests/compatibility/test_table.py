"""The page of what mixora works with is the one that the tests make."""

import re
from pathlib import Path

import pytest

from tests.compatibility import table
from tests.compatibility.table import PAGE, Line, lines_of_page

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_page_has_a_line_for_each_mark_and_no_other(tmp_path):
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [str(path) for path in files if re.search(r"works_with\(|@each\(", path.read_text(encoding="utf-8"))]
    # in this process, which has imported most of them already; faults of this session are not the inner one's to watch
    apart = ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    words = ["--collect-only", "-qq", "-m", "works_with", "--works-with", str(tmp_path / "page.md")]
    found = pytest.main([*apart, *words, *marked], plugins=[table])
    assert found == pytest.ExitCode.OK
    expected = lines_of_page((tmp_path / "page.md").read_text(encoding="utf-8"))
    assert len(expected) > 50
    assert lines_of_page(PAGE.read_text(encoding="utf-8")) == expected, "stale; `make works-with` writes it"


def test_nothing_on_the_page_fails_or_was_left_out():
    assert "**fails**" not in PAGE.read_text(encoding="utf-8")
    assert "not run" not in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("outcomes", "told"),
    [
        ([], "not run"),
        (["passed", "passed"], "passes"),
        (["passed", "failed"], "**fails**"),
        (["skipped"], "skipped"),
        (["passed", "skipped"], "passes, in part skipped"),
    ],
)
def test_a_line_tells_the_worst_of_its_tests(outcomes, told):
    assert Line(outcomes=outcomes).outcome() == told
