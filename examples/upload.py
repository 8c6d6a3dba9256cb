"""Code for every worker: a module, a package or a zip file becomes importable in jobs, on late workers too.

Copy this file beside your program; workers need no copy. Only minipool's public calls are used.

    upload(ex, "helpers.py")                    # also a folder (a package), or a .zip of modules and packages
    ex.submit(work)                             # `import helpers` inside work, or in what it imports, works now

Functions and modules of your own folder travel with the jobs that name them, so this is for what is imported late: by
an `import` inside a function, by a framework that is given a name, by unpickled data. Uploaded again, a module is
imported anew by the next job that asks for it. A worker's process imports for all who use it: of two programs that
upload a module of one name, the later one wins. It rides in each worker's memory, and nothing is left on a disk: there
are no compiled extensions, and a package reads files of its own by `importlib.resources`, not by its path.
`python examples/upload.py` shows it.
"""
from __future__ import annotations

import io
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a plain checkout; an installed minipool is found before it
from minipool import Executor

# what a worker itself is made of: another file of one of these names would break it for everybody
TAKEN = sys.stdlib_module_names | {"minipool", "minipool_worker", "cloudpickle", "pynvml"}


def _packed(path: Path) -> tuple[bytes, set[str]]:
    """Return a zip file of a module, a package or, as it is, a zip file; and the names that can be imported of it."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    packed = io.BytesIO()
    if path.suffix == ".zip":
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is no zip file")
        packed.write(path.read_bytes())
    elif path.suffix == ".py" or (path / "__init__.py").is_file():
        with zipfile.ZipFile(packed, "w") as file:
            for part in [path, *sorted(path.rglob("*"))]:
                if part.is_file() and "__pycache__" not in part.parts:
                    file.write(part, part.relative_to(path.parent))
    else:
        raise ValueError(f"{path} is no .py file, no .zip file, and no package: it has no __init__.py")
    with zipfile.ZipFile(packed) as file:
        names = file.namelist()
    if compiled := [name for name in names if name.endswith((".so", ".pyd"))]:
        raise ValueError(f"{path} holds {compiled[0]}: compiled extensions cannot be uploaded")
    tops = {name.split("/")[0].removesuffix(".py") for name in names}
    if taken := TAKEN & tops:
        raise ValueError(f"{path} holds {', '.join(sorted(taken))}: workers have that already, and stand on it")
    return packed.getvalue(), tops


def _install(name: str, packed: bytes, tops: set[str]) -> None:
    """Put it at the front of sys.path, or in the place of what was uploaded under that name before."""
    import importlib
    import os

    import minipool
    known = vars(minipool).setdefault("_uploads", {})       # one for the process, whoever uploads
    if name not in known:
        known[name] = os.memfd_create("upload")             # zipimport wants a file: one of memory
        sys.path.insert(0, f"/proc/{os.getpid()}/fd/{known[name]}")
    os.ftruncate(known[name], 0)
    os.pwrite(known[name], packed, 0)
    importlib.invalidate_caches()
    for module in [module for module in sys.modules if module.split(".")[0] in tops]:
        del sys.modules[module]


def upload(executor: Executor, path: str | Path) -> None:
    """Make a module (.py), a package (a folder) or a .zip file of such importable in later jobs, on late workers too.

    Raises ValueError for anything else, and for names that workers stand on; OSError if it cannot be read.
    """
    path = Path(path)
    executor.on_start(_install, path.name, *_packed(path))


# ---- a small program ----


def shout(text: str) -> str:
    """Do what a module does that only the workers can import."""
    import importlib
    return importlib.import_module("shouting").shout(text)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Executor() as ex:
        module = Path(folder) / "shouting.py"
        for line in ("text.upper()", "text.upper() + '!'"):
            module.write_text(f"def shout(text): return {line}\n")
            upload(ex, module)
            print(ex.submit(shout, "hello").result())


if __name__ == "__main__":
    main()
