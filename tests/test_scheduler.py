"""What the scheduler promises, one sentence at a time. No clock, thread or socket: races are the order of two calls."""

import ast
import re
from pathlib import Path

import pytest

import minipool
from minipool import CATALOGUE, DIED, INLINE, LEGAL, OK, UNACKNOWLEDGED, Malformed, Scheduler, State, check_message
from tests.harness import Cluster

SOURCE = Path(minipool.__file__)
FORBIDDEN = {"socket", "threading", "time", "random", "secrets", "uuid", "pickle", "open", "print", "os", "select",
             "selectors", "logging", "log", "datetime", "subprocess", "input", "signal"}


def section_of(source, first, second):
    """Return the syntax tree of the lines between two banners."""
    lines = source.splitlines()
    begin, end = (next(i for i, line in enumerate(lines) if line.startswith(f"# {name}")) for name in (first, second))
    return ast.parse("\n".join(lines[begin:end]))


def outside_names(tree):
    """Names that are used but not bound in the function that uses them."""
    local = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
             for argument in [{a.arg for a in [*function.args.args, *function.args.kwonlyargs]}]
             for node in ast.walk(function) if isinstance(node, ast.Name) and node.id in argument}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in local}


def test_the_scheduler_is_pure():
    tree = section_of(SOURCE.read_text(), "4 scheduler", "5 server")
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom, ast.Global)) for node in ast.walk(tree))
    assert not outside_names(tree) & FORBIDDEN


def test_the_purity_test_would_notice():
    tree = ast.parse("def tick(self, now):\n    return time.monotonic()\ndef f(log):\n    return log + 1")
    assert outside_names(tree) & FORBIDDEN == {"time"}


class TestMessages:
    GOOD = ("finished", 1, "ok", b"value", 0.5, False)

    def test_every_message_that_a_peer_may_send_has_a_handler(self):
        handled = set(Scheduler(0.0, 0)._handlers)
        sent = {kind for kind, (senders, _) in CATALOGUE.items() if senders - {"server"}}
        assert handled == sent

    def test_every_message_that_the_scheduler_sends_is_in_the_catalogue(self):
        tree = section_of(SOURCE.read_text(), "4 scheduler", "5 server")
        sent = {call.args[1].elts[0].value for call in ast.walk(tree) if isinstance(call, ast.Call)
                and getattr(call.func, "attr", "") == "_send" and isinstance(call.args[1], ast.Tuple)}
        assert sent and all("server" in CATALOGUE[kind][0] for kind in sent)

    def test_a_good_message_passes(self):
        check_message(self.GOOD, "worker")

    @pytest.mark.parametrize("role", ["client", "node", "server", "stranger"])
    def test_a_role_that_does_not_send_it_is_refused(self, role):
        with pytest.raises(Malformed):
            check_message(self.GOOD, role)

    @pytest.mark.parametrize("message", [
        (), [], None, "finished", ("nonsense",), (1, 2), GOOD[:-1], (*GOOD, 1), list(GOOD)], ids=repr)
    def test_another_shape_is_refused(self, message):
        with pytest.raises(Malformed):
            check_message(message, "worker")

    @pytest.mark.parametrize(("position", "field"), [
        (1, -1), (1, 1 << 62), (1, 10**400), (1, True), (1, 1.0), (1, None), (2, b"ok"), (3, "text"), (3, ()),
        (3, ((b"a", -1), 1, "")), (3, ((b"a", 1), -1, "")), (3, ((b"a", 1), 1 << 62, "")), (3, (("a", 1), 1, "")),
        (3, (b"a", 1)), (3, ((b"a", 1), 1)), (3, ((b"a", 1), 1, None)), (3, ((b"a", 1), 1, "x" * 65)),
        (4, float("nan")), (4, float("inf")), (4, -0.1), (4, 1e300), (4, "1"), (5, 1)], ids=repr)
    def test_a_field_that_no_honest_peer_sends_is_refused(self, position, field):
        message = list(self.GOOD)
        message[position] = field
        with pytest.raises(Malformed):
            check_message(tuple(message), "worker")

    @pytest.mark.parametrize("name", [(b"x" * 65, 1), (b"a", 1, 2), (b"a", float("nan")), ("a", 1), [b"a", 1], b"a"],
                             ids=repr)
    def test_a_name_is_a_creator_and_a_number(self, name):
        with pytest.raises(Malformed):
            check_message(("pull", name, 0, 1), "client")

    @pytest.mark.parametrize("field", [[-1], [1.5], ["1"], [None], [float("nan")], [1 << 63]], ids=repr)
    def test_a_list_of_numbers_holds_numbers_in_range(self, field):
        pool = Cluster()
        for message in (("delivered", field), ("cancel", field), ("kill", field, "why")):
            with pytest.raises(Malformed):
                pool.feed("c1", message)
        pool.scheduler.check()


class TestStates:
    def test_the_table_of_moves_names_all_states(self):
        states = {value for name, value in vars(State).items() if not name.startswith("_")}
        assert set(LEGAL) == states and set().union(*LEGAL.values()) <= states

    def test_nothing_leads_out_of_done_and_cancelled(self):
        assert not LEGAL[State.DONE] and not LEGAL[State.CANCELLED]

    def test_an_illegal_move_names_the_job_and_its_story(self):
        pool = Cluster()
        job = pool.job(pool.submit(name="train"))
        pool.scheduler._move(job, State.DONE)
        with pytest.raises(AssertionError, match=r"cannot go from done to ready.*train"):
            pool.scheduler._move(job, State.READY)

    def test_a_job_goes_from_ready_over_running_and_delivering_to_done(self):
        pool = Cluster(workers=[])
        job = pool.submit()
        seen = [pool.state(job)]
        pool.generations["w1"] = 1
        for step in (lambda: pool.join_worker("w1"), lambda: pool.finish(job),
                     lambda: pool.feed("c1", ("delivered", [job]))):
            step()
            seen.append(pool.state(job))
        assert seen == ["ready", "running", "delivering", "forgotten"]


class TestLosses:
    def test_a_job_is_retried_on_another_worker_when_its_worker_vanishes(self):
        pool = Cluster(workers=["w1", "w2"])
        job = pool.submit(retries=1)
        assert pool.runs() == [("w1", job, 1)]
        pool.lose("w1")
        assert pool.runs() == [("w2", job, 2)]

    def test_only_the_job_that_the_cell_showed_is_charged(self):
        pool = Cluster()
        pool.learn_short()
        jobs = pool.submit(3)
        pool.died("w1", pool.token(jobs[1]))
        assert [pool.job(job).deaths for job in jobs] == [0, 1, 0]

    def test_nobody_is_charged_for_the_death_of_an_idle_worker(self):
        pool = Cluster()
        job = pool.submit()
        pool.died("w1", 0)
        assert pool.job(job).deaths == 0 and pool.state(job) == "ready"

    def test_without_a_node_to_read_the_cell_the_oldest_is_charged(self):
        pool = Cluster()
        pool.learn_short()
        jobs = pool.submit(3)
        pool.respawn("w1")
        assert [pool.job(job).deaths for job in jobs] == [1, 0, 0]

    def test_a_charged_job_is_handed_out_alone(self):
        pool = Cluster()
        pool.learn_short()
        first, second = pool.submit(2)
        pool.lose("w1")
        pool.clear()
        pool.respawn("w1")
        assert pool.runs() == [("w1", first, 2)]
        assert pool.state(second) == "ready"

    def test_one_death_more_than_allowed_is_the_end(self):
        pool = Cluster()
        job = pool.submit(max_deaths=2)
        for _ in range(3):
            assert pool.state(job) == "running"
            pool.lose("w1")
            pool.respawn("w1")
        number, status, evidence, worker, attempts = pool.told("c1", "done")[0]
        assert (number, status, worker, attempts) == (job, "died", "host-1", 3)
        assert evidence["deaths"] == 3 and evidence["what"] == "signal 9"

    def test_a_verdict_is_told_again_to_a_client_that_lost_it(self):
        pool = Cluster()
        job = pool.submit(max_deaths=0)
        pool.lose("w1")
        pool.cut("c1")
        pool.clear()
        pool.join_client(jobs=[job])
        assert pool.outcomes() == [(job, "died")]

    def test_a_planned_end_charges_nobody(self):
        pool = Cluster()
        job = pool.submit()
        pool.feed("w1", ("bye", "recycled"))
        assert pool.job(job).deaths == 0 and pool.state(job) == "ready"

    def test_last_words_that_are_read_after_the_death_do_not_revive_a_worker(self):
        pool = Cluster()
        pool.died("w1")
        pool.join_worker("w1")
        assert "w1" not in pool.connections and not pool.knows("w1")

    def test_the_older_process_of_a_slot_is_turned_away(self):
        pool = Cluster()
        pool.respawn("w1")
        pool.generations["w1"] = 1
        pool.clear()
        pool.join_worker("w1")
        assert "w1" not in pool.connections and not pool.knows("w1")

    def test_an_exception_is_retried_if_the_job_wants_that(self):
        pool = Cluster()
        job = pool.submit(retries=1)
        pool.raise_in(job)
        assert pool.outcomes() == []
        pool.raise_in(job)
        assert pool.outcomes() == [(job, "raised")]

    def test_an_exception_that_is_not_to_be_retried_is_an_outcome(self):
        pool = Cluster()
        job = pool.submit(retries=5)
        pool.raise_in(job, retry=False)
        assert pool.outcomes() == [(job, "raised")]

    def test_a_late_result_of_an_old_attempt_is_stale(self):
        pool = Cluster(workers=["w1", "w2"])
        job = pool.submit()
        old = pool.token(job)
        pool.cut("w1")
        pool.join_worker("w1")          # it lists nothing: it never got the run
        pool.runs()
        pool.end(old)
        assert pool.outcomes() == [] and pool.state(job) == "running"
        assert pool.told("w1", "forget") == [([old],)]


class TestOrder:
    def test_the_larger_priority_goes_first_and_arrival_breaks_ties(self):
        pool = Cluster(workers=[])
        low, high, tie = pool.submit(priority=-1), pool.submit(priority=5), pool.submit(priority=5)
        order = []
        pool.generations["w1"] = 1
        pool.join_worker("w1")
        for _ in range(3):
            (_, job, _), = pool.runs()
            order.append(job)
            pool.finish(job)
        assert order == [high, tie, low]

    def test_a_job_goes_only_where_its_on_says(self):
        pool = Cluster(workers=["w1", "w2"], tags={"w2": ["big"]})
        first, second = pool.submit(2, on=["big"])
        assert pool.runs() == [("w2", first, 1)]
        assert pool.state(second) == "ready"

    @pytest.mark.parametrize("where", ["host-2", "big"])
    def test_a_worker_is_named_by_its_name_or_tag(self, where):
        pool = Cluster(workers=["w1", "w2"], tags={"w2": ["big"]})
        assert pool.submit(on=[where]) and pool.runs() == [("w2", 1, 1)]

    def test_a_job_whose_on_admits_nobody_waits_for_somebody(self):
        pool = Cluster(tags={"w2": ["big"]})
        job = pool.submit(on=["big"])
        assert pool.runs() == []
        pool.generations["w2"] = 1
        pool.join_worker("w2")
        assert pool.runs() == [("w2", job, 1)]

    def test_a_preference_that_admits_nobody_is_none(self):
        pool = Cluster()
        job = pool.submit(on=["big"], soft=True)
        assert pool.runs() == [("w1", job, 1)]

    def test_a_preference_is_followed_where_it_can_be(self):
        pool = Cluster(workers=["w1", "w2"], tags={"w2": ["big"]})
        job = pool.submit(on=["big"], soft=True)
        assert pool.runs() == [("w2", job, 1)]

    def test_the_session_that_has_less_goes_first(self):
        pool = Cluster(workers=["w1", "w2"], clients=["c1", "c2"])
        mine = pool.submit(6)
        theirs = pool.submit(2, client="c2")
        pool.finish(mine[0])
        pool.finish(mine[1])
        assert pool.runs()[2:] == [("w1", theirs[0], 1), ("w2", mine[2], 1)]

    def test_a_session_uses_no_more_workers_than_it_may(self):
        pool = Cluster(workers=["w1", "w2", "w3"], limit=2)
        jobs = pool.submit(5)
        assert {worker for worker, _, _ in pool.runs()} == {"w1", "w2"}
        pool.finish(jobs[0])
        assert [job for _, job, _ in pool.runs()] == [jobs[2]]


class TestWindows:
    def test_a_worker_gets_one_job_at_a_time_of_an_unknown_function(self):
        pool = Cluster()
        pool.submit(5)
        assert len(pool.runs()) == 1

    def test_a_window_opens_after_short_samples(self):
        pool = Cluster()
        pool.learn_short()
        pool.submit(30)
        assert 18 <= len(pool.runs()) <= 22     # twenty milliseconds of work, a millisecond each

    def test_one_long_sample_closes_it(self):
        pool = Cluster()
        pool.learn_short()
        jobs = pool.submit(30)
        sent = len(pool.runs())
        for job in jobs[:sent]:
            pool.finish(job, seconds=0.05)
        assert len(pool.runs()) == 1

    def test_jobs_sent_before_a_long_sample_do_not_reopen_it(self):
        pool = Cluster()
        pool.learn_short()
        pool.learn_short(fn=2)
        jobs = pool.submit(3)
        pool.runs()
        pool.finish(jobs[0], seconds=5.0)
        pool.finish(jobs[1], seconds=5.0)
        pool.submit(40, fn=2)           # nothing joins what is now known to be long, except by what was estimated
        assert len(pool.inbox("w1")) <= 22

    def test_a_window_that_does_not_move_is_recalled(self):
        pool = Cluster()
        pool.learn_short()
        jobs = pool.submit(3)
        pool.pass_time(0.051)
        assert pool.told("w1", "recall") == [([pool.token(job) for job in jobs],)]
        assert [pool.state(job) for job in jobs] == ["running"] * 3

    def test_what_a_worker_hands_back_runs_elsewhere_uncharged(self):
        pool = Cluster()
        pool.learn_short()
        jobs = pool.submit(3)
        asked = [pool.token(job) for job in jobs]
        pool.pass_time(0.051)
        pool.generations["w2"] = 1
        pool.join_worker("w2")
        pool.runs()
        pool.feed("w1", ("recalled", asked, asked[1:]))
        assert pool.runs() == [("w2", jobs[1], 1)]
        assert [pool.job(job).deaths for job in jobs] == [0, 0, 0]

    def test_a_recall_that_is_not_answered_for_a_second_is_not_waited_for(self):
        pool = Cluster(workers=["w1", "w2"])
        pool.submit(fn=2)
        pool.learn_short()
        pool.finish(1)
        pool.submit(fn=2)
        jobs = pool.submit(3)
        pool.clear()
        busy = pool.attempts[pool.token(jobs[1])][0]
        other = "w2" if busy == "w1" else "w1"
        pool.finish(next(pool.attempts[t][2] for t in pool.inbox(other)))
        pool.pass_time(1.2)
        assert (other, jobs[1], 1) in pool.runs()

    @pytest.mark.parametrize("now", [0.1, 0.7, 1.1, 4.35, 1e5 + 0.3, 123456.789])
    def test_a_watch_ends_whatever_the_rounding(self, now):
        pool = Cluster()
        pool.now += now
        pool.learn_short()
        pool.submit(3)
        pool.pass_time(0.06)
        assert len(pool.told("w1", "recall")) == 1



class TestClients:
    def test_submitting_twice_is_submitting_once(self):
        pool = Cluster()
        job = pool.submit()
        pool.submit(number=job)
        assert pool.runs() == [("w1", job, 1)]

    def test_a_delivered_outcome_may_be_forgotten_by_its_worker(self):
        pool = Cluster()
        job = pool.submit()
        token = pool.token(job)
        pool.finish(job)
        assert pool.told("w1", "forget") == [] and pool.state(job) == "delivering"
        pool.feed("c1", ("delivered", [job]))
        assert pool.told("w1", "forget") == [([token],)] and pool.state(job) == "forgotten"

    def test_a_delivering_job_goes_back_when_its_holder_is_lost(self):
        pool = Cluster(workers=["w1", "w2"])
        job = pool.submit()
        pool.finish(job)
        pool.runs()
        pool.died("w1")
        assert pool.runs() == [("w2", job, 2)] and pool.job(job).deaths == 0

    def test_cancelling_a_ready_job_frees_it_at_once(self):
        pool = Cluster(workers=[])
        job = pool.submit()
        pool.feed("c1", ("cancel", [job]))
        assert pool.state(job) == "forgotten"

    def test_jobs_cancelled_behind_a_busy_worker_do_not_pile_up(self):
        pool = Cluster()
        _running, *queued = [pool.submit() for _ in range(300)]
        pool.feed("c1", ("cancel", queued))
        assert sum(len(heap) for heap in pool.scheduler._queues.values()) <= 64

    def test_cancelling_a_job_that_waits_for_a_claim_frees_it(self):
        pool = Cluster(workers=[], restarted=True)
        job = pool.submit(again=True)
        assert pool.state(job) == "waiting"
        pool.feed("c1", ("cancel", [job]))
        pool.pass_time(11)
        assert pool.state(job) == "forgotten"

    def test_cancelling_a_running_job_asks_for_it_and_keeps_the_slot_until_the_answer(self):
        pool = Cluster()
        first, second = pool.submit(2)
        token = pool.token(first)
        pool.clear()
        pool.feed("c1", ("cancel", [first]))
        assert pool.told("w1", "recall") == [([token],)] and pool.runs() == []
        pool.feed("w1", ("recalled", [token], [token]))
        assert pool.runs() == [("w1", second, 1)]

    def test_the_outcome_of_a_cancelled_job_reaches_nobody(self):
        pool = Cluster()
        job = pool.submit()
        token = pool.token(job)
        pool.feed("c1", ("cancel", [job]))
        pool.end(token)
        assert pool.outcomes() == [] and pool.told("w1", "forget") == [([token],)]

    def test_cancelling_a_delivering_job_lets_its_worker_forget(self):
        pool = Cluster()
        job = pool.submit()
        token = pool.token(job)
        pool.finish(job)
        pool.feed("c1", ("cancel", [job]))
        assert pool.told("w1", "forget") == [([token],)]

    def test_a_cancelled_job_in_the_inbox_of_a_worker_that_returns_is_dropped(self):
        pool = Cluster()
        job = pool.submit()
        token = pool.token(job)
        pool.feed("c1", ("cancel", [job]))
        pool.cut("w1")
        pool.join_worker("w1", [(token, (pool.session("c1"), job), "inbox")])
        assert pool.told("w1", "forget") == [([token],)] and pool.inbox("w1") == []

    def test_a_client_that_returns_is_told_what_is_missing(self):
        pool = Cluster()
        job = pool.submit()
        pool.cut("c1")
        pool.join_client(jobs=[job, 77])
        assert pool.told("c1", "missing") == [([77],)]

    def test_what_a_returning_client_does_not_list_it_does_not_want(self):
        pool = Cluster(workers=[])
        job = pool.submit()
        pool.cut("c1")
        pool.join_client()
        assert pool.state(job) == "forgotten"

    def test_an_outcome_that_was_lost_on_the_way_is_sent_again(self):
        pool = Cluster()
        job = pool.submit()
        token = pool.token(job)
        pool.cut("c1")
        pool.finish(job)
        pool.join_client(jobs=[job])
        assert pool.told("w1", "resend") == [([token],)]
        pool.end(token)
        assert pool.outcomes() == [(job, "ok")]

    def test_a_client_that_stays_away_is_forgotten_after_its_lease(self):
        pool = Cluster()
        job = pool.submit()
        pool.cut("c1")
        pool.pass_time(59.9)
        assert pool.state(job) == "running"
        pool.pass_time(0.2)
        assert pool.state(job) == "forgotten" and pool.told("w1", "leave") == [(pool.session("c1"),)]

    def test_what_a_vanished_client_has_running_is_ended(self):
        pool = Cluster()
        pool.join_node()
        token = pool.token(pool.submit())
        pool.cut("c1")
        pool.pass_time(60.05)
        assert pool.told("n1", "kill") == [([token], "nobody wants its outcome any more")]

    def test_a_client_that_returns_within_its_lease_keeps_everything(self):
        pool = Cluster()
        job = pool.submit()
        pool.cut("c1")
        pool.pass_time(59)
        pool.join_client(jobs=[job])
        pool.pass_time(100)
        assert pool.state(job) == "running"

    def test_the_globals_of_a_client_that_never_returns_to_a_new_server_are_left(self):
        pool = Cluster(workers=[], restarted=True)
        pool.generations["w1"] = 1
        pool.join_worker("w1", positions={b"somebody": 1})
        pool.pass_time(61)
        assert pool.told("w1", "leave") == [(b"somebody",)]


class TestReconnections:
    def listed(self, pool, job, kind):
        return [(pool.token(job), (pool.session("c1"), job), kind)]

    def test_a_worker_that_returns_within_three_seconds_keeps_its_job(self):
        pool = Cluster(workers=["w1", "w2"])
        job = pool.submit()
        pool.cut("w1")
        pool.pass_time(2.9)
        pool.clear()
        pool.join_worker("w1", self.listed(pool, job, "begun"))
        pool.finish(job)
        assert pool.runs() == [] and pool.outcomes() == [(job, "ok")]

    def test_what_a_returning_worker_does_not_list_goes_back_uncharged(self):
        pool = Cluster()
        job = pool.submit()
        pool.cut("w1")
        pool.clear()
        pool.join_worker("w1")
        assert pool.runs() == [("w1", job, 1)] and pool.job(job).deaths == 0

    def test_an_outcome_that_a_returning_worker_lists_is_kept_until_it_tells_it(self):
        pool = Cluster()
        job = pool.submit()
        pool.cut("w1")
        pool.join_worker("w1", self.listed(pool, job, "outcome"))
        assert pool.told("w1", "forget") == [] and pool.outcomes() == []
        pool.finish(job)
        assert pool.outcomes() == [(job, "ok")]

    def test_a_closed_worker_is_kept_while_its_node_vouches_for_it(self):
        pool = Cluster()
        job = pool.submit()
        pool.cut("w1")
        pool.pass_time(30)
        assert pool.state(job) == "running"

    def test_a_closed_worker_of_a_closed_node_is_lost_after_three_seconds(self):
        pool = Cluster()
        job = pool.submit()
        pool.cut("w1")
        pool.cut("n1")
        pool.pass_time(2.9)
        assert pool.state(job) == "running"
        pool.pass_time(0.2)
        assert pool.state(job) == "ready" and not pool.knows("w1")

    def test_a_worker_speaks_for_itself_though_its_node_is_away(self):
        pool = Cluster()
        job = pool.submit()
        pool.cut("n1")
        for _ in range(30):
            pool.pass_time(1)
            pool.start(job)
        assert pool.state(job) == "running"

    def test_what_a_superseded_connection_still_says_is_ignored(self):
        pool = Cluster()
        job = pool.submit()
        old = pool.connections["c1"]
        pool.join_client(jobs=[job])
        pool.perform(pool.scheduler.receive(old, [("cancel", [job])], pool.now))
        assert pool.state(job) == "running"


class TestRestart:
    """A new server knows nothing: everybody says what they hold, in any order."""

    def restart(self, job_is, seen=0):
        """A pool whose server restarted while one job was `job_is`; only its worker has announced."""
        pool = Cluster()
        job = pool.submit()
        old, name = pool.token(job), (pool.session("c1"), job)
        pool.pass_time(1)
        pool.start_server()
        pool.join_worker("w1", [(old, name, job_is)])
        pool.clear()
        return pool, job, old

    def test_a_job_that_runs_is_adopted_when_its_client_returns(self):
        pool, job, old = self.restart("begun")
        pool.join_client(jobs=[job])
        assert pool.told("c1", "missing") == [([job],)]
        pool.submit(number=job, again=True)
        assert pool.runs() == [] and pool.token(job) == old
        pool.end(old)
        assert pool.outcomes() == [(job, "ok")]

    def test_a_job_is_adopted_also_when_its_client_was_back_first(self):
        pool = Cluster(workers=[], restarted=True)
        job = pool.submit(again=True)
        pool.generations["w1"] = 1
        pool.join_worker("w1", [(7, (pool.session("c1"), job), "begun")])
        assert pool.token(job) == 7 and pool.runs() == []

    def test_an_outcome_is_adopted_and_asked_for_when_its_client_is_back(self):
        pool, job, old = self.restart("outcome")
        pool.end(old)                               # to nobody: its client is not back yet
        pool.join_client(jobs=[job])
        assert pool.told("w1", "resend") == [([old],)] and pool.runs() == []
        pool.end(old)
        assert pool.outcomes() == [(job, "ok")]

    def test_an_adopted_outcome_that_wants_a_retry_is_retried(self):
        pool, job, old = self.restart("outcome")
        pool.join_client(jobs=[job])
        pool.submit(number=job, again=True, attempts=1, retries=1)
        pool.end(old, "raised", retry=True)
        assert pool.outcomes() == [] and pool.runs() == [("w1", job, 2)]

    def test_a_claim_that_finished_meanwhile_is_adopted_as_an_outcome(self):
        pool, job, old = self.restart("begun")
        pool.end(old)
        pool.cut("w1")
        pool.join_worker("w1", [(old, (pool.session("c1"), job), "outcome")])
        pool.join_client(jobs=[job])
        pool.submit(number=job, again=True)
        pool.end(old)
        assert pool.outcomes() == [(job, "ok")] and pool.runs() == []

    def test_what_nobody_claims_runs_after_ten_seconds(self):
        pool = Cluster(restarted=True)
        job = pool.submit(again=True)
        pool.pass_time(9.9)
        assert pool.runs() == []
        pool.pass_time(0.2)
        assert pool.runs() == [("w1", job, 1)]

    def test_what_nobody_claims_runs_when_as_many_workers_are_back_as_were_seen(self):
        pool = Cluster(workers=["w1"], clients=[], restarted=True)
        pool.join_client(seen=2)
        job = pool.submit(again=True)
        assert pool.runs() == []
        pool.generations["w2"] = 1
        pool.join_worker("w2")
        assert [run[1:] for run in pool.runs()] == [(job, 1)]

    def test_a_worker_that_was_never_in_before_does_not_count_among_those_that_are_back(self):
        pool = Cluster(workers=["w1"], clients=[], restarted=True)
        pool.join_client(seen=2)
        pool.submit(again=True)
        pool.join_worker("w2", returns=False)
        assert pool.runs() == []            # who runs it may still be on its way back
        pool.pass_time(1.1)
        assert len(pool.runs()) == 1        # it would be here by now

    def test_what_may_begin_only_once_and_nobody_claims_fails(self):
        pool = Cluster(restarted=True)
        job = pool.submit(again=True, attempts=1, max_deaths=0)
        pool.pass_time(10)
        assert pool.outcomes() == [(job, "died")]

    def test_deaths_from_before_the_client_told_how_many_there_may_be_count(self):
        pool = Cluster(workers=[], clients=[], restarted=True)
        for life in (1, 2):
            pool.generations["w1"] = life
            pool.join_worker("w1", [(life, (pool.session("c1"), 5), "begun")])
            pool.died("w1", life)
        pool.join_client(jobs=[5])
        pool.submit(number=5, max_deaths=1)
        assert pool.outcomes() == [(5, "died")]

    def test_attempts_go_on_from_what_the_client_knows(self):
        pool = Cluster(restarted=True)
        pool.submit(number=5, again=True, attempts=2)
        pool.pass_time(10)
        assert pool.runs() == [("w1", 5, 3)]

    def test_a_begun_job_that_nobody_wants_any_more_is_ended(self):
        pool = Cluster(restarted=True)
        pool.generations["w2"] = 1
        pool.join_worker("w2", [(7, (pool.session("c1"), 99), "begun")])
        assert pool.told("n1", "kill") == [([7], "its job is not wanted here any more")]

    def test_new_jobs_do_not_wait_for_adoption(self):
        pool = Cluster(restarted=True)
        job = pool.submit()
        assert pool.runs() == [("w1", job, 1)]

    def test_a_claim_is_kept_for_a_lease_and_no_longer(self):
        pool, _, old = self.restart("outcome")
        pool.join_node()
        pool.end(old)
        pool.pass_time(59)
        assert pool.told("w1", "forget") == []
        pool.pass_time(2)
        assert pool.told("w1", "forget") == [([old],)]

    def test_the_first_to_tell_of_a_job_has_it_and_the_second_may_forget_it(self):
        pool = Cluster(workers=[], clients=[], restarted=True)
        pool.generations = {"w1": 1, "w2": 1}
        pool.join_worker("w1", [(7, (pool.session("c1"), 1), "outcome")])
        assert pool.told("w1", "forget") == []
        pool.join_worker("w2", [(9, (pool.session("c1"), 1), "outcome")])
        assert pool.told("w2", "forget") == [([9],)]

    def test_what_had_not_begun_is_dropped_and_sent_anew(self):
        pool, job, old = self.restart("inbox")
        assert pool.inbox("w1") == []
        pool.join_client(jobs=[job], seen=1)
        pool.submit(number=job, again=True)
        assert pool.runs() == [("w1", job, 1)]

    def test_tokens_go_on_from_the_largest_that_anybody_has(self):
        pool = Cluster(workers=[], restarted=True)
        pool.generations["w1"] = 1
        pool.join_worker("w1", [(10**15, (pool.session("c1"), 5), "outcome")])
        assert pool.token(pool.submit()) > 10**15


class TestLog:
    def kinds(self, pool, worker):
        return [m[0] for m in pool.sent[worker] if m[0] in ("put", "log", "run")]

    def test_entries_go_before_the_run_in_order(self):
        pool = Cluster()
        pool.log_entry(0)
        pool.log_entry(1)
        pool.submit(log=2)
        assert self.kinds(pool, "w1") == ["log", "log", "put", "run"]
        assert [position for position, *_ in pool.told("w1", "log")] == [0, 1]

    def test_a_late_worker_gets_them_too(self):
        pool = Cluster()
        pool.log_entry(0)
        pool.submit(2, log=1)
        pool.generations["w2"] = 1
        pool.join_worker("w2")
        assert self.kinds(pool, "w2") == ["log", "put", "run"]

    def test_nothing_is_sent_twice(self):
        pool = Cluster()
        pool.log_entry(0)
        pool.finish(pool.submit(log=1))
        pool.clear()
        pool.submit(log=1)
        assert self.kinds(pool, "w1") == ["run"]

    def test_a_job_gets_only_the_entries_from_before_its_submission(self):
        pool = Cluster()
        pool.log_entry(0)
        pool.log_entry(1)
        pool.submit(log=1)
        assert [position for position, *_ in pool.told("w1", "log")] == [0]

    def test_the_jobs_of_an_unfit_worker_go_elsewhere_uncharged(self):
        pool = Cluster(workers=["w1", "w2"])
        pool.log_entry(0)
        first, second, third = pool.submit(3, log=1)
        pool.clear()
        pool.unfit("w1", [first])
        pool.finish(second)
        assert pool.runs() == [("w2", first, 1)] and pool.job(first).deaths == 0
        assert pool.state(third) == "ready" and pool.told("c1", "broken") == []

    def test_an_executor_of_which_every_worker_is_unfit_is_broken(self):
        pool = Cluster(workers=["w1", "w2"])
        pool.log_entry(0)
        first, second = pool.submit(2, log=1)
        pool.unfit("w1", [first])
        pool.unfit("w2", [second])
        assert pool.told("c1", "broken") == [(b"it raised",)]
        assert pool.state(pool.submit(log=1)) == "forgotten"

    def test_a_client_that_did_not_hear_that_it_is_broken_is_told_again_and_has_no_jobs(self):
        pool = Cluster(workers=["w1"])
        pool.log_entry(0)
        pool.unfit("w1", [pool.submit(log=1)])
        pool.cut("c1")
        pool.clear()
        pool.join_client(jobs=[1, 2])
        assert pool.told("c1", "broken") == [(b"it raised",)] and pool.told("c1", "missing") == []
        assert pool.state(2) == "forgotten"

    def test_a_worker_that_was_fit_before_a_restart_still_counts(self):
        pool = Cluster(workers=[], restarted=True)
        pool.generations = {"w1": 1, "w2": 1}
        pool.join_worker("w1", positions={pool.session("c1"): 1})
        pool.join_worker("w2")
        pool.log_entry(0)
        jobs = pool.submit(2, log=1)
        pool.unfit("w2", jobs[1:])
        assert pool.told("c1", "broken") == []


class TestRanges:
    def value_of(self, pool):
        """A job of c1 whose outcome stays in w1: the name to pull."""
        name = pool.id_of("w1"), 1
        pool.finish(pool.submit(), value=(name, 10, ""))
        pool.clear()
        return name

    def test_a_range_goes_to_all_who_asked_and_is_asked_for_once(self):
        pool = Cluster(clients=["c1", "c2"])
        name = self.value_of(pool)
        for reader in ("c1", "c2", "c1"):
            pool.feed(reader, ("pull", name, 0, 5))
        assert pool.told("w1", "pull") == [(name, 0, 5)]
        pool.feed("w1", ("range", name, 0, b"digest", b"12345"))
        assert [len(pool.told(reader, "range")) for reader in ("c1", "c2")] == [1, 1]

    def test_what_an_owner_was_asked_is_asked_again_when_it_returns(self):
        pool = Cluster()
        name = self.value_of(pool)
        pool.feed("c1", ("pull", name, 0, 5))
        pool.cut("w1")
        pool.clear()
        pool.join_worker("w1", [(pool.token(1), (pool.session("c1"), 1), "outcome")])
        assert pool.told("w1", "pull") == [(name, 0, 5)]

    def test_what_a_lost_owner_was_asked_is_gone(self):
        pool = Cluster()
        name = self.value_of(pool)
        pool.feed("c1", ("pull", name, 0, 5))
        pool.died("w1")
        assert pool.told("c1", "gone") == [(name,)]

    def test_what_nobody_holds_is_gone_at_once(self):
        pool = Cluster()
        pool.feed("w1", ("pull", (b"nobody", 1), 0, 5))
        assert pool.told("w1", "gone") == [((b"nobody", 1),)]


class TestHosts:
    def test_a_silent_host_is_dead_after_fifteen_seconds(self):
        pool = Cluster()
        job = pool.submit()
        pool.pass_time(14.5, beating=False)
        assert pool.knows("w1")
        pool.pass_time(1.5, beating=False)
        assert not pool.knows("w1") and pool.state(job) == "ready"

    def test_any_byte_of_the_host_is_a_heartbeat(self):
        pool = Cluster()
        job = pool.submit()
        for _ in range(40):
            pool.pass_time(1, beating=False)
            pool.start(job)
        assert pool.knows("w1")

    @pytest.mark.parametrize("first", ["tick", "receive"])
    def test_a_stalled_server_does_not_blame_its_peers(self, first):
        pool = Cluster()
        pool.join_node("n2", called="other")
        pool.now += 100
        if first == "receive":
            pool.feed("n2", ("beat",))
        pool.tick()
        assert pool.knows("w1")

    def test_two_hosts_of_one_name_are_told_apart(self):
        pool = Cluster()
        pool.join_node("n2")
        pool.generations["w7"] = 1
        pool.join_worker("w7", node="n2")
        assert pool.told("n2", "welcome")[-1][0]["name"] == "host~2"
        assert pool.told("w7", "welcome")[-1][0]["name"] == "host~2-7"

    def test_a_silent_host_gets_no_new_jobs_until_it_is_heard_again(self):
        pool = Cluster()
        pool.pass_time(5.1, beating=False)
        job = pool.submit()
        assert pool.state(job) == "ready"
        pool.pass_time(2)       # with beats: it is looked at as often as it beats
        assert pool.state(job) == "running"

    def test_how_long_it_may_be_silent_can_be_set(self):
        pool = Cluster(dead_after=1.5)
        pool.submit()
        pool.pass_time(1.4, beating=False)
        assert pool.knows("w1")
        pool.pass_time(0.2, beating=False)
        assert not pool.knows("w1")

    def test_it_is_told_how_often_to_beat(self):
        assert Cluster(dead_after=1.5).scheduler.beat == pytest.approx(0.3)
        pool = Cluster()
        pool.join_node("n2")
        assert pool.told("n2", "welcome")[0][0]["beat"] == 1.0

    def test_a_node_is_made_up_for_a_worker_that_is_back_first(self):
        pool = Cluster(workers=[], restarted=True)
        pool.generations["w1"] = 1
        pool.join_worker("w1", node="n9", node_name="host")
        assert pool.told("w1", "welcome")[0][0]["name"] == "host~2-1"


class TestKill:
    def test_a_running_job_is_ended_by_its_node(self):
        pool = Cluster()
        job = pool.submit()
        token = pool.token(job)
        pool.feed("c1", ("kill", [job], "asked for"))
        assert pool.told("n1", "kill") == [([token], "asked for")]
        pool.died("w1", token)
        assert pool.outcomes() == [(job, "killed")]

    def test_a_job_that_has_not_begun_is_handed_back_and_ends(self):
        pool = Cluster()
        job = pool.submit()
        token = pool.token(job)
        pool.feed("c1", ("kill", [job], "asked for"))
        pool.feed("w1", ("recalled", [token], [token]))
        assert pool.outcomes() == [(job, "killed")]

    def test_a_job_that_began_after_the_cell_was_read_is_killed_at_the_second_try(self):
        pool = Cluster()
        job = pool.submit()
        token = pool.token(job)
        pool.feed("c1", ("kill", [job], "asked for"))
        pool.clear()
        pool.feed("w1", ("recalled", [token], []))
        pool.pass_time(0.15)
        assert pool.told("n1", "kill") == [([token], "asked for")]

    def test_a_job_that_was_over_first_keeps_its_outcome(self):
        pool = Cluster()
        job = pool.submit()
        pool.feed("c1", ("kill", [job], "asked for"))
        pool.finish(job)
        pool.clear()
        pool.pass_time(1)
        assert pool.told("n1", "kill") == []

    def test_asking_often_is_asking_once(self):
        pool = Cluster()
        job = pool.submit()
        for _ in range(3):
            pool.feed("c1", ("kill", [job, job], "asked for"))
        assert len(pool.told("n1", "kill")) == 1

    def test_a_ready_job_ends_at_once(self):
        pool = Cluster(workers=[])
        job = pool.submit()
        pool.feed("c1", ("kill", [job], "asked for"))
        assert pool.outcomes() == [(job, "killed")]

    def test_a_node_that_was_away_is_asked_when_it_returns(self):
        pool = Cluster()
        job = pool.submit()
        pool.cut("n1")
        pool.feed("c1", ("kill", [job], "asked for"))
        pool.join_node()
        pool.pass_time(0.15)
        assert pool.told("n1", "kill") == [([pool.token(job)], "asked for")]


    def test_one_that_a_worker_may_tell_to_run_waits_for_that_after_a_restart(self):
        pool = Cluster(workers=[], restarted=True)
        pool.generations["w1"] = 1
        job = pool.submit(again=True)
        pool.feed("c1", ("kill", [job], "asked for"))
        assert pool.outcomes() == []
        pool.join_worker("w1", [(7, (pool.session("c1"), job), "begun")])
        assert pool.told("n1", "kill") == [([7], "asked for")]

    def test_one_that_no_worker_told_of_after_a_restart_ends(self):
        pool = Cluster(workers=[], restarted=True)
        job = pool.submit(again=True)
        pool.feed("c1", ("kill", [job], "asked for"))
        pool.pass_time(10)
        assert pool.outcomes() == [(job, "killed")]


class TestTimeLimits:
    def test_count_from_the_beginning_of_the_job_and_end_its_process(self):
        pool = Cluster()
        job = pool.submit(job_timeout=5)
        pool.pass_time(50)
        pool.start(job)
        pool.pass_time(4.9)
        assert pool.told("n1", "kill") == []
        pool.pass_time(0.15)
        assert pool.told("n1", "kill") == [([pool.token(job)], "it ran longer than its job_timeout of 5 s")]
        pool.lose("w1")
        assert pool.outcomes() == [(job, "timed out")]

    def test_of_an_attempt_that_is_over_mean_nothing_to_the_next(self):
        pool = Cluster(workers=["w1", "w2"])
        job = pool.submit(job_timeout=5, retries=1)
        pool.start(job)
        pool.pass_time(4)
        pool.raise_in(job)
        pool.start(job)
        pool.pass_time(4)
        assert pool.told("n1", "kill") == [] and pool.state(job) == "running"

    def test_a_short_job_with_one_tells_when_it_begins(self):
        pool = Cluster()
        pool.learn_short()
        pool.submit(job_timeout=5)
        assert pool.told("w1", "run")[0][-1]["say"]

    def test_of_a_job_that_survived_a_restart_begin_anew(self):
        pool = Cluster(workers=[], clients=[], restarted=True)
        pool.generations["w1"] = 1
        pool.join_worker("w1", [(7, (pool.session("c1"), 1), "begun")])
        pool.join_client(jobs=[1])
        pool.submit(number=1, again=True, job_timeout=5)
        pool.pass_time(4.9)
        assert pool.told("n1", "kill") == []
        pool.pass_time(0.15)
        assert len(pool.told("n1", "kill")) == 1


class TestCancellingByForce:
    def test_ends_the_process_of_a_running_job(self):
        pool = Cluster()
        job = pool.submit(cancel_running=True)
        token = pool.token(job)
        pool.feed("c1", ("cancel", [job]))
        assert pool.told("n1", "kill") == [([token], "nobody wants its outcome any more")]

    def test_without_the_option_the_job_runs_to_its_end(self):
        pool = Cluster()
        job = pool.submit()
        pool.feed("c1", ("cancel", [job]))
        assert pool.told("n1", "kill") == []

    def test_is_done_for_a_client_that_forgot_the_job_while_it_was_away(self):
        pool = Cluster()
        job = pool.submit(cancel_running=True)
        token = pool.token(job)
        pool.cut("c1")
        pool.join_client(jobs=[])
        assert pool.told("n1", "kill") == [([token], "nobody wants its outcome any more")]


class TestAClientThatDoesNotRead:
    def test_brings_its_own_jobs_to_a_halt_and_nobody_elses(self):
        pool = Cluster(clients=["c1", "c2"])
        mine = pool.submit(UNACKNOWLEDGED // INLINE + 2)
        for job in mine[:-1]:
            pool.finish(job, value=bytes(INLINE))
        assert pool.state(mine[-1]) == "ready"
        other = pool.submit(client="c2")
        assert pool.state(other, "c2") == "running"
        pool.finish(other, client="c2")
        pool.feed("c1", ("delivered", [mine[0]]))
        assert pool.state(mine[-1]) == "running"


class TestAPause:
    def test_hands_out_nothing_new_while_what_runs_ends_and_is_delivered(self):
        pool = Cluster()
        first, second = pool.submit(2)
        pool.scheduler.is_paused = True
        pool.finish(first)
        assert pool.state(second) == "ready" and pool.state(first) == "delivering"
        pool.feed("c1", ("delivered", [first]))
        assert pool.state(second) == "ready" and pool.inbox("w1") == []


class TestRetirement:
    def test_a_retiring_worker_gets_nothing_new_and_goes_when_all_is_delivered(self):
        pool = Cluster()
        first, second = pool.submit(2)
        pool.feed("w1", ("retire", "enough"))
        pool.finish(first)
        assert pool.told("w1", "bye") == [] and pool.state(second) == "ready"
        pool.feed("c1", ("delivered", [first]))
        assert len(pool.told("w1", "bye")) == 1 and not pool.knows("w1")

    def test_a_worker_that_joins_while_its_node_leaves_leaves_too(self):
        pool = Cluster()
        pool.feed("n1", ("retire", "enough"))
        pool.generations["w2"] = 1
        pool.join_worker("w2")
        pool.feed("n1", ("retire", "enough"))       # at every beat
        assert pool.told("w2", "bye") != [] and not pool.knows("w2")

    def test_an_outcome_that_waits_for_its_client_is_waited_for(self):
        pool = Cluster(workers=[], clients=[], restarted=True)
        pool.generations["w1"] = 1
        pool.join_worker("w1", [(7, (pool.session("c1"), 1), "outcome")])
        pool.feed("w1", ("retire", "enough"))
        assert pool.told("w1", "bye") == [] and pool.knows("w1")


def test_the_words_of_the_states_are_in_the_story():
    pool = Cluster()
    job = pool.submit(name="train")
    assert re.search(r"'train'.*ready > running.*on host-1, attempts 1", pool.scheduler.story(pool.job(job)))


class TestTheWordThatAJobBegan:
    @pytest.mark.parametrize("options", [{}, {"on": ["host-1"], "beside": True}], ids=["job", "run"])
    def test_is_known_though_it_was_lost_with_a_connection(self, options):
        pool = Cluster()
        job = pool.submit(job_timeout=5, **options)
        pool.cut("w1")
        kind = "beside" if options else "begun"
        pool.join_worker("w1", [(pool.token(job), (pool.session("c1"), job), kind)])
        assert pool.told("c1", "began") == [(job, "host-1", 1)]
        pool.pass_time(6)
        assert bool(pool.told("n1", "kill")) == (not options)       # a run is not killed: its thread cannot be


class TestSelections:
    def test_a_tag_that_nobody_has_any_more_is_forgotten(self):
        pool = Cluster(workers=["w1"], tags={"w1": ["blue"]})
        for number in range(300):
            pool.finish(pool.submit(on=["blue", f"nobody-{number}"]))
        assert set(pool.scheduler._selections) == {None, "blue", *pool.scheduler.workers[pool.id_of("w1")].tags}
        pool.lose("w1")
        assert set(pool.scheduler._selections) <= {None}

    def test_a_worker_with_two_of_the_tags_has_each_job_once(self):
        pool = Cluster(workers=["w1"], tags={"w1": ["blue", "red"]})
        job = pool.submit(on=["blue", "red"])
        assert pool.runs() == [("w1", job, 1)]

    def test_who_joined_and_left_meanwhile_is_known(self):
        pool = Cluster(workers=["w1"], tags={"w1": ["blue"], "w2": ["blue"]})
        job = pool.submit(on=["blue"])
        pool.finish(job)
        pool.feed("c1", ("delivered", [job]))
        pool.join_worker("w2")
        pool.lose("w1")
        pool.clear()
        job = pool.submit(on=["blue"])
        assert pool.runs() == [("w2", job, 1)]


class TestRuns:
    """What runs beside a worker's jobs: at once, there or nowhere."""

    def test_a_busy_worker_is_given_a_run_at_once(self):
        pool = Cluster(workers=["w1"])
        long, run = pool.submit(), pool.submit(on=["host-1"], beside=True)
        assert pool.runs() == [("w1", long, 1), ("w1", run, 1)]
        pool.finish(run)
        assert pool.outcomes() == [(run, OK)] and pool.state(long) == "running"

    def test_a_run_takes_no_room(self):
        pool = Cluster(workers=["w1"])
        run, job = pool.submit(on=["host-1"], beside=True), pool.submit()
        assert pool.runs() == [("w1", run, 1), ("w1", job, 1)]

    def test_it_is_lost_with_its_worker_and_begins_nowhere_else(self):
        pool = Cluster(workers=["w1", "w2"])
        run = pool.submit(on=["host-1"], beside=True)
        pool.lose("w1")
        assert pool.outcomes() == [(run, DIED)]
        pool.respawn("w1")
        assert [r for r in pool.runs() if r[1] == run] == [("w1", run, 1)]      # that of before

    def test_a_worker_that_is_not_there_is_an_error_at_once(self):
        pool = Cluster(workers=["w1"])
        assert pool.outcomes() == [] and pool.submit(on=["host-7"], beside=True)
        assert [status for _, status in pool.outcomes()] == [DIED]

    def test_a_run_that_a_cut_did_not_let_through_is_sent_again(self):
        pool = Cluster(workers=["w1"])
        run = pool.submit(on=["host-1"], beside=True)
        pool.cut("w1")
        pool.join_worker("w1")
        assert [job for _, job, _ in pool.runs()] == [run, run]

    def test_a_run_that_a_worker_tells_of_is_not_made_twice(self):
        pool = Cluster(workers=["w1"])
        run = pool.submit(on=["host-1"], beside=True)
        pool.cut("w1")
        pool.join_worker("w1", attempts=[(pool.token(run), (pool.session("c1"), run), "beside")])
        assert len(pool.runs()) == 1

    def test_a_run_whose_outcome_a_new_server_adopts_is_still_one(self):
        pool = Cluster(workers=[], restarted=True)
        run = pool.submit(on=["host-1"], beside=True, again=True)
        pool.join_worker("w1", attempts=[(7, (pool.session("c1"), run), "outcome")])
        pool.died("w1")
        assert pool.outcomes() == [(run, DIED)]

    def test_a_new_server_adopts_it_beside_the_inbox(self):
        pool = Cluster(workers=[], clients=[], restarted=True)
        pool.join_worker("w1", attempts=[(7, (pool.session("c1"), 1), "beside")])
        assert pool.inbox("w1") == [] and pool.state(1) == "running"


class TestLentSlots:
    """A job that waits for others leaves its slot to them (R29)."""

    def lend(self, pool, job, worker="w1"):
        pool.feed(worker, ("slot", pool.token(job), False))

    def take_again(self, pool, job, worker="w1"):
        pool.feed(worker, ("slot", pool.token(job), True))

    def test_a_lent_slot_is_given_to_another_job_at_once(self):
        pool = Cluster(workers=["w1"])
        outer, inner = pool.submit(), pool.submit()
        assert pool.runs() == [("w1", outer, 1)]
        self.lend(pool, outer)
        assert pool.runs() == [("w1", inner, 1)] and pool.state(outer) == "running"

    def test_who_has_it_again_ends_as_ever_and_nothing_joins_it(self):
        pool = Cluster(workers=["w1"])
        outer, inner = pool.submit(), pool.submit()
        self.lend(pool, outer)
        pool.finish(inner)
        self.take_again(pool, outer)
        late = pool.submit()
        pool.clear()
        pool.finish(outer)
        assert pool.outcomes() == [(outer, OK)] and pool.runs() == [("w1", late, 1)]

    def test_what_came_meanwhile_and_has_not_begun_is_asked_back(self):
        pool = Cluster(workers=["w1", "w2"])
        outer, other = pool.submit(), pool.submit()
        self.lend(pool, outer)
        queued = pool.submit()
        self.take_again(pool, outer)
        assert pool.told("w1", "recall") == [([pool.token(outer), pool.token(queued)],)]
        pool.finish(other)
        pool.clear()
        pool.feed("w1", ("recalled", [pool.token(outer), pool.token(queued)], [pool.token(queued)]))
        assert pool.runs() == [("w2", queued, 1)]

    def test_the_word_said_twice_is_said_once(self):
        pool = Cluster(workers=["w1"])
        outer = pool.submit()
        for say in (self.lend, self.lend, self.take_again, self.take_again):
            say(pool, outer)
        pool.finish(outer)
        assert pool.outcomes() == [(outer, OK)] and pool.inbox("w1") == []

    def test_a_job_that_waits_is_charged_only_if_the_cell_shows_it(self):
        pool = Cluster(workers=["w1"])
        outer, inner = pool.submit(), pool.submit()
        self.lend(pool, outer)
        pool.died("w1", pool.token(inner))
        assert (pool.job(outer).deaths, pool.job(inner).deaths) == (0, 1)
        pool.respawn("w1")
        self.lend(pool, outer)
        pool.died("w1", pool.token(outer))
        assert (pool.job(outer).deaths, pool.job(inner).deaths) == (1, 1)

    @pytest.mark.parametrize("is_new", [False, True], ids=["the same server", "a new server"])
    def test_a_word_that_was_lost_is_made_up_for_by_the_announcement(self, is_new):
        pool = Cluster(workers=["w1"])
        outer = pool.submit()
        token = pool.token(outer)
        pool.cut("w1")
        if is_new:
            pool.start_server()
            pool.join_client("c1", [outer])
        pool.join_worker("w1", attempts=[(token, (pool.session("c1"), outer), "parked")])
        assert pool.inbox("w1") == [] and pool.state(outer) == "running"
        pool.cut("w1")
        pool.join_worker("w1", attempts=[(token, (pool.session("c1"), outer), "begun")])
        assert pool.inbox("w1") == [token]

    def test_one_that_is_not_wanted_any_more_keeps_no_slot(self):
        pool = Cluster(workers=["w1"])
        outer = pool.submit(cancel_running=True)
        token = pool.token(outer)
        self.lend(pool, outer)
        pool.feed("c1", ("cancel", [outer]))
        assert pool.told("n1", "kill") == [([token], "nobody wants its outcome any more")]
        job = pool.submit()
        assert pool.runs()[-1] == ("w1", job, 1)
        pool.end(token)
        assert pool.outcomes() == []

    def test_its_time_limit_holds_while_it_waits(self):
        pool = Cluster(workers=["w1"])
        outer = pool.submit(job_timeout=5)
        pool.start(outer)
        self.lend(pool, outer)
        pool.pass_time(6)
        assert pool.told("n1", "kill")[0][0] == [pool.token(outer)]

    def test_a_worker_that_leaves_waits_for_it_and_takes_what_it_has_submitted(self):
        pool, outer, inner = self.leaving()
        assert pool.state(pool.submit()) == "ready" and pool.told("w1", "bye") == []
        pool.finish(inner, client="c3")
        pool.feed("c3", ("delivered", [inner]))
        pool.finish(outer)
        pool.feed("c1", ("delivered", [outer]))
        assert len(pool.told("w1", "bye")) == 1

    def test_nothing_that_has_not_begun_stays_at_a_worker_that_leaves_when_it_ends(self):
        pool, outer, inner = self.leaving()
        pool.finish(outer)
        assert pool.told("w1", "recall")[-1] == ([pool.token(inner, "c3")],)

    def leaving(self):
        """Return a pool whose worker is to leave, a job that waits there, and one that this has submitted since."""
        pool = Cluster(workers=["w1"])
        outer = pool.submit()
        self.lend(pool, outer)
        pool.feed("w1", ("retire", "enough"))
        return pool, outer, self.submit_from("w1", pool)

    def submit_from(self, worker, pool):
        """Submit a job as one of that worker's does, which is the client c3."""
        inner = pool.id_of(worker) + b"jobs"
        pool.session = lambda client: inner if client == "c3" else Cluster.session(client)
        pool.join_client("c3")
        return pool.submit(client="c3")

    def test_a_job_that_takes_its_worker_down_is_charged_to_who_submitted_it_there(self):
        pool = Cluster(workers=["w1", "w2"], clients=["c1", "c2"])
        outer, bystander = pool.submit(), pool.submit()
        self.lend(pool, outer)
        killer = self.submit_from("w1", pool)
        pool.died("w1", pool.token(killer, "c3"))
        assert (pool.job(outer).deaths, pool.job(bystander).deaths) == (1, 0)
        assert pool.session("c3") not in pool.scheduler.sessions
