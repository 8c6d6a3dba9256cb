# /// script
# requires-python = ">=3.11"
# dependencies = ["cloudpickle>=3", "nvidia-ml-py>=12", "numpy>=1.26"]
# ///
"""Actors and a learner: workers play with the newest policy, one program learns from each game batch as it comes.

    pip install numpy
    python examples/rollouts.py              # on this machine; a cluster: set MINIPOOL_ADDRESS=head:8899
    python examples/rollouts.py --quick      # fewer updates, a few seconds

No worker waits for another: when a batch of games is in, the learner takes one step with it, and a new batch begins
with the policy of that moment. `as_completed(...).add` (examples/as_completed.py) is the whole loop. The game: a ball
falls down a board, drifting to a side; a paddle at the bottom moves left, stays or moves right; the reward is 1 if it
is below the ball at the end, else 0. The policy is a softmax of a table of weights, its gradient that of REINFORCE.
"""

import argparse
import sys
from pathlib import Path

try:
    import numpy as np
except ImportError as missing:
    raise SystemExit(f"this example needs numpy ({missing}): pip install numpy") from None

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from as_completed import as_completed

from minipool import Executor

WIDTH, HEIGHT, GAMES = 7, 8, 64     # GAMES in a batch


def see(ball, paddle, height):
    """Return the row of the table that belongs to what the player sees: how far off it is, and how high the ball."""
    return (ball - paddle + WIDTH - 1) * HEIGHT + height


def play(policy, seed):
    """Play a batch of games; return the gradient of the mean reward, and that reward."""
    rng = np.random.default_rng(seed)
    ball, paddle = rng.integers(0, WIDTH, GAMES), rng.integers(0, WIDTH, GAMES)
    drift = rng.integers(-1, 2, GAMES)
    steps = []
    for height in reversed(range(HEIGHT)):
        state = see(ball, paddle, height)
        chances = np.exp(policy[state] - policy[state].max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        action = (chances.cumsum(axis=1) < rng.random((GAMES, 1))).sum(axis=1).clip(0, 2)
        steps.append((state, np.eye(3)[action] - chances))
        paddle = (paddle + action - 1).clip(0, WIDTH - 1)
        ball = (ball + drift * (height % 2)).clip(0, WIDTH - 1)
    reward = (ball == paddle).astype(float)
    gradient = np.zeros_like(policy)
    for state, slope in steps:
        np.add.at(gradient, state, (reward - reward.mean())[:, None] * slope / GAMES)
    return gradient, float(reward.mean())


def learn(pool, updates, ahead, rate=3.0):
    """Take that many steps, with `ahead` batches being played all the time; yield the reward of each batch."""
    policy = np.zeros(((2 * WIDTH - 1) * HEIGHT, 3))
    games = as_completed([pool.submit(play, policy, seed) for seed in range(ahead)], with_results=True)
    for step, (_, (gradient, reward)) in enumerate(games):
        policy += rate * gradient
        if step + ahead < updates:
            games.add(pool.submit(play, policy, step + ahead))
        yield reward


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 updates instead of 400")
    updates = 200 if parser.parse_args().quick else 400
    with Executor() as pool:
        rewards = list(learn(pool, updates, ahead=2 * pool.size))
        print(f"{'games':>8}  {'caught':>6}")
        for part in np.array_split(np.arange(updates), 10):
            caught = np.mean([rewards[step] for step in part])
            print(f"{(part[-1] + 1) * GAMES:8,}  {caught:6.1%}  {'#' * round(40 * caught)}")


if __name__ == "__main__":
    main()
