"""A pool without processes: drives the pure scheduler by hand, and speaks the words of a pool's user.

    pool = Cluster(workers=["w1", "w2"])        # nodes, workers and one client have joined, all over connections
    job = pool.submit(retries=1)                # numbers of jobs count from 1
    pool.runs()                                 # [("w1", job, 1)]: who was told to run what, at which attempt
    pool.finish(job)                            # its worker says so; the client is sent the outcome
    pool.lose("w1")                             # its node says that it died; the cell showed its oldest job
    pool.pass_time(60)                          # tick at each deadline

Each call feeds one event, keeps what the scheduler sends under the name of whom it is sent to, and runs `check()`.
"""

from __future__ import annotations

import collections
import itertools

from minipool import OK, RAISED, T_DEAD, UNFIT, Scheduler, check_message


class Cluster:
    """One scheduler and all its peers. Workers are named by the test, "w1"; clients too, and "c1" is the default."""

    def __init__(self, workers=("w1",), clients=("c1",), *, tags=None, limit=None, restarted=False, dead_after=T_DEAD):
        self.now, self.lives = 100.0, 0
        self.peers, self.sent, self.connections = itertools.count(1), {}, {}
        self.generations = collections.defaultdict(lambda: 1)
        self.tags, self.limit, self.dead_after = tags or {}, limit, dead_after
        self.attempts = {}              # token: (worker, client, job), of all runs ever sent
        self.numbers = itertools.count(1)
        self.start_server(adopting=restarted)
        for name in clients:
            self.join_client(name)
        self.join_node()
        for name in workers:
            self.join_worker(name)
        self.clear()

    # ---- the server ----

    def start_server(self, adopting=True):
        self.lives += 1
        self.connections, self.sent = {}, {}
        self.scheduler = Scheduler(self.now, self.lives * 1_000_000, dead_after=self.dead_after)
        if not adopting:
            self.scheduler._end_adoption(True, self.now)

    def feed(self, who, *messages):
        """Let `who` say these messages over its connection."""
        for message in messages:
            check_message(message[:4] if message[0] == "range" else message, self.role(who))
        self.perform(self.scheduler.receive(self.connections[who], list(messages), self.now))

    def perform(self, actions):
        names = {peer: who for who, peer in self.connections.items()}
        for peer, messages in actions.sends.items():
            for message in messages:
                check_message(message[:4] if message[0] == "range" else message, "server")
                self.sent.setdefault(names.get(peer), []).append(message)
                if message[0] == "run":
                    self.attempts[message[1]] = (names.get(peer), *message[2])
        for peer in actions.closes:
            if peer in names:
                self.connections.pop(names[peer], None)
        self.scheduler.check()

    def pass_time(self, seconds, beating=True):
        """Tick at each deadline on the way, as the server does; nodes beat their hearts."""
        end = self.now + seconds
        while (deadline := self.scheduler.deadline) <= end:
            self.now = max(self.now, deadline)
            self.tick()
            if beating:
                for node in [who for who in self.connections if self.role(who) == "node"]:
                    self.feed(node, ("beat",))
        self.now = end
        self.tick()

    def tick(self):
        self.perform(self.scheduler.tick(self.now))

    # ---- joining and leaving ----

    @staticmethod
    def role(who):
        return {"c": "client", "n": "node", "w": "worker"}[who[0]]

    @staticmethod
    def session(client):
        return client.encode().ljust(16, b".")

    def id_of(self, worker):
        return worker.encode().ljust(16, b".") + self.generations[worker].to_bytes(4, "big")

    def connect(self, who, message):
        self.connections[who] = next(self.peers)
        self.feed(who, message)

    def join_client(self, name="c1", jobs=(), seen=0):
        info = {"session": self.session(name), "name": name, "max_workers": self.limit, "workers_seen": seen}
        self.connect(name, ("client", info, list(jobs)))

    def join_node(self, name="n1", called="host"):
        self.connect(name, ("node", {"id": name.encode(), "name": called, "python": "3.11", "host": "h", "pid": 1}))

    def join_worker(self, name, attempts=(), node="n1", **info):
        info = {"id": self.id_of(name), "node": node.encode(), "node_name": "host", "slot": int(name[1:]), "pid": 7,
                "device": "cpu", "tags": self.tags.get(name, []), "has": [], "positions": {}, "returns": True, **info}
        self.connect(name, ("worker", info, list(attempts)))

    def cut(self, who):
        """Close a connection; nothing else has happened."""
        self.perform(self.scheduler.disconnected(self.connections.pop(who), self.now))

    def died(self, worker, token=0, node="n1"):
        self.feed(node, ("died", self.id_of(worker), token, {"what": "signal 9"}))

    def lose(self, worker):
        """A worker dies; its cell showed the oldest job that it had."""
        tokens = [t for t in self.inbox(worker) if t]
        self.died(worker, min(tokens, default=0))

    def respawn(self, worker):
        self.generations[worker] += 1
        self.join_worker(worker)

    # ---- jobs ----

    def submit(self, count=1, client="c1", fn=1, again=False, number=None, log=0, **options):
        """Submit jobs in one frame; return the number of the one, or a list of numbers."""
        numbers = [number or next(self.numbers) for _ in range(count)]
        options = {**({"attempts": 0} if again else {}), **options} or None
        self.feed(client, ("put", (self.session(client), fn), b"f"), *[
            ("submit", n, (self.session(client), fn), b"arguments", log, options) for n in numbers])
        return numbers[0] if count == 1 else numbers

    def token(self, job, client="c1"):
        return self.job(job, client).token

    def job(self, job, client="c1"):
        return self.scheduler.sessions[self.session(client)].jobs[job]

    def state(self, job, client="c1"):
        """The state's name; "delivering" when only the client's word is missing, "forgotten" when all is done."""
        session = self.scheduler.sessions.get(self.session(client))
        found = session.jobs.get(job) if session else None
        return "forgotten" if found is None else "delivering" if found.delivering else found.state

    def start(self, job, client="c1"):
        token = self.token(job, client)
        self.feed(self.attempts[token][0], ("started", token))

    def finish(self, job, status=OK, value=b"value", seconds=1.0, retry=False, client="c1"):
        self.end(self.token(job, client), status, value, seconds, retry)

    def end(self, token, status=OK, value=b"value", seconds=1.0, retry=False):
        self.feed(self.attempts[token][0], ("finished", token, status, value, seconds, retry))

    def raise_in(self, job, retry=True):
        self.finish(job, RAISED, b"exception", retry=retry)

    def learn_short(self, jobs=4, client="c1", fn=1):
        """Run some jobs of a function that end within a millisecond, so that its windows open."""
        for _ in range(jobs):
            job = self.submit(client=client, fn=fn)
            self.finish(job, seconds=0.001, client=client)
            self.feed(client, ("delivered", [job]))
        self.clear()

    def log_entry(self, position, client="c1"):
        name = (self.session(client), 1000 + position)
        self.feed(client, ("log", position, name, b"x"))

    def unfit(self, worker, jobs, client="c1"):
        self.feed(worker, *[("finished", self.token(job, client), UNFIT, b"it raised", 0.0, False) for job in jobs])

    # ---- looking ----

    def inbox(self, worker):
        return list(self.scheduler.workers[self.id_of(worker)].inbox)

    def knows(self, worker):
        return self.id_of(worker) in self.scheduler.workers

    def clear(self):
        self.sent = {}

    def told(self, who, kind):
        """Take what was sent to `who` of this kind, as tuples without the kind."""
        all_of_it = self.sent.get(who, [])
        self.sent[who] = [m for m in all_of_it if m[0] != kind]
        return [m[1:] for m in all_of_it if m[0] == kind]

    def runs(self):
        """Take the runs sent since the last look: (worker, job, attempt)."""
        found = []
        for who in list(self.sent):
            found += [(token, who, job[1], (options or {}).get("attempt", 1))
                      for token, job, _fn, _payload, _log, options in self.told(who, "run")]
        return [run[1:] for run in sorted(found)]

    def outcomes(self, client="c1"):
        """Take the outcomes sent to a client: (job, status)."""
        return [(number, status) for number, status, *_ in self.told(client, "done")]
