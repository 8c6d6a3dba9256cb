"""CPython's own tests of concurrent.futures, run against minipool.Executor."""

import contextlib
import unittest

import pytest

import minipool

try:
    from test.test_concurrent_futures import executor, test_as_completed, test_init, test_shutdown, test_wait
except ImportError as missing:      # slim builds and many distributions leave it out; before 3.12 it was one file
    pytest.skip(f"this Python has no test.test_concurrent_futures: {missing}", allow_module_level=True)


class Pool(minipool.Executor):
    """What the suite calls an executor: it always says how many workers, and asks whether one is broken."""

    def __init__(self, max_workers=2, **options):
        super().__init__("local", max_workers=max_workers, **options)

    @property
    def _broken(self):
        return self._client.broken is not None


class Base(unittest.TestCase):
    worker_count = 2
    executor_type = Pool
    executor_kwargs = {}

    def setUp(self):
        self.executor = Pool(self.worker_count, **self.executor_kwargs)

    def tearDown(self):
        self.executor.shutdown()


class TestExecutor(executor.ExecutorTest, Base):
    pass


class TestWait(test_wait.WaitTests, Base):
    pass


class TestAsCompleted(test_as_completed.AsCompletedTests, Base):
    pass


class TestShutdown(test_shutdown.ExecutorShutdownTest, Base):
    # These four start programs that import the executor by name from concurrent.futures; test_executor.py has ours.
    test_interpreter_shutdown = test_submit_after_interpreter_shutdown = None
    test_hang_gh83386 = test_hang_gh94440 = None
    # This one wants a job to have begun as soon as submit returns, which no pool across processes can promise.
    test_cancel_futures = None


class TestInitializer(Base):
    def setUp(self):
        self.executor_kwargs = {"initializer": test_init.init, "initargs": ("initialized",)}
        super().setUp()

    test_initializer = test_init.InitializerMixin.test_initializer


class TestFailingInitializer(Base):
    def setUp(self):
        # the suite's pools log what was raised; here it is the cause of what every future raises
        self.executor_kwargs = {"initializer": test_init.init_fail}
        super().setUp()

    def _assert_logged(self, text):
        return contextlib.nullcontext()

    test_initializer = test_init.FailingInitializerMixin.test_initializer
