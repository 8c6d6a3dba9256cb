"""Which workers a node starts, and what each one sees. No GPU is needed: tests/fakes/pynvml.py invents them."""

import json
import logging
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import minipool_worker
from minipool_worker import find_slots, visible_devices

A100 = {"uuid": "GPU-1a2b3c4d-0000", "name": "NVIDIA A100"}
H200 = {"uuid": "GPU-5e6f7a8b-0000", "name": "NVIDIA H200"}
SLICE = {"uuid": "MIG-11111111-0000", "name": "NVIDIA A100 MIG 1g.5gb"}
OTHER_SLICE = {"uuid": "MIG-22222222-0000"}
SLICED = A100 | {"mig": [SLICE, None, OTHER_SLICE]}


@pytest.fixture
def machine(monkeypatch):
    """Return a function that gives this machine GPUs, or the NVML error of that name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fakes"))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)

    def has(*gpus):
        monkeypatch.setenv("FAKE_GPUS", json.dumps(gpus[0] if isinstance(gpus[:1] and gpus[0], str) else gpus))

    yield has
    sys.modules.pop("pynvml", None)  # so that nobody else meets the fake


def slots(environ=None, **options):
    return find_slots(environ=environ or {}, **({"cores": 8} | options))


def tokens(environ=None, **options):
    return [slot.env[options.get("device_env", "CUDA_VISIBLE_DEVICES")] for slot in slots(environ, **options)]


def masked(mask, **options):
    return tokens({"CUDA_VISIBLE_DEVICES": mask}, **options)


class TestTheMask:
    @pytest.mark.parametrize(("mask", "devices"), [
        ("", []), ("-1", []), ("NoDevFiles", []), (" ", []), (",0", []),
        ("0", ["0"]), ("2,0", ["2", "0"]), (" 1 , 3", ["1", "3"]), ("+1", ["1"]), ("01", ["1"]),
        ("0,1,-1,2", ["0", "1"]), ("0,1,,2", ["0", "1"]), ("0,x,1", ["0"]),
        ("0,0", ["0"]), ("0,1,0", ["0", "1"]), ("1,01", ["1"]),
        ("1gpu2,2ampere", ["1", "2"]), ("1gpu,1", ["1"]),
        ("GPU-8932f937", ["GPU-8932f937"]), ("GPU-89,GPU-a1", ["GPU-89", "GPU-a1"]), ("GPU-89,GPU-89", ["GPU-89"]),
        ("GPU-89,0", ["GPU-89"]), ("0,GPU-89", ["0"]), ("gpu-89", []),
        ("MIG-aa", ["MIG-aa"]), ("MIG-aa,MIG-bb", ["MIG-aa", "MIG-bb"]), ("MIG-aa,GPU-89", ["MIG-aa"]),
        ("MIG-GPU-89/1/0", ["MIG-GPU-89/1/0"]),
    ])
    def test_is_read_as_the_driver_reads_it(self, mask, devices):
        assert [gpu.token for gpu in visible_devices(mask)] == devices

    def test_is_handed_on_verbatim_and_in_its_order(self, machine):
        machine(A100, H200)
        assert masked("1,0") == ["1", "0"]
        assert masked("GPU-5e,GPU-1a") == ["GPU-5e", "GPU-1a"]

    def test_is_obeyed_without_nvml(self, machine):
        machine("LibraryNotFound")
        assert masked("3,1") == ["3", "1"]
        assert slots({"CUDA_VISIBLE_DEVICES": "3"})[0].label == "cuda:0 CUDA_VISIBLE_DEVICES=3"

    def test_ends_before_a_device_that_nvml_does_not_list(self, machine):
        machine(A100, H200)
        assert masked("1,7,0") == ["1"]
        assert masked("GPU-5e,GPU-ff,GPU-1a") == ["GPU-5e"]

    def test_may_name_a_device_that_nvml_cannot_rule_out(self, machine):
        machine({}, SLICED)
        assert masked("GPU-ff") == ["GPU-ff"]
        assert masked("MIG-GPU-1a2b3c4d/1/0") == ["MIG-GPU-1a2b3c4d/1/0"]

    def test_that_repeats_a_device_under_two_prefixes_shows_it_once(self, machine):
        machine(A100, H200)
        assert masked("GPU-1a,GPU-1a2b") == ["GPU-1a"]

    def test_that_is_empty_leaves_cpu_workers_and_nvml_unasked(self, machine, caplog):
        machine("LibraryNotFound")
        assert masked("", cores=3) == ["", "", ""]
        assert not caplog.records


class TestWithoutAMask:
    def test_every_gpu_gets_a_worker_that_sees_it_alone(self, machine):
        machine(A100, H200)
        first, second = slots()
        assert first.device == "cuda:0" and first.label == "cuda:0 NVIDIA A100 GPU-1a2b3c4d"
        assert second.device == "cuda:1" and second.env["CUDA_VISIBLE_DEVICES"] == "1"

    def test_cuda_counts_in_pci_order_as_nvml_does(self, machine):
        machine(A100)
        assert slots()[0].env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"

    def test_uuids_are_the_tokens_where_the_user_wants_another_order(self, machine):
        machine(A100)
        (slot,) = slots({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
        assert slot.env["CUDA_VISIBLE_DEVICES"] == A100["uuid"] and "CUDA_DEVICE_ORDER" not in slot.env

    def test_mig_instances_replace_their_gpu(self, machine):
        machine(SLICED, H200)
        assert tokens() == [SLICE["uuid"], OTHER_SLICE["uuid"], "1"]
        assert [slot.label for slot in slots()][:2] == ["cuda:0 NVIDIA A100 MIG 1g.5gb MIG-11111111",
                                                        "cuda:1 NVIDIA A100 MIG-22222222"]

    def test_a_gpu_with_mig_on_and_no_instance_is_no_device(self, machine):
        machine(A100 | {"mig": [None]}, H200)
        assert tokens() == ["1"]

    def test_a_lost_gpu_is_left_out_and_keeps_its_number(self, machine):
        machine({"lost": True}, H200)
        assert tokens() == ["1"]

    def test_a_gpu_that_tells_nothing_is_still_used(self, machine):
        machine({})
        assert slots()[0].label == "cuda:0 CUDA_VISIBLE_DEVICES=0"

    def test_older_bindings_return_bytes(self, machine):
        machine(A100 | {"bytes": True})
        assert slots()[0].label == "cuda:0 NVIDIA A100 GPU-1a2b3c4d"


class TestWithoutNvml:
    def test_there_is_one_cpu_worker_per_core_and_one_line_says_why(self, machine, caplog):
        caplog.set_level(logging.INFO, "minipool.node")
        machine("LibraryNotFound")
        assert [slot.device for slot in slots(cores=4)] == ["cpu"] * 4
        (line,) = caplog.messages
        assert "NVMLError_LibraryNotFound" in line and "no NVIDIA GPU is used" in line

    def test_a_missing_binding_is_no_crash(self, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "pynvml", None)
        assert len(slots(cores=2)) == 2
        assert caplog.record_tuples[0][:2] == ("minipool.node", logging.WARNING)

    @pytest.mark.parametrize(("error", "environ", "level"), [
        ("LibraryNotFound", {}, logging.INFO), ("LibraryNotFound", {"CUDA_VISIBLE_DEVICES": "0"}, logging.WARNING),
        ("LibraryNotFound", {"HIP_VISIBLE_DEVICES": "0"}, logging.WARNING), ("DriverNotLoaded", {}, logging.WARNING),
    ])
    def test_the_line_is_a_warning_where_something_is_amiss(self, machine, caplog, error, environ, level):
        caplog.set_level(logging.INFO, "minipool.node")
        machine(error)
        slots(environ)
        assert [record.levelno for record in caplog.records] == [level]

    def test_the_line_tells_users_of_amd_gpus_what_to_give(self, machine, caplog):
        machine("LibraryNotFound")
        slots({"ROCR_VISIBLE_DEVICES": "0"})
        assert "--devices 0,1,... --device-env HIP_VISIBLE_DEVICES" in caplog.text


class TestAskingForGpus:
    @pytest.mark.parametrize(("gpus", "chosen"), [
        ("all", ["0", "1"]), ("1", ["1"]), ("1,0", ["1", "0"]), (" cuda:1 ", ["1"]), ("GPU-5e", ["1"]), ("0,0", ["0"]),
    ])
    def test_selects_by_place_or_uuid_prefix(self, machine, gpus, chosen):
        machine(A100, H200)
        assert tokens(gpus=gpus) == chosen

    def test_counts_among_those_the_mask_shows_as_torch_does(self, machine):
        machine(A100, H200)
        (slot,) = slots({"CUDA_VISIBLE_DEVICES": "1,0"}, gpus="0")
        assert slot.env["CUDA_VISIBLE_DEVICES"] == "1" and slot.device == "cuda:0"

    def test_keeps_a_gpus_place_on_the_node(self, machine):
        machine(A100, H200)
        assert slots(gpus="1")[0].device == "cuda:1"

    @pytest.mark.parametrize("gpus", ["7", "GPU-ff", "GPU-", "0,7", "x"])
    def test_that_are_not_there_says_what_is(self, machine, gpus):
        machine(A100, H200)
        with pytest.raises(ValueError, match="found here: cuda:0 NVIDIA A100 GPU-1a2b3c4d, cuda:1 NVIDIA H200"):
            slots(gpus=gpus)

    @pytest.mark.parametrize("gpus", ["all", "0"])
    def test_where_there_are_none_is_refused(self, machine, gpus):
        machine("LibraryNotFound")
        with pytest.raises(ValueError, match="no GPU at all"):
            slots(gpus=gpus)

    @pytest.mark.parametrize("gpus", ["", "none"])
    def test_for_none_leaves_cpu_workers(self, machine, gpus):
        machine(A100)
        assert [slot.device for slot in slots(gpus=gpus, cores=2)] == ["cpu", "cpu"]


class TestCpuWorkers:
    def test_see_no_gpu(self, machine):
        machine("LibraryNotFound")
        slot = slots(cores=1)[0]
        assert (slot.label, slot.lock) == ("cpu", None)
        assert slot.env["CUDA_VISIBLE_DEVICES"] == ""

    def test_are_added_to_gpus_when_a_number_is_given(self, machine):
        machine(A100)
        assert [slot.device for slot in slots(cpu_workers=2)] == ["cuda:0", "cpu", "cpu"]

    def test_are_as_many_as_asked_for(self, machine):
        machine(A100)
        assert len(slots(gpus="none", cpu_workers=3)) == 3

    def test_that_number_zero_where_no_gpu_is_are_refused(self, machine):
        machine("LibraryNotFound")
        with pytest.raises(ValueError, match="no worker to start"):
            slots(cpu_workers=0)

    def test_count_the_cores_this_process_may_use(self, machine):
        machine("LibraryNotFound")
        assert 1 <= len(slots(cores=None)) <= (os.cpu_count() or 1)


class TestOtherVendors:
    def test_are_listed_by_hand_without_nvml(self, machine, caplog):
        machine("LibraryNotFound")
        first, second = slots(devices="0, 1", device_env="HIP_VISIBLE_DEVICES")
        assert (first.device, second.device) == ("cuda:0", "cuda:1")
        assert second.env["HIP_VISIBLE_DEVICES"] == "1" and "CUDA_VISIBLE_DEVICES" not in second.env
        assert second.lock == "HIP_VISIBLE_DEVICES=1" and not caplog.records

    def test_are_hidden_from_cpu_workers(self):
        _, cpu = slots(devices=["4"], device_env="ZE_AFFINITY_MASK", cpu_workers=1)
        assert cpu.env["ZE_AFFINITY_MASK"] == cpu.env["CUDA_VISIBLE_DEVICES"] == ""

    def test_can_be_selected_too(self):
        assert tokens(devices="4,5", device_env="ASCEND_RT_VISIBLE_DEVICES", gpus="1") == ["5"]

    @pytest.mark.parametrize("half", [{"devices": "0"}, {"device_env": "HIP_VISIBLE_DEVICES"}])
    def test_need_both_the_devices_and_the_variable(self, half):
        with pytest.raises(ValueError, match="go together"):
            slots(**half)


class TestTheEnvironment:
    def test_several_workers_share_a_gpu_and_its_memory(self, machine):
        machine(A100)
        first, second = slots(workers_per_gpu=2)
        assert first == second and first.env is not second.env
        assert first.env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        assert first.env["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"

    def test_a_worker_alone_on_its_gpu_keeps_its_memory_settings(self, machine):
        machine(A100)
        assert "TF_FORCE_GPU_ALLOW_GROWTH" not in slots()[0].env

    def test_workers_share_the_cores(self, machine):
        machine(A100, H200)
        env = slots(cores=16, cpu_workers=2)[0].env
        assert env["OMP_NUM_THREADS"] == env["NUMBA_NUM_THREADS"] == env["VECLIB_MAXIMUM_THREADS"] == "4"

    def test_a_worker_has_one_thread_at_least(self, machine):
        machine(A100, H200)
        assert slots(cores=1)[0].env["OMP_NUM_THREADS"] == "1"

    @pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "CUDA_DEVICE_ORDER", "XLA_PYTHON_CLIENT_PREALLOCATE"])
    def test_what_the_user_has_set_stays(self, machine, name):
        machine(A100)
        assert name not in slots({name: "mine"}, workers_per_gpu=2)[0].env

    @pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK",
                                      "MASTER_ADDR", "MASTER_PORT", "MINIPOOL_SECRET", "MINIPOOL_SECRET_FILE"])
    def test_inherited_ranks_and_the_secret_are_removed(self, machine, name):
        machine(A100)
        assert {slot.env[name] for slot in slots(cpu_workers=1)} == {None}


class TestTheLock:
    def test_is_the_same_however_the_device_is_named(self, machine):
        machine(A100, H200)
        names = ["1", "GPU-5e", "GPU-5e6f7a8b-0000"]
        assert {slots({"CUDA_VISIBLE_DEVICES": name})[0].lock for name in names} == {H200["uuid"]}

    def test_is_the_token_where_no_uuid_is_known(self, machine):
        machine("LibraryNotFound")
        assert slots({"CUDA_VISIBLE_DEVICES": "1"})[0].lock == "CUDA_VISIBLE_DEVICES=1"

    def test_is_the_token_where_cuda_counts_otherwise(self, machine):
        machine(A100, H200)
        environ = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
        assert slots(environ)[0].lock == "CUDA_VISIBLE_DEVICES=1"


FAKE_LIBRARY = r"""
#include <string.h>
static int devices[2] = {0, 1};
int nvmlInitWithFlags(unsigned flags) { return 0; }
const char *nvmlErrorString(int error) { return "fake"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { *device = &devices[i]; return i < 2 ? 0 : 2; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) {
    strcpy(text, *(int *)device ? "GPU-5e6f7a8b-0000" : "GPU-1a2b3c4d-0000"); return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = &devices[uuid[4] == '5']; return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned size) { strcpy(text, "NVIDIA Fake"); return 0; }
int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *next) { return 3; /* not supported */ }
"""
SHOW = """
import json, minipool_worker as m
slots = m.find_slots(environ=dict())
print(json.dumps([slot.label for slot in slots]))
"""


def true_binding():
    try:
        return distribution("nvidia-ml-py").locate_file("pynvml.py")
    except PackageNotFoundError:
        return None


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
@pytest.mark.skipif(not true_binding(), reason="needs nvidia-ml-py")
@pytest.mark.skipif(sys.platform != "linux", reason="the library's name is that of Linux")
def test_a_node_in_a_program_takes_no_misspelt_name():
    with pytest.raises(TypeError, match="cpu_worker$"):
        minipool_worker.Node(secret="some secret", cpu_worker=1)


def test_the_true_binding_finds_the_devices_of_a_fake_driver(tmp_path):
    (tmp_path / "nvml.c").write_text(FAKE_LIBRARY)
    command = ["gcc", "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "nvml.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    paths = [Path(minipool_worker.__file__).parent, Path(true_binding()).parent]
    environ = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(map(str, paths))}
    shown = subprocess.run([sys.executable, "-c", SHOW], env=environ, check=True, capture_output=True, text=True)
    assert json.loads(shown.stdout) == ["cuda:0 NVIDIA Fake GPU-1a2b3c4d", "cuda:1 NVIDIA Fake GPU-5e6f7a8b"]
