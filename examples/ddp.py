# /// script
# requires-python = ">=3.11"
# dependencies = ["cloudpickle>=3", "nvidia-ml-py>=12", "torch"]
# ///
"""Train one PyTorch model on several workers with DistributedDataParallel: nccl between GPUs, gloo between CPUs.

    pip install torch                         # the build for your GPU: https://pytorch.org/get-started
    python examples/ddp.py                    # on this machine, one rank per worker
    python examples/ddp.py --quick            # two ranks, a few seconds

A worker group gives each rank the variables that torch.distributed reads, so `init_process_group()` needs no address.
A worker sees one GPU only, so the device is `cuda:0` on every rank, and LOCAL_RANK is 0. On a cluster set
MINIPOOL_ADDRESS=head:8899; the workers there need PyTorch, but no copy of this file.
"""

import argparse
import sys
import time
from pathlib import Path

try:
    import torch
except ImportError as missing:
    raise SystemExit(f"this example needs PyTorch ({missing}): pip install torch") from None

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from worker_group import group

from minipool import Executor


class Trainer:
    """One rank: its replica of the model, and its part of the data."""

    def __init__(self, seed=0):
        import torch.distributed as dist
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda:0" if on_gpu else "cpu")
        dist.init_process_group("nccl" if on_gpu else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(seed + self.rank)  # replicas begin differently; DDP gives all of them those of rank 0
        nn = torch.nn
        net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(self.device)
        self.model = nn.parallel.DistributedDataParallel(net)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        points = torch.rand(4096, 2, generator=torch.Generator().manual_seed(seed)) * 4 - 2
        mine = points[self.rank :: self.size].to(self.device)
        self.data = mine, (torch.sin(2 * mine[:, :1]) * torch.cos(mine[:, 1:]))

    def train(self, epochs):
        """Train on this rank's data, in step with the others; return the mean loss of the last epoch over all ranks."""
        x, y = self.data
        for _ in range(epochs):
            losses = []
            for chosen in torch.randperm(len(x), device=self.device).split(128):
                self.optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(self.model(x[chosen]), y[chosen])
                loss.backward()  # DDP takes the mean of the gradients over all ranks meanwhile
                self.optimizer.step()
                losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        torch.distributed.all_reduce(mean)
        return mean.item() / self.size

    def fingerprint(self):
        """Return a number that two models share only if their weights are the same."""
        return sum(float(weight.detach().double().abs().sum()) for weight in self.model.parameters())

    def close(self):
        torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two ranks and 5 rounds instead of 20")
    quick = parser.parse_args().quick
    rounds = 5 if quick else 20

    begin = time.perf_counter()
    with Executor(max_workers=2 if quick else None) as pool:
        pool.wait_for_workers(1)
        trainers = group(pool, Trainer, 2 if quick else None)
        with trainers:
            print(f"{len(trainers)} ranks on {', '.join(here['device'] for here in trainers.worker_metadata)}")
            for number in range(1, rounds + 1):
                loss = trainers.call("train", epochs=2).get_results()[0]
                print(f"round {number:2}  loss {loss:.4f}", flush=True)
            same = len(set(trainers.call("fingerprint").get_results())) == 1
            trainers.shutdown("close")
    print(f"replicas are {'the same' if same else 'different'} after {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell expects it
