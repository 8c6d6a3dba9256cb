# /// script
# requires-python = ">=3.11"
# dependencies = ["cloudpickle>=3", "nvidia-ml-py>=12", "numpy>=1.26"]
# ///
"""Reinforcement learning in the shape of GRPO: a policy group and a generation group on the same four workers.

    pip install numpy
    python examples/grpo_group.py             # on this machine; a cluster: set MINIPOOL_ADDRESS=head:8899
    python examples/grpo_group.py --quick     # fewer steps, a few seconds

The ranks of each group are laid out as dp 2 by tp 2. The prompts are split along dp. The hidden units of the model are
split along tp, so that logits are a sum over tp, and gradients a mean over dp: collectives inside the methods, which
are safe because all ranks see the calls in one order. A toy task with a real model and real gradients: given a digit,
write the four that follow it. The reward of a sample is how many of its tokens are right, its advantage how much
better it is than the other samples of its prompt.
"""

import argparse
import os
import sys
import time
from multiprocessing.connection import Client, Listener
from pathlib import Path

try:
    import numpy as np
except ImportError as missing:
    raise SystemExit(f"this example needs numpy ({missing}): pip install numpy") from None

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from group_layout import NamedSharding
from worker_group import GroupOptions

from minipool import Executor

LAYOUT = NamedSharding([[0, 1], [2, 3]], ["dp", "tp"])
DIGITS, LENGTH, HIDDEN, SAMPLES = 10, 4, 64, 16  # SAMPLES of each prompt are compared with each other


class Mesh:
    """Sums of arrays over an axis of the layout. Rank 0 adds up what all ranks send: enough for four of them."""

    def __init__(self, rank):
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.coords, self.all_coords = LAYOUT.get_worker_coords(rank), [LAYOUT.get_worker_coords(r) for r in range(4)]
        self.others, self.centre = {}, None
        if rank == 0:
            with Listener(where) as listener:
                for _ in range(LAYOUT.size - 1):
                    connection = listener.accept()
                    self.others[connection.recv()] = connection
            return
        give_up = time.monotonic() + 60
        while self.centre is None:
            try:
                self.centre = Client(where)
            except ConnectionRefusedError:  # rank 0 is not there yet
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.01)
        self.centre.send(rank)

    def sum(self, axis, array):
        """Return the sum of an array over the ranks that differ from this one along `axis` only; all ranks call it."""
        if self.centre:
            self.centre.send(array)
            return self.centre.recv()
        arrays = {0: array, **{rank: other.recv() for rank, other in self.others.items()}}
        sums = {}
        for rank in arrays:
            line = tuple(at for name, at in self.all_coords[rank].items() if name != axis)
            sums.setdefault(line, []).append(rank)
        totals = {rank: sum(arrays[r] for r in ranks) for ranks in sums.values() for rank in ranks}
        for rank, other in self.others.items():
            other.send(totals[rank])
        return totals[0]


class Shard:
    """A rank's part of the model: two layers, of whose hidden units it holds those of its place along tp."""

    def __init__(self):
        self.mesh = Mesh(int(os.environ["RANK"]))
        width, tp = HIDDEN // LAYOUT.get_axis_size("tp"), self.mesh.coords["tp"]
        random = np.random.default_rng(tp)
        self.w1 = random.normal(0, 0.3, (2 * DIGITS + LENGTH, width))
        self.w2 = random.normal(0, 0.1, (width, DIGITS))

    def forward(self, prompts, previous, position):
        """Return inputs, hidden units of this shard, and the probabilities of the next token, the same on all of tp."""
        eye = np.eye(DIGITS)
        place = np.tile(np.eye(LENGTH)[position], (len(prompts), 1))
        inputs = np.hstack([eye[prompts], eye[previous], place])
        hidden = np.tanh(inputs @ self.w1)
        logits = self.mesh.sum("tp", hidden @ self.w2)
        chances = np.exp(logits - logits.max(1, keepdims=True))
        return inputs, hidden, chances / chances.sum(1, keepdims=True)


class Generation(Shard):
    def load(self, weights):
        self.w1, self.w2 = weights

    def generate(self, prompts, seed):
        """Return tokens of one sample for each prompt; ranks of one dp draw alike."""
        random = np.random.default_rng([seed, self.mesh.coords["dp"]])
        tokens = [prompts]
        for position in range(LENGTH):
            _, _, chances = self.forward(prompts, tokens[-1], position)
            drawn = random.random((len(prompts), 1)) > chances.cumsum(1)
            tokens.append(drawn.sum(1).clip(max=DIGITS - 1))
        return np.stack(tokens[1:], 1)


class Policy(Shard):
    def weights(self):
        return self.w1, self.w2

    def train(self, prompts, tokens, advantages, rate):
        """Make tokens likelier by their samples' advantages: one step of the policy gradient."""
        g1, g2, previous = np.zeros_like(self.w1), np.zeros_like(self.w2), prompts
        for position in range(LENGTH):
            inputs, hidden, chances = self.forward(prompts, previous, position)
            previous = tokens[:, position]
            to_logits = (np.eye(DIGITS)[previous] - chances) * advantages[:, None] / len(prompts)
            g2 += hidden.T @ to_logits
            g1 += inputs.T @ (to_logits @ self.w2.T * (1 - hidden**2))
        dp = LAYOUT.get_axis_size("dp")
        self.w1 += rate * self.mesh.sum("dp", g1) / dp
        self.w2 += rate * self.mesh.sum("dp", g2) / dp


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="40 steps instead of 300")
    steps = 40 if parser.parse_args().quick else 300

    prompts = np.repeat(np.arange(DIGITS), SAMPLES)
    right = (prompts[:, None] + np.arange(1, LENGTH + 1)) % DIGITS
    by_dp = {"in_sharded_axes": ["dp"], "replicate_on_axes": ["tp"], "output_is_replicated": ["tp"]}
    begin = time.perf_counter()
    with Executor(max_workers=LAYOUT.size) as pool:
        options = GroupOptions(pool, sharding=LAYOUT)
        with options.group(Policy) as policy, options.group(Generation) as generation:
            for step in range(steps):
                # futures as arguments: each rank of the one group gets the weights of the same rank of the other
                generation.call_each("load", policy.call("weights").futures).get_results()
                rolled = generation.call_sharded("generate", **by_dp, prompts=np.split(prompts, 2),
                                                 common_kwargs={"seed": step}).get_results()
                tokens = np.concatenate(rolled)
                rewards = (tokens == right).mean(1)
                groups = rewards.reshape(DIGITS, SAMPLES)
                better = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-6)
                policy.call_sharded("train", **by_dp, prompts=np.split(prompts, 2), tokens=np.split(tokens, 2),
                                    advantages=np.split(better.ravel(), 2), common_kwargs={"rate": 3.0}).get_results()
                if step % (steps // 10) == 0 or step == steps - 1:
                    print(f"step {step:3}  reward {rewards.mean():.3f}", flush=True)
    print(f"{steps} steps on {LAYOUT.size} ranks, two groups on the same workers: {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell expects it
