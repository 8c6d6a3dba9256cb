"""What travels, how, and what the worker makes of it; the worker is another process in another directory."""
import concurrent.futures
import functools
import importlib
import io
import itertools
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
import threading
import types

import cloudpickle
import pytest

import minipool

WORKER = """
import pickle, struct, sys
import minipool
import minipool_worker
source, sink = sys.stdin.buffer, sys.stdout.buffer
sys.stdout = sys.stderr
while head := source.read(8):
    blob, call = pickle.loads(source.read(struct.unpack("<Q", head)[0]))
    try:
        fn = minipool.decode_value(blob)
        args, kwargs, *_ = minipool.decode_value(bytearray(call))
        status, value = minipool.OK, minipool.encode_value(fn(*args, **kwargs))
    except BaseException as error:
        status, value = minipool.RAISED, minipool_worker.encode_exception(error, "worker 1", 1 << 30)
    data = value if isinstance(value, bytes) else bytes(value.read(0, value.size))
    answer = pickle.dumps((status, data))
    sink.write(struct.pack("<Q", len(answer)) + answer)
    sink.flush()
"""


def as_bytes(value):
    """Return what would travel: bytes, or all of a Blob."""
    return value if isinstance(value, bytes) else bytes(value.read(0, value.size))


class Worker:
    def __init__(self, folder):
        lib = folder / "lib"
        lib.mkdir()
        for module in ("minipool.py", "minipool_worker.py"):
            shutil.copy(os.path.join(os.path.dirname(minipool.__file__), module), lib)
        path = f"{lib}{os.pathsep}{os.path.dirname(os.path.dirname(cloudpickle.__file__))}"
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], cwd=folder, stdin=-1, stdout=-1,
                                        env={**os.environ, "PYTHONPATH": path})

    def ask(self, blob, call):
        question = pickle.dumps((blob, call))
        self.process.stdin.write(struct.pack("<Q", len(question)) + question)
        self.process.stdin.flush()
        status, data = pickle.loads(self.process.stdout.read(struct.unpack("<Q", self.process.stdout.read(8))[0]))
        if status != minipool.OK:
            raise minipool.decode_failure(status, data)
        return minipool.decode_value(bytearray(data))


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("worker"))
    yield worker
    worker.process.stdin.close()
    worker.process.wait(10)


class Session(minipool.Functions):
    def __init__(self, worker=None):
        super().__init__(os.urandom(8), itertools.count(1).__next__)
        self.worker = worker

    def run(self, fn, *args, **kwargs):
        return self.worker.ask(self.function(fn).blob, as_bytes(minipool.pack(*self.dumps_call(fn, args, kwargs)[:2])))


@pytest.fixture
def session(worker):
    return Session(worker)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Make modules in the client's working directory, project({"path": source}, name=source); return the last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make(files=(), **sources):
        for name, source in {**dict(files), **sources}.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return importlib.import_module(name.replace("/__init__", "").replace("/", "."))

    yield make
    for name in set(sys.modules) - before:
        del sys.modules[name]


def notebook(source, **names):
    """Run cells as a notebook does: in a `__main__` namespace that no file stands for."""
    space = {"__name__": "__main__", "__builtins__": __builtins__, **names}
    exec(textwrap.dedent(source), space)  # noqa: S102
    return types.SimpleNamespace(cell=lambda s: exec(textwrap.dedent(s), space), get=space.__getitem__)  # noqa: S102


class TestHooks:
    def test_the_private_hooks_of_cloudpickle_exist(self):
        inner = cloudpickle.cloudpickle
        assert callable(cloudpickle.Pickler._dynamic_function_reduce)
        assert callable(cloudpickle.Pickler._function_getnewargs)
        for name in ("_dynamic_class_reduce", "_function_setstate", "_class_setstate", "_extract_code_globals",
                     "_get_cell_contents", "subimport"):
            assert callable(getattr(inner, name))

    def test_a_function_reduces_to_the_parts_that_are_replaced(self):
        reduced = cloudpickle.Pickler(io.BytesIO())._dynamic_function_reduce(lambda: 1)
        _, newargs, (_, slots), _, _, setter = reduced
        assert len(newargs) == 5 and newargs[1] == {"__name__": __name__, "__package__": "", "__file__": __file__}
        assert setter is cloudpickle.cloudpickle._function_setstate
        assert {"__globals__", "__closure__", "_cloudpickle_submodules"} <= set(slots)

    def test_a_code_object_reduces_to_its_parts_with_its_file_s_name_in_the_eleventh_place(self):
        code = (lambda: 1).__code__
        make, parts = cloudpickle.cloudpickle._code_reduce(code)
        assert make is types.CodeType and parts[9] == code.co_varnames and parts[11] == code.co_name
        assert isinstance(parts[10], str)

    def test_importing_the_module_does_not_import_cloudpickle(self):
        code = "import minipool, sys; sys.exit('cloudpickle' in sys.modules)"
        assert subprocess.call([sys.executable, "-c", code], cwd=os.path.dirname(minipool.__file__)) == 0


GLOBALS = """
    model = None
    def init():
        global model
        model = 40
    def work(x): return model + x
    def helper(): return 1
    def use(): return helper()
"""


class TestSharedGlobals:
    def test_what_an_initializer_stores_is_seen_by_a_later_pickle(self, session):
        cells = notebook(GLOBALS)
        session.run(cells.get("init"))
        assert session.run(cells.get("work"), 2) == 42

    def test_so_in_a_local_module(self, session, project):
        helper = project(helper=GLOBALS)
        session.run(helper.init)
        assert session.run(helper.work, 2) == 42

    def test_so_when_the_client_never_bound_the_name(self, session):
        cells = notebook(GLOBALS.replace("model = None", ""))
        session.run(cells.get("init"))
        assert session.run(cells.get("work"), 2) == 42

    def test_a_name_bound_anew_at_the_client_reaches_the_worker(self, session):
        cells = notebook(GLOBALS)
        session.run(cells.get("init"))
        cells.cell("model = 1")
        assert session.run(cells.get("work"), 2) == 3

    def test_a_redefined_helper_arrives(self, session):
        cells = notebook(GLOBALS)
        assert session.run(cells.get("use")) == 1
        cells.cell("def helper(): return 2")
        assert session.run(cells.get("use")) == 2

    def test_two_namespaces_of_one_name_are_not_mixed(self, session):
        one, two = notebook("a = 1\ndef f(): return a"), notebook("a = 2\ndef f(): return a")
        assert [session.run(cells.get("f")) for cells in (one, two, one)] == [1, 2, 1]

    def test_two_sessions_are_not_mixed(self, worker):
        cells = notebook(GLOBALS)
        Session(worker).run(cells.get("init"))
        with pytest.raises(TypeError):
            Session(worker).run(cells.get("work"), 2)

    def test_a_forgotten_session_leaves_nothing_behind(self, session):
        cells = notebook(GLOBALS)
        session.run(cells.get("init"))
        session.run(lambda name: minipool._shared_objects.pop(name), session.session)
        with pytest.raises(TypeError):
            session.run(cells.get("work"), 2)

    def test_the_globals_carry_the_names_of_a_module(self, session, project):
        source = "def f(): return __name__, __package__, __file__, type(__builtins__).__name__"
        name, package, file, builtins = session.run(project({"pkg/__init__": "", "pkg/mod": source}).f)
        assert (name, package, builtins) == ("pkg.mod", "pkg", "dict")
        assert file.endswith("mod.py")

    def test_a_relative_import_in_a_function_is_from_its_package(self, session, project):
        cells = notebook("def f():\n    from . import dumps\n    return dumps(1)", __name__="json.mod")
        assert session.run(cells.get("f")) == "1"

    def test_a_sentinel_is_one_object_in_all_pickles(self, session):
        cells = notebook("""
            MISSING = object()
            def f(x=MISSING): return x is MISSING
            def g(x=MISSING): return x is MISSING""")
        assert session.run(cells.get("f"))
        assert session.run(cells.get("g"))
        assert session.run(cells.get("g"), cells.get("MISSING"))

    def test_so_is_one_that_no_global_names(self, session):
        marker = object()
        assert session.run(lambda given: given is marker, marker)

    def test_an_imported_function_of_a_library_is_a_global(self, session):
        cells = notebook("from os.path import join\ndef f(): return join('a', 'b')")
        assert session.run(cells.get("f")) == "a/b"

    def test_a_wrapper_with_a_library_s_globals_uses_the_library(self, session):
        space = notebook("import contextlib\n@contextlib.contextmanager\ndef f(): yield 5\ndef g():\n"
                         "    with f() as x: return x")
        assert session.run(space.get("g")) == 5


CASES = {
    "recursion": "def f(n=5): return n and n + f(n - 1)",
    "mutual recursion": "def f(n=5): return n and n + g(n - 1)\ndef g(n): return n and n + f(n - 1)",
    "a closure that contains itself":
        "def make():\n    def f(n=5): return n and n + f(n - 1)\n    return f\nf = make()",
    "super": "class A:\n    def m(self): return 10\nclass B(A):\n    def m(self): return super().m() + 5\n"
             "def f(): return B().m()",
    "annotations": "class T: pass\ndef f(x: T = 15, y: 'T' = 0) -> T: return x",
    "submodule": "import os.path\ndef f(): return len(os.path.join('a', 'b' * 13))",
    "partial of itself": "import functools\ndef g(n): return n and n + p(n - 1)\np = functools.partial(g)\n"
                         "def f(): return p(5)",
    "container of itself": "def g(n): return n and n + t[0](n - 1)\nt = (g,)\ndef f(): return t[0](5)",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass D:\n    x: int = 15\ndef f(): return D().x",
    "enum": "import enum\nclass E(enum.Enum):\n    A = 15\ndef f(): return E.A.value",
    "named tuple": "import collections\nP = collections.namedtuple('P', 'x')\ndef f(): return P(15).x",
    "keyword default": "def f(*, x=15): return x",
    "cached function": "import functools\n@functools.lru_cache(maxsize=9)\ndef g(n): return n and n + g(n - 1)\n"
                       "def f(): return g(5)",
    "generic class": "import typing\nT = typing.TypeVar('T')\nclass G(typing.Generic[T]):\n"
                     "    def m(self, x: T) -> T: return x\ndef f(): return G().m(15)",
    "generator": "def g(): yield 15\ndef f(): return next(g())",
}


class TestShapesOfFunctions:
    @pytest.mark.parametrize("case", CASES)
    def test_it_works(self, session, case):
        assert session.run(notebook(CASES[case]).get("f")) == 15

    @pytest.mark.parametrize("case", CASES)
    def test_it_works_from_a_module_object(self, session, project, case):
        project(helper=CASES[case])
        assert session.run(notebook("import helper\ndef call(): return helper.f()").get("call")) == 15

    def test_methods_partials_and_callables_are_pickled_every_time(self, session):
        cells = notebook("class C:\n    n = 1\n    def __call__(self): return self.n")
        c = cells.get("C")()
        assert session.run(c) == session.run(c.__call__) == session.run(functools.partial(c)) == 1
        c.n = 2
        assert session.run(c) == session.run(c.__call__) == session.run(functools.partial(c)) == 2


CHANGES = {
    "code": "use.__code__ = (lambda: 7).__code__",
    "helper's default": "helper.__defaults__ = (1,)",
    "keyword default": "use.__kwdefaults__ = {}",
    "global": "def helper(): return 2",
    "a name that was missing": "len = str",
    "class attribute": "Config.batch = 2",
    "method": "Config.method = lambda self: 2",
}


class TestCache:
    def test_a_function_is_pickled_once(self, session):
        f = notebook(GLOBALS).get("use")
        assert session.function(f) is session.function(f)

    def test_equal_pickles_share_one_entry(self, session):
        entries = [session.function(lambda: 1) for _ in range(10)]
        assert all(entry is entries[0] for entry in entries)

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_change_makes_a_new_entry(self, session, change):
        cells = notebook("""
            class Config:
                batch = 1
                def method(self): return 1
            def helper(): return 1
            def use(): return helper(), len, Config""")
        before = session.function(cells.get("use"))
        assert session.function(cells.get("use")) is before
        cells.cell(CHANGES[change])
        assert session.function(cells.get("use")) is not before

    def test_a_captured_variable_that_changed_makes_a_new_entry(self, session):
        def outer():
            x = 1
            def put(value):
                nonlocal x
                x = value
            return (lambda: x), put
        get, put = outer()
        assert session.run(get) == 1
        put(2)
        assert session.run(get) == 2

    def test_a_function_that_is_gone_is_forgotten(self, session):
        session.function(lambda: 1)
        assert not session._known

    def test_an_entry_ends_with_its_function_and_the_last_that_needs_it(self, session):
        def f(): return 3
        entry, number = session.function(f), session.function(f).number
        del entry
        assert not session.gone and session.function(f).number == number
        entry = session.function(f)
        del f
        assert not session.gone and not session._known
        del entry
        assert session.gone == [number] and not session._entries

    def test_what_is_pickled_every_time_is_not_kept(self, session):
        for n in range(20):
            session.function(functools.partial(max, n))
        assert len(session.gone) == 20 and not session._known and not session._entries

    def test_functions_that_hold_themselves_are_forgotten_in_the_end(self, worker, monkeypatch):
        monkeypatch.setattr(minipool, "KEPT_BYTES", 100_000)
        session = Session(worker)
        for n in range(300):
            def f(i):
                return i and f(i - 1) + n  # noqa: B023
            session.function(f)
        assert len(session._known) == len(session._entries) < 150

    def test_many_threads_get_one_entry(self, session):
        f, entries = notebook(GLOBALS).get("use"), []
        threads = [threading.Thread(target=lambda: entries.append(session.function(f))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(entries) == 8 and len(set(entries)) == 1


class TestByValue:
    def test_the_standard_library_and_installed_packages_travel_by_name(self):
        names = "os", "json", "math", "sys", "cloudpickle", "minipool", "pytest"
        assert not any(map(minipool.travels_by_value, names))

    def test_local_modules_main_and_made_up_modules_travel_by_value(self, project, monkeypatch):
        project(helper="")
        monkeypatch.setitem(sys.modules, "made_up", types.ModuleType("made_up"))
        assert all(map(minipool.travels_by_value, ("helper", "__main__", "made_up")))

    def test_an_environment_inside_the_working_directory_is_not_local(self, project, monkeypatch, tmp_path):
        project({"env/__init__": "", "env/library": ""})
        monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
        assert not minipool.travels_by_value("env.library")

    def test_a_module_object_brings_all_it_holds(self, session, project):
        project(helper="import json\nBASE = 2\nclass C:\n    x = 3\ndef g(y): return json.loads('1') + BASE + C.x + y")
        assert session.run(notebook("import helper\ndef f(): return helper.g(4) + helper.C.x").get("f")) == 13

    def test_module_cycles_end(self, session, project):
        project(one="import two\ndef a(): return 1\ndef b(): return two.c() + 1",
                two="import one\ndef c(): return one.a() + 1")
        assert session.run(notebook("import one\ndef f(): return one.b()").get("f")) == 3

    def test_submodules_of_a_local_package_travel(self, session, project):
        project({"pkg/__init__": "", "pkg/sub": "def g(): return 6"})
        assert session.run(notebook("import pkg.sub\ndef f(): return pkg.sub.g()").get("f")) == 6

    def test_one_unpicklable_name_costs_only_that_name(self, session, project):
        project(helper="import threading\nlock = threading.Lock()\ndef g(): return 1\ndef h(): return lock")
        cells = notebook("import helper\ndef f(): return helper.g()\ndef bad(): return helper.h()")
        assert session.run(cells.get("f")) == 1
        with pytest.raises(NameError, match="lock"):
            session.run(cells.get("bad"))

    def test_module_and_functions_share_one_namespace(self, session, project):
        project(helper=GLOBALS)
        cells = notebook("import helper\nfrom helper import init\ndef f(): init(); return helper.model")
        assert session.run(cells.get("f")) == 40
        assert session.run(sys.modules["helper"].work, 2) == 42

    def test_a_large_call_graph_in_a_module_is_no_deep_recursion(self, session, project):
        source = "\n".join(f"def f{i}(): return f{i + 1}() if {i} < 399 else 7" for i in range(400))
        project(helper=source)
        assert session.run(notebook("import helper\ndef f(): return helper.f300()").get("f")) == 7

    def test_a_result_is_an_instance_of_the_client_s_class(self, session, project):
        helper = project(helper="class C:\n    def m(self): return 8\ndef make(): return C()")
        method = helper.C.m
        result = session.run(notebook("import helper\ndef f(): return helper.make()").get("f"))
        assert isinstance(result, helper.C) and helper.C.m is method

    def test_what_a_job_stores_in_a_class_outlives_the_next_argument(self, session):
        cells = notebook("class C:\n    n = 0\ndef f(c):\n    C.n += 1\n    return C.n")
        assert [session.run(cells.get("f"), cells.get("C")()) for _ in range(3)] == [1, 2, 3]
        cells.get("C").n = 10
        assert session.run(cells.get("f"), cells.get("C")()) == 11

    def test_a_class_made_by_a_job_comes_back(self, session):
        made = session.run(notebook("def f():\n    class C:\n        def m(self): return 9\n    return C()").get("f"))
        assert made.m() == 9


class TestValues:
    def test_atoms_take_the_plain_pickler(self, session):
        call = session.dumps_call(max, (1, "a", None), {"k": 2.5})
        assert call == (pickle.dumps(((1, "a", None), {"k": 2.5}), 5), [], [])

    def test_a_writable_buffer_is_a_snapshot(self, session):
        data = bytearray(100_000)
        call, buffers, _ = session.dumps_call(max, (pickle.PickleBuffer(data),), {})
        packed = [as_bytes(minipool.pack(call, buffers, share)) for share in (True, False)]
        data[0] = 1
        assert len(call) < 1000 and packed[0] == packed[1] and data not in packed[0] and bytes(len(data)) in packed[0]

    def test_a_read_only_buffer_stays_where_it_lies(self, session):
        data = bytes(100_000)
        _, buffers, _ = session.dumps_call(max, (pickle.PickleBuffer(data),), {})
        assert buffers[0].obj is data

    def test_a_small_buffer_stays_in_the_pickle(self, session):
        assert session.dumps_call(max, (pickle.PickleBuffer(bytearray(1000)),), {})[1] == []

    def test_the_bytes_of_a_future_s_value_take_its_place_among_the_buffers(self, session):
        future, data = concurrent.futures.Future(), bytes(100_000)
        blob, buffers, inputs = session.dumps_call(max, (future, pickle.PickleBuffer(data)), {"again": [future]})
        assert buffers[0] is future and inputs == [future] and len(buffers) == 2
        buffers[0] = minipool.encode_value("value")
        (value, buffer), named = minipool.decode_value(as_bytes(minipool.pack(blob, buffers)))
        assert (value, named, bytes(buffer)) == ("value", {"again": ["value"]}, data)

    def test_arrays_arrive_writable_and_come_back(self, session):
        numpy = pytest.importorskip("numpy")
        def double(a):
            a *= 2
            return a
        assert (session.run(double, numpy.ones(100_000)) == 2).all()

    def test_a_result_of_atoms_is_a_plain_pickle(self):
        assert minipool.encode_value("a") == pickle.dumps("a", 5)

    def test_a_large_result_is_pulled_and_a_small_one_rides_along(self):
        small, large = minipool.encode_value("a" * 1000), minipool.encode_value("a" * minipool.INLINE)
        assert isinstance(small, bytes) and isinstance(large, minipool.Blob) and large.size > minipool.INLINE
        assert minipool.decode_value(as_bytes(large)) == "a" * minipool.INLINE

    def test_more_than_the_call_may_ride_with_it(self, session):
        data, _, _ = session.dumps_call(max, (1,), {}, (ValueError,))
        assert minipool.decode_value(data) == ((1,), {}, (ValueError,))

    def test_an_exception_comes_back_as_its_own_type(self, session, project):
        helper = project(helper="class Bad(Exception): pass\ndef f(): raise Bad('why', 3)")
        with pytest.raises(helper.Bad) as caught:
            session.run(helper.f)
        assert caught.value.args == ("why", 3)

    def test_an_exception_has_the_remote_traceback_as_its_cause(self, session):
        cells = notebook("def f(): raise ValueError('why')")
        with pytest.raises(ValueError) as caught:
            session.run(cells.get("f"))
        assert "ValueError: why" in str(caught.value.__cause__) and caught.value.__notes__ == ["raised by worker 1"]

    @pytest.mark.parametrize("raised", ["Bad(1, 2)", "Local()", "Silent()", "ValueError(lock)"])
    def test_an_exception_that_cannot_travel_becomes_a_remote_error(self, session, raised):
        cells = notebook(f"""
            import threading
            class Bad(Exception):
                def __init__(self, a, b): super().__init__("x")
            class Silent(Exception):
                def __init__(self): self.lock = threading.Lock()
                def __str__(self): raise RuntimeError
            def f():
                lock = threading.Lock()
                class Local(Exception):
                    def __reduce__(self): raise TypeError
                raise {raised}""")
        with pytest.raises(minipool.RemoteError) as caught:
            session.run(cells.get("f"))
        assert caught.value.type_name == raised.partition("(")[0] or "Local" in caught.value.type_name

    def test_a_result_that_cannot_be_pickled_names_its_type(self, session):
        with pytest.raises(pickle.PicklingError, match="cannot pickle the result, a lock: it is or holds"):
            session.run(threading.Lock)


class TestErrors:
    def refused(self, session, fn, *args):
        with pytest.raises(pickle.PicklingError) as caught:
            session.function(fn)
            session.dumps_call(fn, args, {})
        assert caught.value.__cause__ is not None
        return str(caught.value)

    def test_a_global_is_named(self, session):
        cells = notebook("import sqlite3\ndb = sqlite3.connect(':memory:')\ndef work(): return db")
        text = self.refused(session, cells.get("work"))
        assert "function work, global 'db': it is or holds an object of <class 'sqlite3.Connection'>" in text

    def test_a_function_that_captured_it_is_named(self, session):
        def work(): return lock
        lock = {"a": [threading.Lock()]}
        assert "work: it is or holds an object of <class '_thread.lock'>" in self.refused(session, work)

    def test_a_helper_s_global_is_named(self, session):
        cells = notebook("import threading\nlock = threading.Lock()\ndef g(): return lock\ndef f(): return g()")
        text = self.refused(session, cells.get("f"))
        assert "function f, global 'g', global 'lock': it is or holds an object of <class '_thread.lock'>" in text

    def test_an_argument_has_a_number(self, session):
        config = types.SimpleNamespace(a=1, logger=types.SimpleNamespace(lock=threading.Lock()))
        cells = notebook("def train(data, config): pass")
        text = self.refused(session, cells.get("train"), 1, config)
        assert "argument 1 of train: it is or holds an object of <class '_thread.lock'>" in text

    def test_a_global_of_a_function_that_is_an_argument_is_named(self, session):
        cells = notebook("import threading\nlock = threading.Lock()\ndef g(): return lock\ndef call(g): return g()")
        text = self.refused(session, cells.get("call"), cells.get("g"))
        assert "argument 0 of call, global 'lock': it is or holds an object of <class '_thread.lock'>" in text

    def test_a_keyword_argument_has_its_name(self, session):
        with pytest.raises(pickle.PicklingError, match="argument 'key' of max: it is or holds"):
            session.dumps_call(max, (1, 2), {"key": threading.Lock()})

    def test_endless_nesting_is_told(self, session):
        deep = []
        for _ in range(200_000):
            deep = [deep]
        assert "nested too deeply" in self.refused(session, math.sqrt, deep)

    def test_no_half_module_is_left_by_too_deep_a_chain(self, session):
        source = "\n".join(f"def f{i}(): return f{i + 1}()" for i in range(20_000))
        assert "nested too deeply" in self.refused(session, notebook(source).get("f0"))
