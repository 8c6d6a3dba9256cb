"""Unchanged programs of other projects that take an executor, its submit or its map; the functions are in this file."""

import asyncio
import random

import pytest

import minipool

pytestmark = pytest.mark.thirdparty


# ---- what the programs compute ----

def rosenbrock(x):
    return sum(100 * (b - a * a) ** 2 + (1 - a) ** 2 for a, b in zip(x[:-1], x[1:]))


def log_probability(x):
    return -0.5 * float((x ** 2).sum())


def ones(individual):
    return (sum(individual),)


def belegundu(values):
    x, y = values
    return [-2 * x + y, 2 * x + y], [-x + y - 1, x + y - 7]


def cube(n):
    return n ** 3


class TestSamplersAndOptimisers:
    def test_scipy_differential_evolution(self, pool):
        optimize = pytest.importorskip("scipy.optimize")
        found = optimize.differential_evolution(rosenbrock, [(-2, 2)] * 2, workers=pool.map, updating="deferred",
                                                polish=False, maxiter=200, popsize=10, tol=1e-8, **seed(optimize))
        assert found.fun < 1e-6 and found.x == pytest.approx([1, 1], abs=0.01)

    def test_scipy_brute(self, pool):
        optimize = pytest.importorskip("scipy.optimize")
        best = optimize.brute(rosenbrock, ((-2, 2.25, 0.25),) * 2, finish=None, workers=pool.map)
        assert best == pytest.approx([1, 1])

    def test_emcee(self, pool):
        emcee, numpy = pytest.importorskip("emcee"), pytest.importorskip("numpy")
        start = numpy.random.default_rng(1).normal(size=(8, 2))
        sampler = emcee.EnsembleSampler(8, 2, log_probability, pool=pool)
        sampler.run_mcmc(start, 20)
        assert sampler.get_chain().shape == (20, 8, 2) and numpy.isfinite(sampler.get_log_prob()).all()

    def test_deap(self, pool):
        base, creator, tools, algorithms = (
            pytest.importorskip(f"deap.{name}") for name in ("base", "creator", "tools", "algorithms"))
        random.seed(1)
        if not hasattr(creator, "Best"):
            creator.create("Best", base.Fitness, weights=(1.0,))
            creator.create("Bits", list, fitness=creator.Best)
        box = base.Toolbox()
        box.register("individual", tools.initRepeat, creator.Bits, lambda: random.randint(0, 1), 20)
        box.register("evaluate", ones), box.register("mate", tools.cxTwoPoint)
        box.register("mutate", tools.mutFlipBit, indpb=0.05), box.register("select", tools.selTournament, tournsize=3)
        box.register("map", pool.map)
        people, _ = algorithms.eaSimple([box.individual() for _ in range(30)], box, 0.5, 0.2, 15, verbose=False)
        assert max(sum(p) for p in people) >= 17

    def test_platypus_with_its_submit_evaluator(self, pool):
        platypus = pytest.importorskip("platypus")
        problem = platypus.Problem(2, 2, 2)
        problem.types[:] = [platypus.Real(0, 5), platypus.Real(0, 3)]
        problem.constraints[:] = "<=0"
        problem.function = belegundu
        search = platypus.NSGAII(problem, population_size=20, evaluator=platypus.SubmitEvaluator(pool.submit))
        search.run(60)
        assert len(search.result) == 20


def seed(optimize):
    """scipy 1.15 renamed the argument that makes it repeatable."""
    import inspect
    name = "rng" if "rng" in inspect.signature(optimize.differential_evolution).parameters else "seed"
    return {name: 1}


class TestBarsGraphsAndLoops:
    def test_tqdm_over_as_completed(self, pool, capsys):
        tqdm = pytest.importorskip("tqdm")
        futures = [pool.submit(cube, n) for n in range(20)]
        done = tqdm.tqdm(minipool.as_completed(futures), total=20)
        assert sorted(future.result() for future in done) == [n ** 3 for n in range(20)]
        assert "20/20" in capsys.readouterr().err

    def test_tqdm_over_map(self, pool, capsys):
        tqdm = pytest.importorskip("tqdm")
        assert list(tqdm.tqdm(pool.map(cube, range(20)), total=20)) == [n ** 3 for n in range(20)]

    def test_tqdm_s_own_map_makes_its_own_pool(self, capsys):
        concurrent = pytest.importorskip("tqdm.contrib.concurrent")

        def factory(max_workers=None, **its_lock_for_forked_children):
            return minipool.Executor("local", max_workers=2)
        assert concurrent._executor_map(factory, cube, range(20)) == [n ** 3 for n in range(20)]
        assert capsys.readouterr().err.count("/20") > 1     # it moved; its last callbacks may come after its end

    def test_dask_computes_on_it(self, pool):
        dask = pytest.importorskip("dask")
        graph = dask.delayed(sum)([dask.delayed(cube)(n) for n in range(10)])
        with dask.config.set(scheduler=pool):
            assert graph.compute() == sum(n ** 3 for n in range(10))

    def test_asyncio_runs_in_it(self, pool):
        async def main():
            loop = asyncio.get_running_loop()
            return await asyncio.gather(*(loop.run_in_executor(pool, cube, n) for n in range(5)))
        assert asyncio.run(main()) == [0, 1, 8, 27, 64]

    def test_tornado_runs_in_it(self, pool):
        ioloop = pytest.importorskip("tornado.ioloop")

        async def main():
            return await ioloop.IOLoop.current().run_in_executor(pool, cube, 3)
        assert asyncio.run(main()) == 27
