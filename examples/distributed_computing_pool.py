"""Workers that share what they have found: a Pool in which the positions that one has solved are told to all others.

    python examples/distributed_computing_pool.py
    python examples/distributed_computing_pool.py --quick

Written as for the package distributed_computing: a class with a constructor, `run` and `handle_update`. Ported, it has
another import, and where a cluster was started there is nothing (this machine), or MINIPOOL_ADDRESS=head:8899.

The game is Domineering: two players lay dominoes on a board, one across, one upright, and who cannot move has lost.
Each job solves the game after one first move. Many positions come up after several of them, so each worker has a cache,
and the parts of it that are worth their way are shared by updates.
"""

import argparse
import sys
import time

from minipool import Pool, WorkerInterface


class Solver(WorkerInterface):
    """Solves positions, each a number with a bit per covered square, and remembers who wins them."""

    def __init__(self, rows, columns, shared):
        squares = range(rows * columns)
        across = [3 << s for s in squares if s % columns < columns - 1]
        upright = [(1 | 1 << columns) << s for s in squares if s < (rows - 1) * columns]
        self.moves = across, upright
        self.shared = shared  # positions with at most so many dominoes are told: few, and long to solve
        self.known = {}
        self.news = {}
        self.solved = 0

    def run(self, move):
        """Return whether a first move wins, the positions to tell, and how many were solved on the way."""
        self.news, self.solved = {}, 0
        loses = self.wins(move, 1)
        return not loses, self.news, self.solved

    def handle_update(self, positions):
        """Take in what another worker has solved."""
        self.known.update(positions)

    def wins(self, board, player):
        """Return whether the player whose turn it is wins."""
        position = board, player
        if position not in self.known:
            wins = any(not board & move and not self.wins(board | move, 1 - player) for move in self.moves[player])
            self.known[position] = wins
            self.solved += 1
            if board.bit_count() <= 2 * self.shared:
                self.news[position] = wins
        return self.known[position]


def play(pool, first_moves, shares):
    """Return how many first moves win, and how many positions all workers solved."""
    winning, solved, at_once = 0, 0, pool.executor.size
    for start in range(0, len(first_moves), at_once):  # in rounds: an update is there before jobs submitted after it
        jobs = [{"args": [move]} for move in first_moves[start : start + at_once]]
        for wins, positions, count in pool.imap_unordered(jobs):
            winning, solved = winning + wins, solved + count
            if shares:
                pool.update_workers({"args": [positions]})
    return winning, solved


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half of the first moves")
    rows, columns = 5, 5
    first_moves = Solver(rows, columns, 0).moves[0][:: 2 if parser.parse_args().quick else 1]
    solved = {}
    for shares in (False, True):
        begin = time.perf_counter()
        with Pool(Solver, {"args": [rows, columns, 9]}) as pool:
            pool.executor.wait_for_workers(pool.executor.size)      # for one that comes late finds less twice
            winning, solved[shares] = play(pool, first_moves, shares)
            count = pool.get_workers_count()
        print(f"{winning} of {len(first_moves)} first moves win; {count} workers solved {solved[shares]:,} positions "
              f"in {time.perf_counter() - begin:.1f} s{' and told each other' if shares else ''}", flush=True)
    print(f"what they told saved {1 - solved[True] / solved[False]:.0%} of the positions")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
