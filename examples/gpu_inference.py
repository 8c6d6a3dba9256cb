# /// script
# requires-python = ">=3.11"
# dependencies = ["cloudpickle>=3", "nvidia-ml-py>=12", "scikit-learn", "torch"]
# ///
"""Classify handwritten digits with PyTorch on every device: `cuda:0` in a worker that has a GPU, else the CPU.

    pip install torch scikit-learn            # the build of PyTorch for your GPU: https://pytorch.org/get-started
    python examples/gpu_inference.py          # on this machine, one worker per device
    python examples/gpu_inference.py --quick  # fewer images, a few seconds

A worker sees one GPU only, so `cuda:0` is right on all of them, whichever GPU it is. A small network is trained here
for a few seconds; its weights travel once to every worker, with the initializer, and then only batches do. On a
cluster nothing changes: set MINIPOOL_ADDRESS=head:8899. The workers there need PyTorch, but no copy of this file.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

try:
    import torch
    from sklearn.datasets import load_digits
except ImportError as missing:
    raise SystemExit(f"this example needs two packages ({missing}): pip install torch scikit-learn") from None

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor


def network():
    """A small convolutional network for images of 8 by 8 points; 95 of 100 unseen digits are read right."""
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10),
    )


def train(images, labels, epochs=12):
    """Train on the CPU of this program, seeded, and return the weights as arrays, which any worker can load."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def load(weights):
    """Run once in every worker: put the model on its device, and look once, so that no later batch pays for that."""
    global model, device
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    model = network()
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    model.to(device).eval()
    classify(torch.zeros(64, 1, 8, 8).numpy())


def classify(images):
    """Return the digits seen in a batch of images, the worker and device that looked, and for how many seconds."""
    begin = time.perf_counter()
    with torch.inference_mode():
        digits = model(torch.tensor(images).to(device)).argmax(1).cpu().numpy()  # .cpu() waits for the GPU
    worker = os.environ.get("MINIPOOL_WORKER", f"process {os.getpid()}")
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
    return digits, f"{worker} on {name}", time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="look at the unseen images 4 times instead of 100 times")
    rounds = 4 if parser.parse_args().quick else 100
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 16).astype("float32")
    weights = train(images[:1200], labels[:1200])
    unseen, truth = images[1200:], labels[1200:]

    seen, busy, right = defaultdict(int), defaultdict(float), 0
    begin = time.perf_counter()
    with Executor(initializer=load, initargs=(weights,)) as pool:
        for digits, place, seconds in pool.map(classify, [unseen] * rounds):
            seen[place] += len(digits)
            busy[place] += seconds
            right += int((digits == truth).sum())
    elapsed, total = time.perf_counter() - begin, sum(seen.values())

    for place in sorted(seen):
        print(f"{place}: {seen[place]:,} images, {seen[place] / busy[place]:,.0f} images/s")
    print(f"{total:,} images in {elapsed:.1f} s, start of the workers included; {right / total:.1%} right")


if __name__ == "__main__":
    main()
