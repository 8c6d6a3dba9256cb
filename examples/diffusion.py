# /// script
# requires-python = ">=3.11"
# dependencies = ["cloudpickle>=3", "nvidia-ml-py>=12", "torch"]
# ///
"""Watch an image come out of noise, step by step: a toy diffusion on two ranks, streamed by a DistributedRunner.

    pip install torch                               # the build for your GPU: https://pytorch.org/get-started
    python examples/diffusion.py                    # a ring; also: square, cross
    python examples/diffusion.py cross --quick

The model is the exact denoiser of a small set of drawings: the mean of all drawings, each weighted by how likely it
turned into the noisy image at hand. Each rank holds a share of the drawings, and every step sums over the ranks with
`torch.distributed` (nccl between GPUs, gloo between CPUs), as a model too large for one GPU would.
"""

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path

try:
    import torch
except ImportError as missing:
    raise SystemExit(f"this example needs PyTorch ({missing}): pip install torch") from None

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from distributed_runner import DistributedRunner, DistributedWorker

SIDE = 16
SHAPES = ("ring", "square", "cross")
SHADES = " .:-=+*#%@"


def draw(shape, generator):
    """Return a drawing of SIDE x SIDE pixels from -1 to 1: a shape of some size, somewhere near the middle."""
    x, y = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="xy")
    x, y = (axis - SIDE / 2 - float(torch.rand(1, generator=generator)) * 2 + 1 for axis in (x, y))
    size = 3.5 + 2 * float(torch.rand(1, generator=generator))
    inside = {
        "ring": ((x**2 + y**2).sqrt() - size).abs() < 1.2,
        "square": (torch.maximum(x.abs(), y.abs()) - size).abs() < 1.2,
        "cross": (torch.minimum(x.abs(), y.abs()) < 1.2) & (torch.maximum(x.abs(), y.abs()) < size),
    }
    return inside[shape].float() * 2 - 1


class Painter(DistributedWorker):
    """One rank: its share of the drawings."""

    def setup(self, drawings=300, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.drawings = {}
        for shape in SHAPES:  # all ranks draw the same, and each keeps its share
            everything = torch.stack([draw(shape, generator).flatten() for _ in range(drawings)])
            self.drawings[shape] = everything[self.rank :: self.world_size].to(self.device)

    def denoise(self, noisy, mine, kept):
        """Return the expected drawing behind a noisy image of which a share of `kept` is drawing, the rest noise."""
        likely = -((noisy - kept**0.5 * mine) ** 2).sum(1) / (2 * (1 - kept))
        largest = likely.max()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        weights = (likely - largest).exp()
        total = torch.cat([weights[:, None] * mine, weights[:, None]], 1).sum(0)
        torch.distributed.all_reduce(total)
        return total[:-1] / total[-1]

    def __call__(self, shape="ring", steps=24, seed=0, streaming=False):
        """Paint one image; the noise is the same on all ranks, and so is what they make of it."""
        image = torch.randn(SIDE * SIDE, generator=torch.Generator().manual_seed(seed)).to(self.device)
        shares = torch.linspace(0.002, 0.998, steps + 1).tolist()
        for step, (kept, next_kept) in enumerate(zip(shares, shares[1:], strict=False), 1):
            drawing = self.denoise(image, self.drawings[shape], kept)
            noise = (image - kept**0.5 * drawing) / (1 - kept) ** 0.5
            image = next_kept**0.5 * drawing + (1 - next_kept) ** 0.5 * noise
            self.add_streaming_result({"step": step, "image": image.reshape(SIDE, SIDE)})
        return {"image": drawing.reshape(SIDE, SIDE)}


def as_text(image):
    """Return an image as lines of characters, two for a pixel."""
    levels = ((image.clamp(-1, 1) + 1) / 2 * (len(SHADES) - 1)).round().int().tolist()
    return "\n".join("".join(SHADES[level] * 2 for level in row).rstrip() for row in levels)


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="ring")
    parser.add_argument("--quick", action="store_true", help="6 steps instead of 24")
    options = parser.parse_args()
    steps = 6 if options.quick else 24

    async with DistributedRunner(Painter, world_size=2) as runner:
        async for item in runner.stream({"shape": options.shape, "steps": steps, "seed": 3}, streaming_timeout=60):
            if item.get("step") in (1, steps // 2, steps):
                print(f"step {item['step']} of {steps}\n{as_text(item['image'])}\n", flush=True)
    ink = float((item["image"] > 0).float().mean())
    print(f"a {options.shape} on two ranks, {ink:.0%} of the pixels are ink")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
