"""README.md tells the truth: its programs run and print what it shows, its commands, flags and names exist."""

import builtins
import concurrent.futures
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minipool
import minipool_worker

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMISED, _, LEFT_OUT = README.partition("\nLeft out: ")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```\n(?=(?:\n```text\n(.*?)^```)?)", re.MULTILINE | re.DOTALL)
PROGRAMS = [(code, shown) for language, code, shown in FENCE.findall(README) if language == "python"]
PROSE = re.sub(r"^```.*?^```$", "", PROMISED, flags=re.MULTILINE | re.DOTALL)
WORDS = re.findall(r"`([^`\n]+)`", PROSE)   # what the prose sets as code


def first_words(code):
    return re.split(r"[(:]", next(line for line in code.splitlines() if line and "import" not in line))[0]


def what_it_shows(code, shown):
    """The output that README gives for a program: the block after it, else its comments `# prints: ...`."""
    return shown or "".join(f"{text}\n" for text in re.findall(r"# prints: (.*)$", code, re.MULTILINE))


def program_help(script, *command):
    done = subprocess.run([sys.executable, str(ROOT / script), *command, "--help"], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def server():
    """The environment in which a program finds a server with two workers."""
    with minipool.Server(port=0) as server:
        with minipool_worker.Node(server.address, secret=server.secret, gpus="", cpu_workers=2):
            yield {"MINIPOOL_ADDRESS": server.address, "MINIPOOL_SECRET": server.secret}


@pytest.fixture(params=["embedded", "on a server"])
def pool_settings(request):
    if request.param == "embedded":
        return {"CUDA_VISIBLE_DEVICES": ""}
    return request.getfixturevalue("server")


class TestPrograms:
    def test_there_are_some(self):
        assert len(PROGRAMS) >= 5

    @pytest.mark.parametrize("code, shown", PROGRAMS, ids=[first_words(code) for code, _ in PROGRAMS])
    def test_a_program_prints_what_the_readme_shows(self, code, shown, pool_settings, tmp_path):
        (tmp_path / "program.py").write_text(code)
        environment = {name: value for name, value in os.environ.items() if name != "MINIPOOL_ADDRESS"}
        environment |= pool_settings | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True,
                              text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert done.stdout == what_it_shows(code, shown)
        assert what_it_shows(code, shown), "a program of the README shows nothing"


class TestCommands:
    @pytest.mark.parametrize("mark, needed", [("sweep", "examples/sweep.py"), ("test", "-m pytest")])
    def test_a_marked_command_is_followed_by_its_block_of_one_line(self, mark, needed):
        commands = re.findall(rf"^<!-- command: {mark} -->\n```sh\n(.*)\n```$", README, re.MULTILINE)
        assert len(commands) == 1
        assert needed in commands[0]
        for path in re.findall(r"\bexamples/\S+\.py\b", commands[0]):
            assert (ROOT / path).is_file()
        for extras in re.findall(r"-e '\.\[(\w+)\]'", commands[0]):
            assert f"\n{extras} = [" in (ROOT / "pyproject.toml").read_text()

    def test_every_flag_is_one_of_the_commands(self):
        known = program_help("minipool_worker.py", "connect")
        for command in ("serve", "status", "drain", "versions", "secret"):
            known += program_help("minipool.py", command)
        known += program_help("benchmarks/chaos.py")
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PROMISED))
        assert flags
        assert flags <= set(re.findall(r"--[a-z][a-z-]*", known))

    def test_the_table_lists_every_command_and_no_other(self):
        listed = re.findall(r"^\| `python minipool\.py (\w+)", README, re.MULTILINE)
        offered = re.findall(r"^    (\w+)  ", program_help("minipool.py"), re.MULTILINE)
        assert sorted(listed) == sorted(offered)
        assert "\n| `python minipool_worker.py connect HOST`" in README

    def test_every_file_that_it_names_is_there(self):
        for path in set(re.findall(r"\b(?:benchmarks|docs|examples)/[\w.-]+", README)):
            assert (ROOT / path).exists(), path


class TestNames:
    def test_every_class_exists(self):
        spaces = (minipool, minipool_worker, builtins, concurrent.futures)
        names = {word.rpartition(".")[2] for word in WORDS if re.fullmatch(r"(minipool\w*\.)?[A-Z][a-z]\w+", word)}
        assert {"Executor", "WorkerDied", "Server", "Node", "DistributedRunner"} <= names
        recipes = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py"))
        for name in names:
            assert any(hasattr(space, name) for space in spaces) or f"\nclass {name}" in recipes, name

    def test_every_error_has_the_bases_that_the_table_gives(self):
        rows = re.findall(r"^\| `(\w+)` \| (`.*?`) \|", README, re.MULTILINE)
        assert len(rows) >= 7
        for name, bases in rows:
            error = getattr(minipool, name)
            assert issubclass(error, minipool.MinipoolError)
            for base in re.findall(r"`(\w+)`", bases):
                assert issubclass(error, getattr(builtins, base, None) or getattr(concurrent.futures, base))

    def test_every_keyword_is_an_option_or_an_argument_of_executor(self):
        keywords = {match[1] for word in WORDS if (match := re.fullmatch(r"([a-z_]+)=\w*", word))}
        assert {"retries", "on"} <= keywords
        assert keywords <= minipool._OPTIONS.keys() | set(inspect.signature(minipool.Executor).parameters)

    def test_what_is_left_out_is_not_there(self):
        later = set(re.findall(r"`(\w+)`", LEFT_OUT))     # an argument that raises
        assert later
        for name in later:
            there = hasattr(minipool, name) or hasattr(minipool.Executor, name) or name in minipool._OPTIONS
            assert not there, f"{name} is there by now"


class TestCapabilities:
    def test_every_test_that_the_list_names_exists(self):
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "docs/capabilities.md").read_text(encoding="utf-8"))
        assert named
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (file, test)
