"""The status page (examples/status_page.py) and docs/status.schema.json: what a pool does, for people and programs."""

import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.parse

import chromium
import pytest
from processes import ROOT, free_port, pids, wait_for_workers, wait_until

sys.path.append(str(ROOT / "examples"))
from status_page import StatusPage

pytestmark = pytest.mark.slow     # a recipe: what passes on one Python holds for the others

PROGRAM, TOKEN = ROOT / "examples" / "status_page.py", "a token of our own"
SCHEMA = json.loads((ROOT / "docs" / "status.schema.json").read_text(encoding="utf-8"))


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.002)


def get(url, path, method="GET", **headers):
    """Return the status, the headers and the text of an answer of the page."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def info_of(page, **headers):
    status, _, text = get(page.url, "/info.json", **headers)
    return json.loads(text) if status == 200 else None


@pytest.fixture
def ex(own_pool):
    """An embedded pool of two workers that are there."""
    ex = own_pool(2)
    wait_for_workers(ex, 2)
    return ex


@pytest.fixture
def page(ex):
    with StatusPage(ex, 0) as page:
        wait_until(lambda: info_of(page))
        yield page


class TestForPrograms:
    def test_info_is_the_snapshot_and_lists_both_workers_row_3_32(self, ex, page):
        wait_until(lambda: len(info_of(page)["workers"]) == 2)
        found = info_of(page)
        assert found.keys() == {*ex.info(), "seen"} and found["address"] == ex.info()["address"]
        assert {worker["name"] for worker in found["workers"]} == {"local-0", "local-1"}

    def test_history_and_spans_tell_what_ran_where(self, ex, page, gate):
        futures = [ex.options(name=f"part {n}").submit(wait_for, gate.path) for n in range(2)]
        wait_until(lambda: info_of(page)["seen"]["history"][-1]["busy"] == 2)
        seen = info_of(page)["seen"]
        assert sorted(span[3] for span in seen["spans"]) == ["part 0", "part 1"]
        assert {span[0] for span in seen["spans"]} == {"local-0", "local-1"}
        gate.open()
        wait_until(lambda: info_of(page)["seen"]["history"][-1]["busy"] == 0)
        assert all(future.done() for future in futures)
        assert max(one["rate"] for one in info_of(page)["seen"]["history"]) > 0

    def test_a_killed_worker_is_listed_with_what_it_was_at(self, ex, page, gate):
        future = ex.options(name="doomed").submit(wait_for, gate.path)
        wait_until(lambda: any(worker["jobs"] == ["doomed"] for worker in info_of(page)["workers"]))
        pid = pids(ex)[future.worker]
        os.kill(pid, signal.SIGKILL)
        loss, = wait_until(lambda: info_of(page)["seen"]["losses"])
        assert (loss["pid"], loss["jobs"], loss["device"]) == (pid, ["doomed"], "cpu")
        gate.open()
        assert future.result(60) is None

    def test_metrics_are_what_prometheus_reads(self, ex, page):
        parser = pytest.importorskip("prometheus_client.parser")
        assert list(ex.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
        wait_until(lambda: info_of(page)["jobs"]["delivered"] == 5)
        _, headers, text = get(page.url, "/metrics")
        found = {(s.name, *s.labels.values()): s.value
                 for family in parser.text_string_to_metric_families(text) for s in family.samples}
        assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8" and text.endswith("\n")
        assert found["minipool_up",] == 1 and found["minipool_jobs_delivered_total",] == 5
        assert found["minipool_workers", "idle"] == 2
        assert found["minipool_worker_jobs_total", "local", "local-0", "cpu"] + \
            found["minipool_worker_jobs_total", "local", "local-1", "cpu"] == 5

    def test_health_follows_the_server_and_the_last_snapshot_stays(self, cluster):
        node = cluster.node(cpu_workers=1)
        with cluster.executor() as ex, StatusPage(ex, 0) as page:
            wait_until(lambda: get(page.url, "/healthz")[0] == 200)
            cluster.server.process.kill()
            wait_until(lambda: get(page.url, "/healthz")[0] == 503)
            assert info_of(page)["seen"]["trouble"] and "minipool_up 0" in get(page.url, "/metrics")[2]
            cluster.serve()
            wait_until(lambda: get(page.url, "/healthz")[0] == 200 and info_of(page)["workers"])
            node.signal(signal.SIGINT)                          # leaves in order
            wait_until(lambda: not info_of(page)["workers"])
            assert info_of(page)["seen"]["losses"] == []        # neither of these is a loss

    def test_other_paths_and_methods_are_refused(self, page):
        assert get(page.url, "/../secret")[0] == 404 and get(page.url, "/info.json", "POST")[0] == 501
        assert get(page.url, "/healthz", "HEAD")[2] == ""


class TestWhoMayLook:
    def test_beyond_this_machine_a_token_is_needed(self, ex):
        with pytest.raises(ValueError, match=r"a token is needed where others can reach the page, as at 0\.0\.0\.0"):
            StatusPage(ex, 0, bind="0.0.0.0")

    def test_only_who_has_it_gets_what_is_about_the_pool(self, ex):
        with StatusPage(ex, 0, bind="0.0.0.0", token=TOKEN) as page:
            wait_until(lambda: info_of(page, Authorization=f"Bearer {TOKEN}"))
            for path in ("/info.json", "/metrics"):
                assert get(page.url, path, Authorization=f"Bearer {TOKEN}")[0] == 200
                for wrong in ({}, {"Authorization": f"Bearer {TOKEN[1:]}"}, {"Authorization": "Bearer \xe9"}):
                    assert get(page.url, path, **wrong)[0] == 401
            assert get(page.url, "/healthz")[0] == 200 and "local-0" not in get(page.url, "/")[2]

    def test_a_foreign_page_under_a_name_for_this_machine_gets_nothing(self, page):
        for host in ("evil.example:8900", "127.0.0.1.evil.example", "192.0.2.1", "[::1", ""):
            assert get(page.url, "/info.json", Host=host)[0] == 403
        assert get(page.url, "/info.json", Host="localhost:8900")[0] == 200

    def test_a_token_that_can_be_guessed_is_refused(self, ex):
        with pytest.raises(ValueError, match="16 characters"):
            StatusPage(ex, 0, token="short")


class TestProgram:
    def test_it_serves_the_pool_that_it_is_told_until_it_is_interrupted(self, cluster, program):
        cluster.node(cpu_workers=1)
        shown = program(PROGRAM, cluster.address, "--port", 0, MINIPOOL_SECRET_FILE=str(cluster.secret_file))
        url = shown.says(r"status page: (http://127\.0\.0\.1:\d+/)\n")[1]
        wait_until(lambda: get(url, "/healthz")[0] == 200)
        assert [one["name"] for one in json.loads(get(url, "/info.json")[2])["clients"]] == ["status page"]
        shown.signal(signal.SIGINT)
        assert shown.code() == 0

    def test_it_makes_a_token_that_only_its_user_can_read(self, cluster, program, tmp_path):
        file = tmp_path / "token"
        shown = program(PROGRAM, cluster.address, "--port", 0, "--bind", "0.0.0.0", "--token-file", file,
                        MINIPOOL_SECRET_FILE=str(cluster.secret_file))
        url = shown.says(r"(http://0\.0\.0\.0:\d+/)#TOKEN")[1].replace("0.0.0.0", "127.0.0.1")
        token = file.read_text().strip()
        assert file.stat().st_mode & 0o777 == 0o600 and token not in shown.out + shown.err
        wait_until(lambda: get(url, "/info.json", Authorization=f"Bearer {token}")[0] == 200)
        shown.signal(signal.SIGTERM)
        assert shown.code() == 0

    def test_a_mistake_is_one_sentence(self, cluster, program):
        nobody = program(PROGRAM, f"127.0.0.1:{free_port()}", MINIPOOL_SECRET=cluster.secret)
        open_door = program(PROGRAM, cluster.address, "--bind", "0.0.0.0", MINIPOOL_SECRET=cluster.secret)
        assert nobody.code() == open_door.code() == 1
        assert re.fullmatch(r"status page: .*a token is needed.*\n", open_door.err)
        assert re.fullmatch(r"status page: .*no minipool server at.*\n", nobody.err)


@pytest.mark.skipif(not chromium.PATH, reason="Chromium is not installed")
class TestInABrowser:
    @pytest.fixture
    def tab(self, own_mark, tmp_path):
        with chromium.Page(tmp_path / "profile") as tab:
            yield tab

    def test_workers_jobs_and_a_lost_worker_can_be_seen_row_3_31(self, tab, ex, page, gate):
        tab.open(page.url)
        tab.shows("local-0", "local-1", "idle")
        future = ex.options(name="long job").submit(wait_for, gate.path)
        tab.shows("busy", "long job")
        assert tab.evaluate("document.querySelectorAll('.strip rect').length") >= 1
        pid = pids(ex)[future.worker]
        os.kill(pid, signal.SIGKILL)
        tab.shows(f"pid {pid}, at long job")
        gate.open()
        tab.shows("1 done")
        assert tab.problems() == [] and {url.rpartition("/")[0] + "/" for url in tab.requests()} == {page.url}

    def test_what_the_pool_says_is_text_and_never_html(self, tab, ex, page, gate):
        name = "<img src=x onerror=\"document.title='pwned'\"><b>bold"
        ex.options(name=name).submit(wait_for, gate.path)
        tab.open(page.url)
        tab.shows(name)
        assert tab.evaluate("document.title + document.querySelectorAll('img').length") == "minipool0"
        assert tab.problems() == []

    @pytest.mark.parametrize("width", [360, 1400])
    def test_it_fits_a_phone_and_follows_dark_mode(self, tab, page, width):
        tab.resize(width, 800, mobile=width < 500)
        tab.prefer("dark")
        tab.open(page.url)
        tab.shows("local-0", "local-1")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        colours = tab.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body)"
                               ".backgroundColor].map(c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b))")
        assert colours[0] > 600 > 120 > colours[1]

    def test_it_sends_the_token_in_its_address_and_asks_for_one_without(self, tab, ex):
        with StatusPage(ex, 0, token=TOKEN) as page:
            tab.open(page.url)
            tab.shows("must end with # and its token")
            tab.open("about:blank")
            tab.open(f"{page.url}#{urllib.parse.quote(TOKEN)}")
            tab.shows("local-0")
            assert not any(TOKEN in url for url in tab.requests() if "#" not in url)

    def test_a_server_that_is_silent_is_named(self, tab, cluster):
        cluster.node(cpu_workers=1)
        with cluster.executor() as ex, StatusPage(ex, 0) as page:
            tab.open(page.url)
            tab.shows("node-0")
            cluster.server.process.kill()
            tab.shows("no answer since", "node-0")
            cluster.serve()
            wait_until(lambda: "no answer" not in tab.text())


class TestSchema:
    """docs/status.schema.json is true of info() and of `status --json`."""

    def test_info_of_an_embedded_pool_at_rest_and_at_work(self, ex, gate):
        self.check(ex.info())
        ex.submit(wait_for, gate.path), ex.submit(abs, ex.submit(wait_for, gate.path))
        wait_until(lambda: ex.info()["jobs"]["running"])
        self.check(ex.info())

    def test_what_the_command_prints(self, cluster):
        cluster.node(cpu_workers=1)
        with cluster.executor() as ex:
            wait_for_workers(ex, 1)
        command = [sys.executable, str(ROOT / "minipool.py"), "status", "--json", "--address", cluster.address,
                   "--secret-file", str(cluster.secret_file)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
        assert [worker["name"] for worker in found["workers"]] == ["node-0"]
        self.check(found)

    def test_a_snapshot_of_another_schema_is_not_taken_for_one(self):
        validator = pytest.importorskip("jsonschema").Draft202012Validator(SCHEMA)
        assert not validator.is_valid({"schema": 2}) and not validator.is_valid([])

    @staticmethod
    def check(found):
        """With jsonschema, all that the schema says; without it, that exactly the keys which it names are there."""
        parts = SCHEMA["$defs"]
        assert found.keys() == set(SCHEMA["required"]) == SCHEMA["properties"].keys() and found["schema"] == 1
        for name in ("jobs", "objects"):
            assert found[name].keys() == set(parts[name]["required"])
        for name in ("node", "worker", "client"):
            assert all(one.keys() == set(parts[name]["required"]) for one in found[f"{name}s"])
        try:
            from jsonschema import Draft202012Validator
        except ImportError:
            return
        Draft202012Validator.check_schema(SCHEMA)
        Draft202012Validator(SCHEMA).validate(found)


def test_the_page_is_one_file_that_names_no_other_host():
    text = pathlib.Path(PROGRAM).read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'`{]+", text)) <= {"http://host:8900/#TOKEN", "http://www.w3.org/2000/svg"}
