"""More unchanged programs of other projects that take an executor, its submit or its map."""

import asyncio
import math

import pytest
from processes import ROOT

pytestmark = [pytest.mark.thirdparty, pytest.mark.filterwarnings("ignore")]     # what they warn of is theirs


# ---- what the programs compute ----

def sphere(x):
    return float(sum(v * v for v in x))


def parabola(x, y=0):
    return (x - 1) ** 2 + (y + 2) ** 2


def peak(x):
    return x + 0.1 ** 2 / (0.1 ** 2 + x ** 2)


def log_likelihood(x):
    return -0.5 * float((x ** 2).sum())


def prior(u):
    return 10 * u - 5


def double(x):
    return 2 * x


def plus_one(y):
    return y + 1


def ishigami(x):
    return math.sin(x[0]) + 7 * math.sin(x[1]) ** 2 + 0.1 * x[2] ** 4 * math.sin(x[0])


class TestOptimisers:
    def test_scipy_shgo(self, pool):
        optimize = pytest.importorskip("scipy.optimize")
        found = optimize.shgo(sphere, [(-1, 1)] * 2, n=16, sampling_method="sobol", workers=pool.map)
        assert found.fun == pytest.approx(0, abs=1e-6)

    def test_scipy_quad_vec(self, pool):
        integrate = pytest.importorskip("scipy.integrate")
        assert integrate.quad_vec(math.exp, 0, 1, workers=pool.map)[0] == pytest.approx(math.e - 1)

    def test_nevergrad_minimises_with_an_executor(self, pool):
        nevergrad = pytest.importorskip("nevergrad")
        optimizer = nevergrad.optimizers.OnePlusOne(parametrization=2, budget=60, num_workers=2)
        optimizer.parametrization.random_state.seed(1)
        found = optimizer.minimize(sphere, executor=pool, batch_mode=False)
        assert sphere(found.value) < 1

    def test_optuna_asks_and_tells(self, pool):
        optuna = pytest.importorskip("optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        for _ in range(10):
            trials = [study.ask() for _ in range(4)]
            points = [trial.suggest_float("x", -5, 5) for trial in trials]
            for trial, value in zip(trials, pool.map(parabola, points)):
                study.tell(trial, value)
        assert len(study.trials) == 40 and abs(study.best_params["x"] - 1) < 1

    def test_optuna_optimises_in_threads_that_wait_for_jobs(self, pool):
        optuna = pytest.importorskip("optuna")
        study = optuna.create_study()
        study.optimize(lambda trial: pool.submit(parabola, trial.suggest_float("x", -5, 5)).result(), 8, n_jobs=2)
        assert len(study.trials) == 8 and study.best_value >= 4

    def test_pymoo_evaluates_by_starmap(self, pool):
        problem = pytest.importorskip("pymoo.core.problem")
        from pymoo.algorithms.soo.nonconvex.ga import GA
        from pymoo.optimize import minimize
        from pymoo.parallelization.starmap import StarmapParallelization

        class Sphere(problem.ElementwiseProblem):
            def __init__(self, **options):
                super().__init__(n_var=2, n_obj=1, xl=-2, xu=2, **options)

            def _evaluate(self, x, out, *args, **kwargs):
                out["F"] = sphere(x)
        runner = StarmapParallelization(lambda fn, rows: list(pool.map(lambda row: fn(*row), rows)))
        found = minimize(Sphere(elementwise_runner=runner), GA(pop_size=10), ("n_gen", 8), seed=1)
        assert found.F[0] < 0.5

    def test_cotengra_searches_contraction_trees(self, pool):
        cotengra = pytest.importorskip("cotengra")
        inputs, output, shapes, sizes = cotengra.utils.rand_equation(12, 3, seed=1)
        search = cotengra.HyperOptimizer(methods=["greedy"], max_repeats=8, parallel=pool, progbar=False)
        assert search.search(inputs, output, sizes).contraction_cost() > 0


class TestSamplers:
    @pytest.fixture
    def numpy(self):
        return pytest.importorskip("numpy")

    def test_zeus(self, pool, numpy):
        zeus = pytest.importorskip("zeus")
        sampler = zeus.EnsembleSampler(6, 2, log_likelihood, pool=pool, verbose=False)
        sampler.run_mcmc(numpy.random.default_rng(1).normal(size=(6, 2)), 10, progress=False)
        assert sampler.get_chain().shape == (10, 6, 2)

    def test_dynesty(self, pool, numpy):
        dynesty = pytest.importorskip("dynesty")
        sampler = dynesty.NestedSampler(log_likelihood, prior, 2, nlive=40, pool=pool, queue_size=2,
                                        rstate=numpy.random.default_rng(1))
        sampler.run_nested(maxiter=100, print_progress=False)
        assert sampler.results.niter >= 100

    def test_nautilus(self, pool, numpy):
        nautilus = pytest.importorskip("nautilus")
        sampler = nautilus.Sampler(prior, log_likelihood, 2, n_live=100, n_networks=0, pool=(pool, None), seed=1,
                                   pass_dict=False)
        sampler.run(n_eff=100, verbose=False)
        assert sampler.log_z == pytest.approx(math.log(2 * math.pi / 100), abs=0.5)

    def test_lmfit_samples_with_emcee(self, pool, numpy):
        lmfit, _ = pytest.importorskip("lmfit"), pytest.importorskip("emcee")
        parameters = lmfit.create_params(x={"value": 0.5, "min": -5, "max": 5})
        found = lmfit.Minimizer(lambda p: numpy.array([p["x"].value]), parameters).emcee(
            steps=10, nwalkers=8, burn=2, workers=pool, progress=False, is_weighted=True)
        assert found.chain.shape == (8, 8, 1)

    def test_adaptive_learns_a_function(self, pool):
        adaptive = pytest.importorskip("adaptive")
        learner = adaptive.Learner1D(peak, (-1, 1))
        adaptive.BlockingRunner(learner, npoints_goal=20, executor=pool, ntasks=2)
        assert learner.npoints >= 20 and learner.data[-1] == peak(-1)

    def test_salib_analyses_what_was_mapped(self, pool, numpy):
        sample, analyze = pytest.importorskip("SALib.sample.sobol"), pytest.importorskip("SALib.analyze.sobol")
        problem = {"num_vars": 3, "names": ["a", "b", "c"], "bounds": [[-math.pi, math.pi]] * 3}
        points = sample.sample(problem, 64, seed=1)
        values = numpy.array(list(pool.map(ishigami, points, chunksize=32)))
        found = analyze.analyze(problem, values, seed=1)
        assert found["S1"][1] == pytest.approx(0.44, abs=0.2) and found["ST"][0] > found["ST"][2]


class TestGraphsAndPipelines:
    def test_networkx_sums_parts_of_a_centrality(self, pool):
        networkx = pytest.importorskip("networkx")
        graph = networkx.path_graph(12)
        nodes = list(graph)
        parts = pool.map(networkx.betweenness_centrality_subset, [graph] * 4, [nodes[n::4] for n in range(4)],
                         [nodes] * 4)
        total = {node: 0.0 for node in nodes}
        for part in parts:
            for node, value in part.items():
                total[node] += value
        assert total == pytest.approx(networkx.betweenness_centrality(graph, normalized=False))

    def test_pipefunc_maps_a_pipeline(self, pool):
        pipefunc = pytest.importorskip("pipefunc")
        pipeline = pipefunc.Pipeline([pipefunc.PipeFunc(double, "y", mapspec="x[i] -> y[i]"),
                                      pipefunc.PipeFunc(plus_one, "z", mapspec="y[i] -> z[i]")])
        found = pipeline.map({"x": list(range(6))}, executor=pool, parallel=True, show_progress=False)
        assert list(found["z"].output) == [2 * n + 1 for n in range(6)]

    def test_dask_takes_it_for_its_process_scheduler(self, pool):
        dask = pytest.importorskip("dask")
        graph = dask.delayed(sum)([dask.delayed(double)(n) for n in range(10)])
        with dask.config.set(pool=pool, scheduler="processes"):
            assert graph.compute() == 90

    def test_dask_arrays(self, pool):
        array, dask = pytest.importorskip("dask.array"), pytest.importorskip("dask")
        with dask.config.set(scheduler=pool):
            assert array.ones((40, 40), chunks=10).sum().compute() == 1600

    def test_tornado_in_a_handler(self, pool):
        web = pytest.importorskip("tornado.web")
        from tornado import httpclient, httpserver, ioloop, netutil

        class Doubled(web.RequestHandler):
            async def get(self, n):
                self.write(str(await ioloop.IOLoop.current().run_in_executor(pool, double, int(n))))

        async def main():
            server, (socket,) = httpserver.HTTPServer(web.Application([("/(\\d+)", Doubled)])), \
                netutil.bind_sockets(0, "127.0.0.1")
            server.add_sockets([socket])
            answer = await httpclient.AsyncHTTPClient().fetch(f"http://127.0.0.1:{socket.getsockname()[1]}/21")
            server.stop()
            await server.close_all_connections()
            return answer.body
        assert asyncio.run(main()) == b"42"

    def test_asyncio_wraps_its_futures_and_groups_them(self, pool):
        async def main():
            async with asyncio.TaskGroup() as group:
                loop = asyncio.get_running_loop()
                tasks = [group.create_task(asyncio.wait_for(loop.run_in_executor(pool, double, n), 60))
                         for n in range(4)]
            return [task.result() for task in tasks] + [await asyncio.wrap_future(pool.submit(double, 9))]
        assert asyncio.run(main()) == [0, 2, 4, 6, 18]


class TestModels:
    def test_scikit_learn_searches_on_it_by_joblib(self, pool, monkeypatch):
        datasets, joblib = pytest.importorskip("sklearn.datasets"), pytest.importorskip("joblib")
        from sklearn.model_selection import GridSearchCV
        from sklearn.tree import DecisionTreeClassifier
        monkeypatch.syspath_prepend(ROOT / "examples")
        from joblib_backend import register_joblib
        register_joblib()
        with joblib.parallel_config(backend="minipool", executor=pool):
            search = GridSearchCV(DecisionTreeClassifier(random_state=1), {"max_depth": [1, 3]}, n_jobs=-1)
            search.fit(*datasets.load_iris(return_X_y=True))
        assert search.best_params_ == {"max_depth": 3}
