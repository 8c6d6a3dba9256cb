"""A stand-in for nvidia-ml-py that invents GPUs. First on PYTHONPATH, it reaches child processes as well.

FAKE_GPUS holds JSON: a list of GPUs, or the name of the error that nvmlInit raises ("LibraryNotFound"). A GPU is
    {"uuid": "GPU-1a2b3c4d-...", "name": "NVIDIA A100",
     "mig": [GPU or null, ...]}     # present: MIG is on; null: an empty place
Every key is optional: a query for one that is absent raises NVMLError_NotSupported. "lost": true refuses the handle;
"bytes": true makes strings bytes, as older bindings did; "memory": false makes it one whose memory NVML cannot tell.
FAKE_GPU_LOST names a file: once it is there, the GPUs whose UUIDs it contains have fallen off the bus.
"""

import json
import os


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_NotFound(NVMLError):
    pass


class NVMLError_GpuIsLost(NVMLError):
    pass


def _gpus():
    return json.loads(os.environ.get("FAKE_GPUS", '"LibraryNotFound"'))


def _get(handle, key):
    if key not in handle:
        raise NVMLError_NotSupported(key)
    value = handle[key]
    return value.encode() if handle.get("bytes") and isinstance(value, str) else value


def nvmlInit():
    if isinstance(_gpus(), str):
        raise globals()[f"NVMLError_{_gpus()}"]("invented")


def nvmlDeviceGetCount():
    return len(_gpus())


def nvmlDeviceGetHandleByIndex(index):
    if _gpus()[index].get("lost"):
        raise NVMLError_NotFound(index)
    return _gpus()[index]


def nvmlDeviceGetHandleByUUID(uuid):
    uuid = uuid if isinstance(uuid, str) else uuid.decode()     # the real one takes both
    lost = os.environ.get("FAKE_GPU_LOST", "")
    if os.path.exists(lost):
        with open(lost) as names:
            if uuid in names.read():
                raise NVMLError_GpuIsLost("GPU is lost")
    parts = [part for gpu in _gpus() for part in (gpu, *gpu.get("mig", ())) if part]
    for part in parts:
        if part.get("uuid") == uuid:
            return part
    raise NVMLError_NotFound(uuid)


def nvmlDeviceGetMigMode(handle):
    _get(handle, "uuid")
    return [int("mig" in handle)] * 2


def nvmlDeviceGetMaxMigDeviceCount(handle):
    return len(_get(handle, "mig"))


def nvmlDeviceGetMigDeviceHandleByIndex(handle, index):
    if handle["mig"][index] is None:
        raise NVMLError_NotFound(index)
    return handle["mig"][index]


def nvmlDeviceGetUUID(handle):
    return _get(handle, "uuid")


def nvmlDeviceGetName(handle):
    return _get(handle, "name")


def nvmlDeviceGetMemoryInfo(handle):
    if not handle.get("memory", True):
        raise NVMLError_NotSupported("memory")
    return _get(handle, "uuid")         # nobody looks at the numbers
