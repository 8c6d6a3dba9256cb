"""Watches the server processes that the tests start: each global that one resolves from a pickle is a line in a file.

tests/conftest.py puts this folder on the PYTHONPATH of all child processes; the file is MINIPOOL_TEST_AUDIT, and must
stay empty. Other processes, workers among them, open users' pickles for a living and are left alone.
"""

import os
import sys


def _watch(path):
    def hook(event, arguments):
        if event == "pickle.find_class":
            line = f"{os.getpid()} {' '.join(sys.orig_argv[1:4])}: {'.'.join(map(str, arguments))}\n"
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(file, line.encode(errors="replace"))
            os.close(file)
    sys.addaudithook(hook)


def _next():
    """Run the sitecustomize that this one hides, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    from importlib.machinery import PathFinder
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path) != here])
    if spec and spec.loader:
        from importlib.util import module_from_spec
        spec.loader.exec_module(module_from_spec(spec))


if os.environ.get("MINIPOOL_TEST_AUDIT") and {"serve", "_child"} & set(sys.orig_argv[1:]):
    _watch(os.environ["MINIPOOL_TEST_AUDIT"])
_next()
