"""The examples do what they promise: run as programs, from a folder that is not the project's, embedded."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ROW = re.compile(r"^ *(0\.\d{4}|1\.0000)  +0\.\d{4}  (rbf|poly) +\S+ +\S+ +\d+\.\d\d$", re.MULTILINE)


def run_example(name, folder, *, hidden=()):
    """Run an example in `folder` with `--quick`; the modules in `hidden` cannot be imported by it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MINIPOOL_")}
    for module in hidden:
        (folder / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}')\n")
    if hidden:
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, str(EXAMPLES / name), "--quick"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def run_well(name, folder, **options):
    """Run an example that must end without an error."""
    done = run_example(name, folder, **options)
    assert done.returncode == 0, done.stderr
    return done


def needs(module):
    # Asked without importing it: PyTorch would take seconds and hundreds of MB, in this process, for nothing.
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@needs("sklearn")
@pytest.mark.slow
@pytest.mark.timeout(240)
class TestSweep:
    def test_the_table_lists_every_setting_best_first(self, tmp_path):
        done = run_well("sweep.py", tmp_path)
        accuracies = [float(row[0]) for row in ROW.findall(done.stdout)]
        assert len(accuracies) == 4
        assert accuracies == sorted(accuracies, reverse=True)
        assert accuracies[0] > 0.9
        assert "4 settings" in done.stdout

    def test_without_tqdm_a_line_counts_the_settings(self, tmp_path):
        done = run_well("sweep.py", tmp_path, hidden=["tqdm"])
        assert "4 of 4 settings" in done.stderr
        assert len(ROW.findall(done.stdout)) == 4


class TestInference:
    @needs("torch")
    @needs("sklearn")
    @pytest.mark.slow
    @pytest.mark.timeout(240)
    def test_unseen_digits_are_recognised_and_the_rate_of_each_device_printed(self, tmp_path):
        done = run_well("gpu_inference.py", tmp_path)
        assert re.search(r" on (cpu|cuda:0 \(.+\)): [\d,]+ images, [\d,]+ images/s$", done.stdout, re.MULTILINE)
        assert float(re.search(r"([\d.]+)% right", done.stdout)[1]) > 90


class TestGrpo:
    @needs("numpy")
    @pytest.mark.timeout(240)
    def test_the_reward_rises_while_two_groups_share_the_workers(self, tmp_path):
        done = run_well("grpo_group.py", tmp_path)
        rewards = [float(reward) for reward in re.findall(r"^step +\d+  reward ([\d.]+)$", done.stdout, re.MULTILINE)]
        assert rewards[0] < 0.3 and rewards[-1] > 0.8
        assert "40 steps on 4 ranks, two groups on the same workers" in done.stdout


class TestDdp:
    @needs("torch")
    @pytest.mark.slow
    @pytest.mark.timeout(240)
    def test_the_loss_falls_and_the_replicas_stay_the_same(self, tmp_path):
        done = run_well("ddp.py", tmp_path)
        losses = [float(loss) for loss in re.findall(r"^round +\d+  loss ([\d.]+)$", done.stdout, re.MULTILINE)]
        assert len(losses) == 5 and losses[-1] < losses[0] / 4
        assert "replicas are the same" in done.stdout


class TestDiffusion:
    @needs("torch")
    @pytest.mark.slow
    @pytest.mark.timeout(240)
    def test_a_drawing_comes_out_of_noise_step_by_step(self, tmp_path):
        done = run_well("diffusion.py", tmp_path)
        assert re.findall(r"^step (\d) of 6$", done.stdout, re.MULTILINE) == ["1", "3", "6"]
        first, _, last = re.split(r"^step .*$", done.stdout, flags=re.MULTILINE)[1:]
        assert len(set(first) & set(".:-=+*#%")) >= 6       # every shade: noise
        assert last.count("@") > 5 * sum(map(last.count, ".:-=+*#%"))
        assert "a ring on two ranks" in done.stdout


@pytest.mark.slow
class TestDistributedComputingPool:
    def test_what_the_workers_tell_each_other_need_not_be_found_twice(self, tmp_path):
        done = run_well("distributed_computing_pool.py", tmp_path)
        counts = [int(n.replace(",", "")) for n in re.findall(r"workers solved ([\d,]+) positions", done.stdout)]
        assert len(counts) == 2 and counts[1] < counts[0]
        assert done.stdout.count("0 of 10 first moves win") == 2


@pytest.mark.parametrize("name, module, package", [
    ("gpu_inference.py", "torch", "torch"), ("grpo_group.py", "numpy", "numpy"), ("ddp.py", "torch", "torch"),
    ("diffusion.py", "torch", "torch")])
def test_without_what_it_needs_one_sentence_says_what_to_install(tmp_path, name, module, package):
    done = run_example(name, tmp_path, hidden=[module])
    assert done.returncode == 1
    assert f"pip install {package}" in done.stderr
    assert "Traceback" not in done.stderr
