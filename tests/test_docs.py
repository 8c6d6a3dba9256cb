"""docs/ tells the truth: the tests that it names exist, every failure has its row, links lead somewhere."""

import ast
import functools
import re

import pytest
from processes import ROOT

FAILURES = (ROOT / "docs/failures.md").read_text(encoding="utf-8")
LAST = {"A": 20, "B": 24, "C": 16, "D": 30}     # workers, nodes and network, server, clients
IDS = [f"{kind}{number}" for kind, last in LAST.items() for number in range(1, last + 1)]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")]
        for line in FAILURES.splitlines() if re.match(r"\| [A-Z]\d", line)]
TEST = re.compile(r"`(test_\w+\.py)::([\w:]+)`")
PAGES = [path for path in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "SECURITY.md")
         if path.exists()]


@functools.cache
def defined_in(file):
    """Return the tests that a file defines, as `Class::name` or `name`."""
    found = set()
    for node in ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + test.name for test in inside if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


class TestFailures:
    def test_every_one_has_its_row_and_no_other(self):
        assert [row[0] for row in ROWS] == IDS

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
    def test_a_row_is_filled_in_and_shown_by_a_test_or_says_why_not(self, row):
        assert len(row) == 5 and all(row)
        assert TEST.search(row[4]) or re.match(r"(not tested|left out): \w", row[4])

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
    def test_every_test_that_it_names_exists(self, row):
        for file, test in TEST.findall(row[4]):
            assert test in defined_in(file), f"{file} has no {test}"
        assert len(TEST.findall(row[4])) == row[4].count("`test_"), "a test is not named as file.py::name"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"\w+:", target):
            path, _, heading = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name}: {target}"
            assert not heading or heading in headings(there), f"{page.name}: {target}"


def headings(path):
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
