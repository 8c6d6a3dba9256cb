"""Random histories of a whole pool, with everything real about the scheduler and everything else a model.

    python -m tests.simulation --events 10000000        # a long run; prints seeds, stops at the first failure
    python -m tests.simulation --seed 42                # one history again, with the same failure

A World wires the pure scheduler with model clients, workers and nodes over in-order links. From one seed it draws
what happens next: a frame arrives, a job begins or ends, time passes or leaps, a link is cut at any frame, a worker
crashes, a host falls silent, the server restarts with nothing. After each event `Scheduler.check()` runs, and the
oracles here, which know what really happened. Each history ends in a tail without faults in which every job must end.

Where the invariants are checked (I1 to I20: the design's list of what must hold):

    I1 I2 I3       each job in exactly one place, at one worker     Scheduler.check
    I5 I6          an end is final, and single                      Client.end, Client.expect
    I7             only a current attempt's outcome is passed on    World.judge_done
    I8             tokens grow, over all lives of the server        World.judge_run
    I4             nobody who is dead has jobs                      World.perform
    I9             blame for what the cell showed, only             World.judge_blame
    I10            deaths and retries are bounded                   Scheduler.check, Client.expect
    I11            accepted = alive + delivered + cancelled         Scheduler.check
    I12            a quiet pool holds nothing                       World.check_quiet
    I13            no ready job beside a worker with room           Scheduler.check
    I14            a cancelled job neither runs nor ends            World.judge_run, World.judge_done
    I15            jobs belong to sessions that exist               Scheduler.check, World.check_quiet
    I16            twice is once                                    links cut anywhere repeat every announcement
    I17            a session that has less goes first               test_scheduler.py
    I18            the same events give the same actions            replay(), and two runs of one seed
    I19            time may leap                                    World.pass_time
    R14 R25        no job waits unbegun where it need not           World.judge_windows
    run            beside the inbox, on its worker or nowhere       World.judge_run
    R29            a job that waits for others takes no room        World.judge_slots
    I20            a new server finds its way back                  World.restart_server, then all of the above
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import random
import time

import minipool
from minipool import AGAIN, DIED, KILLED, OK, RAISED, T_RECALL, TIMED_OUT, UNFIT, Scheduler, State, check_message

SHORT, MEDIUM, LONG = 0.0005, 0.03, 0.4         # how long the three functions of each client take, in seconds
GOOD, FICKLE, BAD = "good", "fickle", "bad"     # log entries: work everywhere, raise on some processes, raise always
LIVE_JOBS = 30


class Link:
    """A connection: frames in order, both ways. A cut one loses some of what is in flight, and then ends."""

    def __init__(self, peer, owner):
        self.peer, self.owner = peer, owner
        self.up, self.down = collections.deque(), collections.deque()
        self.is_cut = False

    def cut(self, rng):
        if not self.is_cut:
            self.is_cut = True
            for queue in (self.up, self.down):
                for _ in range(rng.randint(0, len(queue))):
                    queue.pop()
                queue.append(None)


class Actor:
    """What dials the server: it has one link at a time, and is in once it was welcomed."""

    role = ""
    alive = True
    link = None
    is_in = False
    is_retiring = False

    def say(self, *messages):
        if self.link is not None and not self.link.is_cut and messages:
            for message in messages:
                check_message(message[:4] if message[0] == "range" else message, self.role)
            self.link.up.append(list(messages))

    def lost(self):
        self.link, self.is_in = None, False


class Record:
    """What a client knows of one of its jobs."""

    def __init__(self, number, fn, log, options):
        self.number, self.fn, self.log, self.options = number, fn, log, options
        self.end = None                     # how it ended, once
        self.kill_asked = False
        self.attempts = 0                   # as the server last said
        self.raises = 0                     # attempts that raised and asked for a retry, as really happened


class Client(Actor):
    """Holds its jobs until their outcomes are in; sends again what the server misses."""

    role = "client"

    def __init__(self, world, number, home=None):
        self.world, self.session = world, (home.id if home else b"client-") + b"%09d" % number
        self.jobs, self.numbers = {}, itertools.count(1)
        self.pending = {}                   # those without an end
        self.functions = [(self.session, i) for i in range(3)]      # number % 3 says how long it takes
        self.log = []
        self.announced, self.acks, self.pulling = set(), [], {}
        self.seen, self.names, self.broken = 0, [], False
        self.limit = world.rng.choice([None, None, None, 1, 2])
        self.uses_on = world.rng.random() < 0.5         # then its entries never raise: nobody may be left

    def announcement(self):
        self.announced, self.acks, self.pulling = set(self.pending), [], {}
        info = {"session": self.session, "name": "me", "max_workers": self.limit, "workers_seen": self.seen}
        return "client", info, sorted(self.pending)

    def hear(self, frame):
        for message in frame:
            if message[0] == "welcome":
                self.welcomed(message[1], [m[1] for m in frame if m[0] == "missing"])
            elif message[0] == "done":
                self.done(*message[1:])
            elif message[0] == "began" and message[1] in self.pending:
                self.pending[message[1]].attempts = message[3]
            elif message[0] == "workers":
                self.seen, self.names = len(message[1]), [worker["name"] for worker in message[1]]
            elif message[0] == "range":
                self.got_range(message[1], message[4])
            elif message[0] == "gone":
                self.pulling.pop(message[1], None)
            elif message[0] == "broken":
                self.broken = True
                for number in list(self.pending):
                    self.end(number, "broken")

    def welcomed(self, info, missing):
        """Send what a new server, or a cut, may have cost it: objects, log entries, then jobs."""
        self.is_in = True
        frame = [("put", name, b"x") for name in self.functions]
        frame += [("log", i, self.log[i], b"x") for i in range(info["log"], len(self.log))]
        for number in missing[0] if missing else ():
            if number in self.pending:
                frame.append(self.submission(self.pending[number], again=True))
        frame += [self.submission(record) for n, record in self.pending.items() if n not in self.announced]
        gone = [number for number in self.announced if number not in self.pending]
        killed = [number for number, record in self.pending.items() if record.kill_asked]
        self.say(*frame, ("cancel", gone), ("kill", killed, "asked for"))

    def submission(self, record, again=False):
        options = {**record.options, **({"attempts": record.attempts} if again else {})}
        return "submit", record.number, record.fn, b"%d" % record.number, record.log, options or None

    def submit(self):
        rng, options = self.world.rng, {}
        for option, value in (("priority", rng.randint(-1, 2)), ("retries", rng.randint(0, 2)),
                              ("max_deaths", rng.choice([0, 1, 3])), ("on", [rng.choice(["even", "odd"])]),
                              ("job_timeout", rng.choice([0.1, 1.0])), ("cancel_running", True)):
            if rng.random() < 0.15 and (option != "on" or self.uses_on):
                options[option] = value
        if "on" in options and rng.random() < 0.5:
            options["soft"] = True
        if self.names and rng.random() < 0.1:
            options = {"on": [rng.choice(self.names)], "beside": True}
        fn = rng.choices(self.functions, self.world.mix)[0]
        record = Record(next(self.numbers), fn, 0 if "beside" in options else len(self.log), options)
        self.jobs[record.number] = self.pending[record.number] = record
        if self.is_in:
            twice = [self.submission(record)] * (2 if rng.random() < 0.02 else 1)
            self.say(*twice)

    def add_log_entry(self):
        kind = self.world.rng.choices((GOOD, FICKLE, BAD), (80, 15, 2))[0]
        kind = GOOD if self.uses_on else kind
        name = self.session, 10**6 + len(self.log)
        self.world.entries[name] = kind
        self.log.append(name)
        if self.is_in:
            self.say(("log", len(self.log) - 1, name, b"x"))

    def replace_function(self, index):
        """Redefine a function that no job needs: the old one is dropped, a new one put."""
        old = self.functions[index]
        if self.is_in and all(record.fn != old for record in self.pending.values()):
            self.functions[index] = (self.session, old[1] + 3)
            self.acknowledge()      # first: a job whose result is not known to be here may run again
            self.say(("drop", [old]), ("put", self.functions[index], b"x"), ("ask", 1, "info"))

    def cancel(self, number):
        self.end(number, "cancelled")
        if self.is_in:
            self.say(("cancel", [number]))

    def kill(self, number):
        self.pending[number].kill_asked = True
        if self.is_in:
            self.say(("kill", [number], "asked for"))

    def done(self, number, status, value, worker, attempts):
        record = self.jobs[number]
        if record.end is not None:
            if record.end != "cancelled":
                self.acks.append(number)
        elif type(value) is tuple:
            self.pulling[value[0]] = (number, status)
            self.say(("pull", value[0], 0, value[1]))
        else:
            self.finish(record, status, value)

    def got_range(self, name, body):
        number, status = self.pulling.pop(name, (0, ""))
        if number in self.pending:
            self.finish(self.pending[number], status, body)

    def finish(self, record, status, value):
        self.expect(record, status, value)
        self.end(record.number, status)
        self.acks.append(record.number)

    def expect(self, record, status, value):
        """Only what really happened may reach the user."""
        if status in (OK, RAISED):
            said, number, _token = value.split(b":")
            assert said == status.encode() and int(number) == record.number, f"a wrong value: {value!r}"
            if status == RAISED and self.world.wanted_retry.get(value):
                assert record.raises > record.options.get("retries", 0), "not retried, though retries were left"
        elif status == DIED and "beside" in record.options:
            assert value["what"], "lost without a reason"
        elif status == DIED:
            assert value["deaths"] == record.options.get("max_deaths", 3) + 1, value
        elif status == TIMED_OUT:
            assert "job_timeout" in record.options, f"timed out without a limit: {value}"
        else:
            assert status == KILLED and record.kill_asked, f"killed unasked: {value}"

    def end(self, number, how):
        record = self.pending.pop(number)
        assert record.end is None, "a future ended twice"
        record.end = how

    def acknowledge(self):
        if self.acks and self.is_in:
            self.say(("delivered", self.acks))
            self.acks = []


class Worker(Actor):
    """One process: an ordered inbox, one running job, a cell, and outcomes kept until told to forget them."""

    role = "worker"

    def __init__(self, world, node, slot, generation):
        self.world, self.node, self.slot, self.generation = world, node, slot, generation
        self.id = node.id + b"%04d" % slot + generation.to_bytes(8, "big")
        self.inbox, self.running, self.ends_at, self.cell = [], None, 0.0, 0
        self.outcomes, self.has, self.logs, self.applied, self.unfit = {}, set(), {}, {}, {}
        self.beside = {}                    # runs that take no room
        self.parked = {}                    # jobs that wait for others, and have left their slot to them
        self.deaf_until, self.read_at, self.is_retiring, self.was_in = 0.0, world.now, False, False

    def announcement(self):
        attempts = [(run[1], run[2], "inbox") for run in self.inbox]
        attempts += [(self.running[1], self.running[2], "begun")] if self.running else []
        attempts += [(run[1], run[2], "beside") for run in self.beside.values()]
        attempts += [(run[1], run[2], "parked") for run in self.parked.values()]
        attempts += [(token, outcome[0], "outcome") for token, outcome in self.outcomes.items()]
        info = {"id": self.id, "node": self.node.id, "node_name": self.node.name, "slot": self.slot, "device": "cpu",
                "pid": 1, "tags": ["odd" if self.slot % 2 else "even"], "has": list(self.has), "returns": self.was_in,
                "positions": {session: len(log) for session, log in self.logs.items()}}
        return "worker", info, attempts

    def hear(self, frame):
        for message in frame:
            getattr(self, "on_" + message[0])(*message[1:])
        if not self.link or not self.link.down:
            self.read_at = self.world.now

    def on_welcome(self, info):
        self.is_in = self.was_in = True

    def on_bye(self, reason):
        """Leave as planned: nothing of this process is needed any more. Of a run that nobody waits for it may be."""
        jobs = [run[2] for run in self.beside.values()] + [job for job, *_ in self.outcomes.values()]
        in_hand = self.running or self.parked or any(map(self.world.is_waited_for, jobs))
        assert self.is_retiring and not in_hand, "sent away with something in hand"
        self.world.crash(self)

    def on_put(self, name, value):
        self.has.add(name)

    def on_drop(self, names):
        self.has.difference_update(names)

    def on_log(self, position, name, value):
        log = self.logs.setdefault(name[0], [])
        assert position == len(log), "a log entry out of order"
        self.has.add(name)
        log.append(name)

    def on_run(self, token, job, fn, payload, log, options):
        assert fn in self.has, "a run came before its function"
        assert len(self.logs.setdefault(job[0], [])) >= log, "a run came before the log entries it needs"
        assert not any(run[1] == token for run in self.inbox), "the same attempt twice"
        run = ("run", token, job, fn, payload, log, options or {})
        if options and options.get("beside"):
            self.beside[token] = run
        else:
            self.inbox.append(run)

    def on_forget(self, tokens):
        for token in tokens:
            self.outcomes.pop(token, None)
        self.inbox = [run for run in self.inbox if run[1] not in tokens]

    def on_resend(self, tokens):
        self.say(*[self.outcomes[token][1] for token in tokens if token in self.outcomes])

    def on_recall(self, tokens):
        taken = [run[1] for run in self.inbox if run[1] in tokens]
        self.inbox = [run for run in self.inbox if run[1] not in taken]
        self.say(("recalled", tokens, taken))

    def on_pull(self, name, offset, length):
        outcome = self.outcomes.get(name[1])
        self.say(("range", name, 0, b"", outcome[2]) if outcome else ("gone", name))

    def on_leave(self, session):
        self.has = {name for name in self.has if name[0] != session}
        for table in (self.logs, self.applied, self.unfit):
            table.pop(session, None)

    def begin(self):
        """Take the most urgent job out of the inbox, after reading the socket if that was long ago."""
        if self.world.now > self.read_at + 0.5:
            self.world.read_everything(self)
        if self.running or not self.inbox or not self.is_in:
            return
        run = min(self.inbox, key=lambda r: (-r[6].get("priority", 0), r[1]))
        self.inbox.remove(run)
        if not self.apply_log(run[2][0], run[5]):
            finished = ("finished", run[1], UNFIT, b"it raised", 0.0, False)
            self.outcomes[run[1]] = (run[2], finished, b"")
            return self.say(finished)
        self.running, self.cell = run, run[1]
        self.ends_at = self.world.now + self.seconds(run)
        self.world.begun.add(run[1])
        if run[6].get("say"):
            self.say(("started", run[1]))

    def apply_log(self, session, upto):
        log = self.logs.setdefault(session, [])
        while session not in self.unfit and self.applied.get(session, 0) < upto:
            position = self.applied.get(session, 0)
            kind = self.world.entries[log[position]]
            if kind == BAD or kind == FICKLE and (self.slot + self.generation) % 3 == 0:
                self.unfit[session] = position
            else:
                self.applied[session] = position + 1
        return session not in self.unfit or self.unfit[session] >= upto

    def seconds(self, run):
        return (SHORT, MEDIUM, LONG)[run[3][1] % 3]

    def park(self):
        """The running job waits for others; the cell shows it until another begins."""
        run, self.running = self.running, None
        self.parked[run[1]] = run
        self.say(("slot", run[1], False))

    def unpark(self):
        """What it waited for is there: it has the slot before those that have not begun."""
        _, self.running = self.parked.popitem()
        self.cell, self.ends_at = self.running[1], self.world.now + SHORT
        self.say(("slot", self.cell, True))

    def finish(self):
        """End the running job."""
        run, self.running, self.cell = self.running, None, 0
        self.conclude(run)

    def conclude(self, run):
        """End a job. Its value names the attempt, so that everybody can tell whose it is."""
        rng, (_, token, job, *_) = self.world.rng, run
        if rng.random() < 0.03:         # it wants to run again later
            self.outcomes[token] = job, ("finished", token, AGAIN, b"", self.seconds(run), False), b""
            return self.say(self.outcomes[token][1])
        status = RAISED if rng.random() < 0.15 else OK
        body = b"%s:%d:%d" % (status.encode(), job[1], token)
        retry = status == RAISED and rng.random() < 0.5
        self.world.wanted_retry[body] = retry
        client = self.world.client_of(job[0])
        if retry and client:
            client.jobs[job[1]].raises += 1
        value = ((self.id, token), len(body), "") if rng.random() < 0.1 else body
        finished = ("finished", token, status, value, self.seconds(run), retry)
        self.outcomes[token] = (job, finished, body)
        self.say(finished)


class Node(Actor):
    """A host's supervisor: it knows who died and what the cell showed, and says so until it was heard."""

    role = "node"

    def __init__(self, world, number, slots):
        self.world, self.id = world, b"node-%07d" % number
        self.name = "host"
        self.workers = [Worker(world, self, slot, 1) for slot in range(slots)]
        self.deaths = {}                    # the last of each slot
        self.frozen_until = 0.0             # nothing of this host gets through

    def announcement(self):
        return "node", {"id": self.id, "name": "host", "python": "3.11", "host": "h", "pid": 1}

    def hear(self, frame):
        for message in frame:
            if message[0] == "welcome":
                self.is_in, self.name = True, message[1]["name"]
                self.say(*self.deaths.values())
            elif message[0] == "kill":
                for token in message[1]:
                    self.kill(token)

    def kill(self, token):
        target = next((w for w in self.workers if w.alive and (w.cell == token or token in w.parked)), None)
        if target is not None:
            self.world.crash(target, token)


class World:
    """The pool, its links, its time, and what is true about it."""

    def __init__(self, seed, scheduler=Scheduler, record=False):
        self.rng = random.Random(seed)
        self.seed, self.make = seed, scheduler
        self.now, self.life = 1000.0, 0
        self.peers, self.links = itertools.count(1), {}
        self.entries, self.wanted_retry, self.begun = {}, {}, set()
        self.events, self.record, self.history = 0, record, []
        self.limited = {}                   # since when jobs with a time limit are known to run, by token
        self.crowded = {}                   # windows of several jobs, and since when they are as they are
        self.recalls = {}                   # what each worker is asked for, and since when
        self.last_token, self.tokens = 0, set()     # the largest of earlier events; those of the last one
        self.names = itertools.count(1)
        self.mix = self.rng.choice([(8, 1, 1), (1, 1, 1), (30, 1, 0), (1, 0, 2)])
        self.faults = self.rng.choice([0.0, 0.003, 0.01, 0.03])
        self.nodes = [Node(self, next(self.names), self.rng.randint(2, 3)) for _ in range(self.rng.randint(1, 2))]
        self.clients = [Client(self, next(self.names)) for _ in range(self.rng.randint(1, 3))]
        self.former = []                    # clients that left for good
        self.start_server()

    # ---- the server's shell ----

    def start_server(self):
        self.life += 1
        self.cancelled, self.told_dead = set(), set()       # as far as this server was told
        first_token = self.life << 32
        self.scheduler = self.make(self.now, first_token)
        self.last_token = max(self.last_token, first_token)
        if self.record:
            self.history.append(("start", self.now, first_token))

    def perform(self, entry, *arguments):
        """Feed the scheduler one event, do what it asks, and judge it."""
        self.events += 1
        before = {(s.id, n): (job.token, job.deaths, job.state, job.delivering)
                  for s in self.scheduler.sessions.values() for n, job in s.jobs.items()}
        oldest = {next(iter(w.inbox), 0) for w in self.scheduler.workers.values()}
        ancestors = {token for w in self.scheduler.workers.values() for token in w.beside
                     if any(job and job.session.id.startswith(w.id) for job in [*w.inbox.values(), *w.beside.values()])}
        actions = getattr(self.scheduler, entry)(*arguments, self.now)
        self.scheduler.check()
        self.judge_blame(before, oldest, ancestors, arguments[1] if len(arguments) > 1 else [])
        self.judge_windows(entry)
        self.judge_limits(entry)
        if entry == "receive":
            self.judge_slots(*arguments)
        assert not self.told_dead & set(self.scheduler.workers), "a worker that its node buried is in the pool"
        if self.record:
            self.history.append((entry, *arguments, self.now, actions))
        self.last_token = max(self.tokens, default=self.last_token)
        self.tokens.clear()
        for peer, messages in actions.sends.items():
            self.judge(peer, messages)
            link = self.links.get(peer)
            if link is not None and not link.is_cut:
                link.down.append(messages)
        for peer in actions.closes:
            if peer in self.links and not self.links[peer].is_cut:
                self.links[peer].is_cut = True
                self.links[peer].down.append(None)
                self.links[peer].up.append(None)

    def judge(self, peer, messages):
        owner = self.links[peer].owner if peer in self.links else None
        for message in messages:
            check_message(message[:4] if message[0] == "range" else message, "server")
            if message[0] == "run":
                self.judge_run(message)
            elif message[0] == "done" and owner is not None:
                self.judge_done(owner, *message[1:4])

    def judge_run(self, message):
        token, name = message[1:3]
        assert token > self.last_token and token not in self.tokens, "a token was used before"
        self.tokens.add(token)
        assert name not in self.cancelled, "a cancelled job was handed out"
        job = self.find(name)
        if job is not None and job.beside:
            assert job.worker.name in job.on and job.token in job.worker.beside, "a run takes room"
        session = self.scheduler.sessions.get(name[0])
        if session is not None and session.limit is not None and self.life == 1:
            assert len(session.workers) <= session.limit, "more workers than the session may use"

    def find(self, name):
        session = self.scheduler.sessions.get(name[0])
        return session.jobs.get(name[1]) if session else None

    def judge_done(self, client, number, status, value):
        name = client.session, number
        assert name not in self.cancelled, "the outcome of a cancelled job"
        if status in (OK, RAISED):
            token = value[0][1] if type(value) is tuple else int(value.split(b":")[2])
            job = self.find(name)
            assert job is None or job.token == token, "the outcome of a stale attempt"

    def judge_blame(self, before, oldest, ancestors, messages):
        """A charge needs a death: of the worker whose cell showed the attempt, or of one that nobody could read.

        Or the worker died of a job that those who wait there have submitted.
        """
        shown = {m[2] for m in messages if type(m) is tuple and m[0] == "died"} if type(messages) is list else set()
        for session in self.scheduler.sessions.values():
            for number, job in session.jobs.items():
                token, deaths, state, delivering = before.get((session.id, number), (0, 0, "", False))
                if job.deaths != deaths:
                    if state in ("", State.WAITING) or job.deaths < deaths:
                        continue        # its client has just said how often it may die, or begin
                    assert job.deaths == deaths + 1 and state == State.RUNNING, "charged wrongly"
                    if not job.max_deaths and (delivering or token in self.begun):
                        continue        # at most once: the end of its worker is the end of what has begun
                    assert not delivering, "charged wrongly"
                    is_guilty = token in shown or token in ancestors or not shown and token in oldest
                    assert is_guilty, "an innocent job was charged"
                    assert token in self.begun or not shown, "charged, and had not begun"
                elif token in shown and state == State.RUNNING and not delivering:
                    worker_is_known = job.worker is not None and job.token == token
                    assert worker_is_known and job.state == State.RUNNING, "a guilty job was not charged"

    def judge_windows(self, entry):
        """A window that does not move is recalled, and a recall is not waited for beyond its time."""
        crowded = {}
        for worker in self.scheduler.workers.values():
            if len(worker.inbox) > 1 and worker.peer is not None and not worker.recalled:
                key = worker.id, tuple(worker.inbox)
                crowded[key] = self.crowded.get(key, self.now)
                assert entry != "tick" or self.now <= crowded[key] + 0.2, "jobs wait behind one that is not short"
            waits = worker.peer is not None and any(job and not job.beside for job in worker.beside.values())
            if waits and not (worker.inbox or worker.recalled or worker.node.is_suspect):
                assert worker in self.scheduler._selections[None].idle, "what a job waits for may have to run there"
            if worker in self.scheduler._leaving and worker.peer is not None and not (waits or worker.recalled):
                assert all(job is None or job.begun for job in worker.inbox.values()), "it may never begin there"
            asked, since = self.recalls.get(worker.id, ([], 0.0))
            if worker.recalled is not asked:
                self.recalls[worker.id] = worker.recalled, self.now
            elif worker.recalled and entry == "tick" and self.now >= since + T_RECALL:
                waiting = [worker.inbox.get(token) for token in worker.recalled[1:]]
                unbegun = [job for job in waiting if job and job.state == State.RUNNING and not job.begun]
                assert not unbegun, "a recall is waited for"
        self.crowded = crowded

    def judge_slots(self, peer, messages):
        """Who says that it has left its slot, or has it again, is believed at once."""
        worker = self.scheduler._peers.get(peer)
        for token, held in {m[1]: m[2] for m in messages if m[0] == "slot"}.items() if worker else ():
            if token in worker.inbox or token in worker.beside:
                assert (token in worker.inbox) == held, "a job that waits for others takes room"

    def judge_limits(self, entry):
        """A job that is known to run has its end asked for when its time is over."""
        begun = {job.token: job for worker in self.scheduler.workers.values() for job in worker.inbox.values()
                 if job and job.begun and job.job_timeout is not None and job.state == State.RUNNING}
        self.limited = {token: self.limited.get(token, self.now) for token in begun}
        for token, since in self.limited.items():
            in_time = self.now < since + begun[token].job_timeout + 1e-6
            assert entry != "tick" or in_time or begun[token].killed, "a job runs on after its time"

    # ---- links ----

    def actors(self):
        for node in self.nodes:
            yield node
            yield from node.workers
        yield from self.clients

    def client_of(self, session):
        return next((c for c in [*self.clients, *self.former] if c.session == session), None)

    def is_waited_for(self, job):
        client = self.client_of(job[0])
        return client is not None and client.alive and job[1] in client.pending

    def is_frozen(self, actor):
        return getattr(getattr(actor, "node", actor), "frozen_until", 0.0) > self.now

    def dial(self, actor):
        link = actor.link = Link(next(self.peers), actor)
        self.links[link.peer] = link
        outcomes = [outcome[1] for outcome in getattr(actor, "outcomes", {}).values()]
        actor.say(actor.announcement(), *outcomes, *([("retire", "enough")] if actor.is_retiring else []))

    def deliver_up(self, link):
        frame = link.up.popleft()
        if frame is None:
            del self.links[link.peer]
            self.perform("disconnected", link.peer)
        else:
            self.note(link, frame)
            self.perform("receive", link.peer, frame)

    def note(self, link, frame):
        """Remember what the server is about to be told, if it still listens to this connection."""
        for message in frame if self.scheduler._peers.get(link.peer) else ():
            if message[0] == "cancel":
                self.cancelled.update((link.owner.session, number) for number in message[1])
            elif message[0] == "died":
                self.told_dead.add(message[1])

    def deliver_down(self, link):
        frame = link.down.popleft()
        if link.owner.link is not link or not link.owner.alive:
            return
        if frame is None:
            link.owner.lost()
        else:
            link.owner.hear(frame)

    def read_everything(self, actor):
        while actor.link is not None and actor.link.down and actor.alive:
            self.deliver_down(actor.link)

    def waiting(self):
        """The ends of links at which something can arrive now."""
        found = []
        for link in self.links.values():
            if not self.is_frozen(link.owner) or link.is_cut:
                if link.up:
                    found.append((self.deliver_up, link))
        for actor in self.actors():
            if actor.link is not None and actor.link.down and not self.is_frozen(actor):
                if getattr(actor, "deaf_until", 0.0) <= self.now:
                    found.append((self.deliver_down, actor.link))
        return found

    # ---- what can happen ----

    def step(self):
        roll, rng = self.rng.random(), self.rng
        if rng.random() < self.faults:
            return self.fault()
        if roll < 0.5:
            ends = self.waiting()
            if ends:
                deliver, link = rng.choice(ends)
                return deliver(link)
        if roll < 0.72:
            return self.worker_acts(rng.choice(rng.choice(self.nodes).workers))
        if roll < 0.88:
            return self.client_acts(rng.choice(self.clients))
        if roll < 0.97:
            return self.pass_time(rng.choice((0.0002, 0.001, 0.01, 0.05, 0.3)))
        self.somebody_dials()

    def somebody_dials(self):
        absent = [a for a in self.actors() if a.link is None and a.alive]
        dead = [w for node in self.nodes for w in node.workers if not w.alive]
        if dead and self.rng.random() < 0.5:
            self.respawn(self.rng.choice(dead))
        elif absent:
            self.dial(self.rng.choice(absent))

    def worker_acts(self, worker):
        if worker.alive and worker.beside:
            worker.conclude(worker.beside.popitem()[1])
        if worker.alive and worker.running:
            if worker.ends_at <= self.now:
                worker.finish()
            elif self.rng.random() < 0.05:
                worker.park()
        elif worker.alive and worker.parked and self.rng.random() < 0.5:
            if self.rng.random() < 0.1:     # it left its slot for good
                return worker.conclude(worker.parked.popitem()[1])
            worker.unpark()
        elif worker.alive and worker.is_in:
            worker.begin()

    def client_acts(self, client):
        rng, roll = self.rng, self.rng.random()
        if client.broken:
            return
        if roll < 0.45:
            for _ in range(rng.choice((1, 1, 1, 8))):
                if len(client.pending) < LIVE_JOBS // len(self.clients):
                    client.submit()
        elif roll < 0.85:
            client.acknowledge()
        elif roll < 0.94 and client.pending and self.faults:
            number = rng.choice(list(client.pending))
            (client.kill if roll < 0.88 else client.cancel)(number)
        elif roll > 0.99 and roll < 0.995:
            client.replace_function(rng.randrange(3))
        elif roll >= 0.995 and len(client.log) < 6:
            client.add_log_entry()

    def pass_time(self, seconds):
        """Let time pass; the server's ticker wakes at each deadline, or late."""
        end = self.now + seconds
        while (deadline := self.scheduler.deadline) <= end and seconds < 100:
            self.now = max(self.now, deadline)
            self.perform("tick")
            self.beats()
        self.now = end
        self.perform("tick")
        self.beats()

    def beats(self):
        for node in self.nodes:
            if node.is_in and not self.is_frozen(node) and self.now >= getattr(node, "beat_at", 0.0) + 1.0:
                node.beat_at = self.now
                node.say(("beat",))
                while node.link and node.link.up and not node.link.is_cut:
                    self.deliver_up(node.link)

    # ---- faults ----

    def fault(self):
        kind = self.rng.choices(("cut", "crash", "deaf", "freeze", "leap", "restart", "host", "client", "retire",
                                 "stillborn", "wait"), (30, 15, 15, 7, 3, 4, 2, 2, 2, 4, 6))[0]
        getattr(self, "fault_" + kind)()

    def fault_cut(self):
        links = [link for link in self.links.values() if not link.is_cut]
        if links:
            self.rng.choice(links).cut(self.rng)

    def fault_crash(self):
        workers = [w for node in self.nodes for w in node.workers if w.alive]
        busy = [w for w in workers if w.running]
        if workers:
            self.crash(self.rng.choice(busy or workers))

    def fault_stillborn(self):
        """A process dies right after it announced itself."""
        absent = [w for node in self.nodes for w in node.workers if w.alive and w.link is None]
        if absent:
            worker = self.rng.choice(absent)
            self.dial(worker)
            self.crash(worker)

    def fault_deaf(self):
        worker = self.rng.choice(self.rng.choice(self.nodes).workers)
        worker.deaf_until = self.now + self.rng.choice((0.1, 1.5, 4.0))
        self.pass_time(self.rng.choice((0.0, 0.1, 1.2)))

    def fault_retire(self):
        node = self.rng.choice(self.nodes)
        leaving = node.workers if self.rng.random() < 0.3 else [self.rng.choice(node.workers)]
        for worker in leaving:
            worker.is_retiring = True
            worker.say(("retire", "enough"))

    def fault_freeze(self):
        self.rng.choice(self.nodes).frozen_until = self.now + self.rng.choice((2.0, 10.0, 20.0))
        self.pass_time(self.rng.choice((1.0, 16.0)))

    def fault_leap(self):
        self.pass_time(self.rng.choice((3.5, 20.0, 61.0, 1000.0)))

    def fault_wait(self):
        self.pass_time(self.rng.choice((1.0, 3.0, 3.5, 10.0)))

    def fault_restart(self):
        for link in list(self.links.values()):
            link.cut(self.rng)
            link.up.clear()
            del self.links[link.peer]
        self.start_server()

    def fault_host(self):
        """A host is gone without a word, and comes back as another."""
        index = self.rng.randrange(len(self.nodes))
        node = self.nodes[index]
        for actor in (node, *node.workers):
            actor.alive = False
            self.end_clients_of(actor)
            if actor.link is not None:
                actor.link.cut(self.rng)
        self.nodes[index] = Node(self, next(self.names), len(node.workers))

    def fault_client(self):
        """A client leaves for good, with or without a word; another one comes."""
        index = self.rng.randrange(len(self.clients))
        self.leave(index, says_so=self.rng.random() < 0.5)

    def leave(self, index, says_so=False):
        client = self.clients[index]
        if client.is_in and says_so:
            client.say(("bye", "done"))
        elif client.link is not None:
            client.link.cut(self.rng)
        client.alive = False
        self.former.append(client)
        homes = [w for node in self.nodes for w in node.workers if w.alive and w.is_in]
        home = self.rng.choice(homes) if homes and self.rng.random() < 0.3 else None
        self.clients[index] = Client(self, next(self.names), home)

    def crash(self, worker, aimed=0):
        """A process ends. Its connection loses what it loses; its node sees the cell, or knows for which job it is."""
        worker.alive = False
        if worker.link is not None:
            worker.link.cut(self.rng)
        self.end_clients_of(worker)
        died = ("died", worker.id, aimed or worker.cell, {"what": "signal 9"})
        worker.node.deaths[worker.slot] = died
        worker.node.say(died) if worker.node.is_in else None

    def end_clients_of(self, worker):
        """What the jobs of a process have opened ends with it."""
        for index, client in enumerate(self.clients):
            if client.session.startswith(worker.id):
                self.leave(index)

    def respawn(self, worker):
        worker.node.workers[worker.slot] = Worker(self, worker.node, worker.slot, worker.generation + 1)

    # ---- histories ----

    def run(self, steps):
        """Let `steps` things happen, then a tail without faults in which every job must end."""
        for actor in self.actors():
            if self.rng.random() < 0.8:
                self.dial(actor)
        for _ in range(steps):
            self.step()
        self.tail()
        return self

    def tail(self):
        self.faults = 0.0
        until = self.now + 400.0
        for node in self.nodes:
            node.frozen_until = 0.0
            for worker in node.workers:
                worker.deaf_until = 0.0
        while any(client.pending for client in self.clients):
            self.settle()
            assert self.now < until, f"jobs that never end: {self.stuck()}"
        until = self.now + 70.0             # a lease and some
        while self.now < until:
            self.settle()
            self.pass_time(5.0)
        self.settle()
        self.check_quiet()

    def settle(self):
        """Everybody does all that can be done now; then time passes to the next thing that waits for it."""
        for worker in [w for node in self.nodes for w in node.workers if not w.alive]:
            self.respawn(worker)
        for actor in list(self.actors()):
            if actor.link is None:
                self.dial(actor)
        while ends := self.waiting():
            deliver, link = self.rng.choice(ends)
            deliver(link)
        for node in self.nodes:
            for worker in node.workers:
                self.worker_acts(worker)
        for client in self.clients:
            client.acknowledge()
        if not self.waiting():
            ends = [w.ends_at for node in self.nodes for w in node.workers if w.running]
            self.pass_time(max(0.0, min([self.scheduler.deadline, self.now + 1.0, *ends]) - self.now) + 1e-4)

    def stuck(self):
        return [self.scheduler.story(job) for client in self.clients for number in client.pending
                if (job := self.find((client.session, number)))] or "the server knows none of them"

    def check_quiet(self):
        """Nothing to do: then nobody holds anything any more."""
        for session in self.scheduler.sessions.values():
            assert not session.jobs and not session.load and not session.workers, "a quiet session holds jobs"
        gone = {client.session for client in self.former}
        assert not gone & set(self.scheduler.sessions), "a session outlived its lease"
        assert not self.scheduler._queues, "queues outlived their jobs"
        for worker in self.scheduler.workers.values():
            assert not worker.inbox and not worker.beside and not worker.delivering, f"{worker.name} seems busy"
        living = [w for node in self.nodes for w in node.workers]
        assert {w.id for w in living} == set(self.scheduler.workers), "the server knows other workers than live"
        for worker in living:
            kept = worker.inbox or worker.beside or worker.parked or worker.outcomes
            assert not kept, "a worker keeps what nobody wants"
            assert not gone & set(worker.logs), "a worker keeps the globals of a session that is gone"


def run(seed, scheduler=Scheduler, steps=1200, record=False):
    """Run one history; a failure names its seed."""
    world = World(seed, scheduler, record)
    try:
        return world.run(steps)
    except Exception as error:
        error.add_note(f"seed {seed}, after {world.events} events: python -m tests.simulation --seed {seed}")
        raise


def replay(history, scheduler=Scheduler):
    """Feed a recorded history to a new scheduler; the actions must be the same."""
    for event in history:
        if event[0] == "start":
            machine = scheduler(*event[1:])
        else:
            entry, *arguments, actions = event
            assert getattr(machine, entry)(*arguments) == actions, "the same events gave other actions"


def first_seed(given=None):
    """The seed to begin with: given, or MINIPOOL_SEED, or a new one."""
    if given is not None:
        return given
    return int(os.environ.get("MINIPOOL_SEED") or random.SystemRandom().randrange(10**9))


def main():
    parser = argparse.ArgumentParser(description="Run random histories of a pool against the scheduler.")
    parser.add_argument("--seed", type=int, help="where to begin; alone: this one history")
    parser.add_argument("--events", type=int, default=0, help="how many events in all")
    parser.add_argument("--steps", type=int, default=1200, help="per history, before its tail")
    options = parser.parse_args()
    seed, events, began = first_seed(options.seed), 0, time.perf_counter()
    first = seed
    while True:
        events += run(seed, steps=options.steps).events
        seed += 1
        if events >= options.events:
            break
    rate = events / (time.perf_counter() - began)
    print(f"minipool {minipool.__version__}: seeds {first} to {seed - 1}, {events:,} events, {rate:,.0f} events/s")


if __name__ == "__main__":
    main()
