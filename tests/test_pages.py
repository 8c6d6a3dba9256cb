"""The pages of docs/ tell the truth: their programs run and print what they show, their commands and names exist."""

import asyncio
import builtins
import concurrent.futures
import inspect
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from processes import ROOT, free_port
from test_docs import TEST, defined_in
from test_readme import FENCE, first_words, program_help, what_it_shows

import minipool
import minipool_worker

DOCS = ROOT / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8")
         for name in ("first-ten-minutes", "coming-from", "how-it-works", "guarantees", "tuning", "deploy")}
PROGRAMS = [pytest.param(code, shown, id=f"{page}: {first_words(code)}") for page, text in PAGES.items()
            for language, code, shown in FENCE.findall(text) if language == "python"]
RECIPES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")}
COMMANDS = re.compile(r"(?:^|[ /])(minipool\.py|minipool_worker\.py|minipool-worker|minipool|\S+/\S+\.(?:py|sh)|sbatch)"
                      r"((?: +[^|#&;)]+)?)")
COMING_FROM = [[cell.strip() for cell in row[1:-1].split(" | ")] for row in PAGES["coming-from"].splitlines()
               if row.startswith("| `")]
SOURCES = (ROOT / "minipool.py").read_text() + (ROOT / "minipool_worker.py").read_text()


def shell_lines(text):
    """Return what a person types in the console and sh blocks of a page."""
    lines = []
    for language, code in re.findall(r"^```(console|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines += [line.removeprefix("$ ") for line in code.splitlines() if language == "sh" or line.startswith("$ ")]
    return lines


class TestPrograms:
    @pytest.mark.parametrize("code, shown", PROGRAMS)
    def test_a_program_prints_what_the_page_shows(self, code, shown, tmp_path):
        (tmp_path / "program.py").write_text(code)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MINIPOOL_SECRET")}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "XDG_CONFIG_HOME": str(tmp_path),
                        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
        done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True,
                              text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert done.stdout == what_it_shows(code, shown)
        assert what_it_shows(code, shown), "a program of the page shows nothing"


@pytest.fixture(scope="module")
def flags():
    """{command: its flags}, of both programs."""
    known = {"connect": program_help("minipool_worker.py", "connect")}
    known |= {name: program_help("minipool.py", name) for name in ("serve", "status", "versions", "secret")}
    return {name: set(re.findall(r"--[a-z][a-z-]*", text)) for name, text in known.items()}


class TestCommands:
    @pytest.mark.parametrize("page", PAGES)
    def test_in_blocks_are_ours_with_their_flags(self, page, flags):
        for line in shell_lines(PAGES[page]):
            for program, rest in COMMANDS.findall(line):
                words = rest.split()
                if program in ("minipool.py", "minipool_worker.py", "minipool-worker") or words[:1] == ["connect"]:
                    assert words and words[0] in flags, line
                    assert {word for word in words if word.startswith("--")} <= flags[words[0]], line
                elif program.startswith(("examples/", "benchmarks/")):
                    assert (ROOT / program).is_file(), line

    @pytest.mark.parametrize("page", PAGES)
    def test_in_the_prose_have_flags_that_there_are(self, page, flags):
        prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
        known = set().union(*flags.values())
        for command, named in re.findall(r"`(serve|connect|status|minipool-worker)((?: --[a-z-]+)+)", prose):
            assert set(named.split()) <= flags.get(command, known), (command, named)


class TestNames:
    @pytest.mark.parametrize("page", PAGES)
    def test_every_test_that_a_page_names_exists(self, page):
        named = TEST.findall(PAGES[page])
        assert named or page != "guarantees"
        for file, test in named:
            assert test in defined_in(file), f"{file} has no {test}"

    @pytest.mark.parametrize("page", PAGES)
    def test_a_page_is_short(self, page):
        lines = PAGES[page].splitlines()
        assert len(lines) < 200
        assert all(len(line) <= 120 or line.startswith("|") for line in lines)

    def test_threads_are_called_as_how_it_works_says(self):
        names = re.findall(r"`(minipool-[a-z-]+)`", PAGES["how-it-works"])
        there = [re.sub(r"\{.*?\}", lambda part: r"\d+" if "fileno" in part[0] else "[a-z]+", text)
                 for text in re.findall(r'name=f?"(minipool-[^"]+)"', SOURCES)]
        assert len(names) > 5
        for name in names:
            assert any(re.fullmatch(pattern, name) for pattern in there), name

    def test_constants_have_the_values_that_the_pages_give(self):
        for page in PAGES.values():
            for name, value in re.findall(r"\(`([A-Z_]+)` = ([\d_]+)\)", page):
                assert getattr(minipool, name) == float(value), name


def exists(name):
    """Whether a name is one of minipool's, of a class of it, of the standard library or of a recipe."""
    spaces = (minipool, minipool_worker, minipool.Executor, minipool.Future, minipool.Server, minipool_worker.Node,
              minipool.Actor, minipool.Pool,
              minipool.WorkerDied, concurrent.futures, concurrent.futures.Future,
              asyncio.AbstractEventLoop, builtins)
    return (any(hasattr(space, name) for space in spaces) or name in minipool._OPTIONS
            or any(name in inspect.signature(call).parameters for call in (
                minipool.Executor, minipool.Executor.map, minipool.Executor.shutdown, minipool.gather,
                concurrent.futures.wait, minipool_worker.find_slots))
            or any(re.search(rf"^ *(?:async )?(?:def|class) {name}\b|\b{name}: ", text, re.MULTILINE)
                   for text in RECIPES.values()))


class TestComingFrom:
    def test_each_system_has_its_rows(self):
        assert len(COMING_FROM) >= 80
        assert all(len(row) == 3 for row in COMING_FROM)

    @pytest.mark.parametrize("row", COMING_FROM, ids=lambda row: row[0])
    def test_what_a_row_offers_exists(self, row):
        ours = [code for code in re.findall(r"`([^`]+)`", row[1]) if not code.startswith(("dask.", "minipool"))]
        for name in re.findall(r"\b([A-Za-z_]\w*)(?=\(|=)", " ".join(ours)) + re.findall(r"\.([a-z_]+)", str(ours)):
            assert exists(name), f"{row[0]}: {name}"

    @pytest.mark.parametrize("row", [row for row in COMING_FROM if row[1].startswith("not there")],
                             ids=lambda row: row[0])
    def test_what_is_not_there_is_not_there(self, row):
        for name in re.findall(r"`(\w+)[^`]*`", row[2].partition(";")[0] if "planned: " in row[2] else ""):
            there = hasattr(minipool, name) or hasattr(minipool.Executor, name) or name in minipool._OPTIONS
            assert not there, f"{row[0]}: {name} is there by now"


class TestApi:
    def test_the_reference_is_up_to_date(self):
        done = subprocess.run([sys.executable, DOCS / "make_api.py", "--check"], timeout=60)
        assert done.returncode == 0, "run python docs/make_api.py"

    def test_every_public_name_and_method_is_in_it(self):
        page = (DOCS / "api.md").read_text(encoding="utf-8")
        for name in (*minipool.__all__, *minipool_worker.__all__):
            assert re.search(rf"^### `{name}(\(\))?`", page, re.MULTILINE), name
        for name in ("submit", "map", "shutdown", "options", "on_start", "run", "kill", "info", "size"):
            assert f"#### `Executor.{name}" in page

    def test_it_says_nothing_of_the_machine_that_made_it(self):
        page = (DOCS / "api.md").read_text(encoding="utf-8")
        assert not re.search(r"environ\(|/home/|/root|object at 0x", page)


class TestTerminal:
    @pytest.mark.slow
    def test_the_commands_print_what_the_picture_shows(self, tmp_path):
        def texts(path):
            lines = [re.sub(r":\d{4,5}| --(port|address) \S+", "", "".join(text.itertext()))
                     for text in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
            return sorted(re.sub(r"Python 3\.\d+|\d+ (ready|delivered|finished)", "#", line) for line in lines)
        done = subprocess.run([sys.executable, DOCS / "make_terminal.py", tmp_path / "new.svg", str(free_port())],
                              capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert texts(tmp_path / "new.svg") == texts(DOCS / "terminal.svg")

    def test_the_picture_names_no_machine_and_is_made_of_text(self):
        picture = (DOCS / "terminal.svg").read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in picture and "<image" not in picture and "href" not in picture
        assert set(re.findall(r"\d+\.\d+\.\d+\.\d+", picture)) == {"127.0.0.1"}
        assert not re.search(r"/(home|root|tmp|Users)/", picture)
