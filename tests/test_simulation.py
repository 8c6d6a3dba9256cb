"""Random histories of a pool, checked after each event; and proof that the checks would notice a bug.

MINIPOOL_SEED=n repeats a run; `python -m tests.simulation --events 10000000` is a long one.
"""

import itertools

import pytest

from minipool import Scheduler, Session, State
from tests.simulation import World, first_seed, replay, run

ORDINARY = 50_000           # events of an ordinary run: some ten seconds
ENOUGH = 150_000            # events within which each planted bug must be noticed


def test_every_job_ends_once_and_rightly_whatever_happens():
    seed = first_seed()
    print(f"MINIPOOL_SEED={seed}")
    events, histories = 0, itertools.count(seed)
    while events < ORDINARY:
        events += run(next(histories)).events


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hundreds_of_histories_end_well():
    seed = first_seed()
    print(f"MINIPOOL_SEED={seed}")
    for history in range(400):
        run(seed + history, steps=600)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_gives_the_same_history(seed):
    assert run(seed, record=True).history == run(seed, record=True).history


@pytest.mark.parametrize("seed", range(5, 15))
def test_the_same_events_give_the_same_actions(seed):
    replay(run(seed, record=True).history)


# ---- planted bugs: each must be noticed, or the simulation proves nothing ----


class NoFence(Scheduler):
    """Takes the outcome of any attempt that a job ever had."""

    def _assign(self, job, worker, now):
        super()._assign(job, worker, now)
        vars(self).setdefault("ever", {})[job.token] = job

    def _finished(self, worker, now, token, status, value, seconds, retry):
        super()._finished(worker, now, token, status, value, seconds, retry)
        job = vars(self).get("ever", {}).get(token)
        if job is not None and job.token != token:
            self._send(job.session.peer, ("done", job.number, status, value, worker.name, job.attempts))


class RunsTakeRoom(Scheduler):
    """Lets what is to run beside a job wait for its end."""

    def _place(self, job, worker, token):
        job.beside, beside = False, job.beside
        super()._place(job, worker, token)
        job.beside = beside


class RunsElsewhere(Scheduler):
    """Begins a run on another worker when its own is lost."""

    def _put_back(self, job, now, charged=False, cause=None):
        if job.beside and self.workers:
            job.on, job.worker = frozenset([next(iter(self.workers.values())).name, *job.on]), None
        super()._put_back(job, now, charged, cause)


class KeepsTheSlotOfWhoWaits(Scheduler):
    """Lets the jobs that another one waits for wait for that one."""

    def _slot(self, worker, now, token, held):
        pass


class AdoptsWhoWaitsAsARun(Scheduler):
    """Takes a job that waited for others while the server was away for a run, which is lost with its worker."""

    def _reconcile(self, worker, listed, now):
        listed = {token: (name, kind.replace("parked", "beside")) for token, (name, kind) in listed.items()}
        super()._reconcile(worker, listed, now)


class BlamesAll(Scheduler):
    """Charges all that a dead worker had."""

    def _put_back(self, job, now, charged=False, cause=None):
        super()._put_back(job, now, cause is not None, cause)


class BlamesNobody(Scheduler):
    def _put_back(self, job, now, charged=False, cause=None):
        super()._put_back(job, now, False, cause)


class BlamesTheOldest(Scheduler):
    """Does not look at what the cell showed."""

    def _died(self, node, now, worker_id, token, cause):
        worker = self.workers.get(worker_id)
        super()._died(node, now, worker_id, next(iter(worker.inbox), 0) if worker else 0, cause)


class KeepsSessionsForEver(Scheduler):
    def _give_up(self, member, now):
        if not isinstance(member, Session):
            super()._give_up(member, now)


class QueuesTheFinishedAgain(Scheduler):
    """Runs a job again whose client takes longer than no time to say that it has the outcome."""

    def _started(self, worker, now, token):
        super()._started(worker, now, token)
        for job in list(worker.delivering.values()):
            self._unassign(worker, job.token)
            self._put_back(job, now)


class ForgetsTheAnswerToARecall(Scheduler):
    def _recalled(self, worker, now, asked, taken):
        worker.recalled = []
        self._refresh(worker)


class WaitsForTheAnswerToARecall(Scheduler):
    def _despair_of_recall(self, worker, now, asked):
        pass


class IgnoresWhatIsUnlisted(Scheduler):
    """Believes that a worker still has what it does not announce."""

    def _reconcile(self, worker, listed, now):
        for token, job in worker.inbox.items():
            if job is not None:
                listed.setdefault(token, ((job.session.id, job.number), "begun"))
        super()._reconcile(worker, listed, now)


class AcknowledgesTooEarly(Scheduler):
    """Lets the worker forget an outcome that is still on its way to the client."""

    def _finished(self, worker, now, token, status, value, seconds, retry):
        super()._finished(worker, now, token, status, value, seconds, retry)
        if token in worker.delivering:
            self._forget(worker, token)


class NeverClosesAWindow(Scheduler):
    def _watch_window(self, worker, now):
        worker.watched = False


class BelievesTheDead(Scheduler):
    """Admits the announcement of a process after its node said that it died."""

    def _worker(self, peer, now, info, attempts):
        self._dead.clear()
        super()._worker(peer, now, info, attempts)


class RunsTheCancelled(Scheduler):
    def _cancel(self, session, now, numbers):
        super()._cancel(session, now, [n for n in numbers if n not in session.jobs
                                       or session.jobs[n].state != State.READY])


class SendsNoLog(Scheduler):
    """Forgets that a late worker needs what the others were sent before."""

    def _assign(self, job, worker, now):
        worker.positions.setdefault(job.session.id, len(job.session.log))
        super()._assign(job, worker, now)


class ReusesTokens(Scheduler):
    """Counts attempts from one again in each life of the server."""

    def __init__(self, now, first_token, **options):
        super().__init__(now, 0, **options)


class ForgetsTheTimeLimit(Scheduler):
    def _time_out(self, job, now, token):
        pass


class BlamesSomebodyForAnIdleDeath(Scheduler):
    """Takes "nothing ran" for "nobody could look"."""

    def _died(self, node, now, worker_id, token, cause):
        super()._died(node, now, worker_id, token or None, cause)


PLANTED = [NoFence, RunsTakeRoom, RunsElsewhere, KeepsTheSlotOfWhoWaits, AdoptsWhoWaitsAsARun,
           BlamesAll, BlamesNobody, BlamesTheOldest, KeepsSessionsForEver, QueuesTheFinishedAgain,
           ForgetsTheAnswerToARecall, WaitsForTheAnswerToARecall, IgnoresWhatIsUnlisted,
           AcknowledgesTooEarly, NeverClosesAWindow, BelievesTheDead, RunsTheCancelled, SendsNoLog, ReusesTokens,
           ForgetsTheTimeLimit, BlamesSomebodyForAnIdleDeath]


@pytest.mark.parametrize("scheduler", PLANTED, ids=lambda scheduler: scheduler.__name__)
def test_a_planted_bug_replaces_what_is_there(scheduler):
    steps = {name for name in vars(scheduler) if not name.startswith("__")}
    assert steps <= set(dir(Scheduler)), "it changes nothing: it proves nothing"


def events_until_noticed(scheduler):
    events = 0
    for seed in itertools.count():
        world = World(seed, scheduler)
        try:
            world.run(1200)
        except AssertionError:      # an error of another type would be one of the planted bug's own
            return events + world.events
        events += world.events
        assert events < ENOUGH, f"{scheduler.__name__} went unnoticed"


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", PLANTED, ids=lambda scheduler: scheduler.__name__)
def test_a_planted_bug_is_noticed(scheduler):
    assert events_until_noticed(scheduler) < ENOUGH
