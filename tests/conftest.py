"""Makes every machine the same for the suite: eight CPU devices, no chance, no leftovers; and fast."""

import contextlib
import gc
import importlib
import os
import pathlib
import sys
import tempfile
from typing import Any

from tests.processes import (
    draw_keys_in_one_step,
    hasty_flags,
    leave_origins_unsaid,
    quick_directory,
    remember_initial_shapes,
    remember_kinds_of_values,
    remember_traced_initializers,
    run_in_place,
    share_lowering_context,
    spare_garbage_collector,
)

# Before JAX is imported: it reads all of these when it starts, and so does every process that a test starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests need a mesh on any machine. What is given already comes last, so that it counts.
os.environ["XLA_FLAGS"] = " ".join(
    [*hasty_flags(), "--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", "")]
).strip()
# A program is compiled once for all tests, workers, processes and runs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
# Also what compiles quickly: to look for it costs a tenth of that, and each is looked for anyway.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Where in its source an operation was called is told only in errors of XLA's.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Where no bytecode is kept, each of the processes that tests start compiles the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# NumPy's threads look for work for a while before they sleep: tens of milliseconds for each process.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Every save waits for its disk dozens of times: what the tests write lies in memory, where it has room.
os.environ.setdefault("TMPDIR", quick_directory())

import hypothesis
import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.by_numpy import move_and_combine_by_numpy

share_lowering_context()
leave_origins_unsaid()
remember_traced_initializers()  # Before Flax is imported, which has made some then.
remember_initial_shapes()
draw_keys_in_one_step()
remember_kinds_of_values()
move_and_combine_by_numpy()
run_in_place()
spare_garbage_collector()

# Both were looked up before.
tempfile.tempdir = None
sys.dont_write_bytecode = False

# Two programs in flight share one pool of threads: on few cores each may hold what the other's collectives
# wait for, and the process dies after 40 seconds.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Deterministic: a failure on one machine is a failure on all. No deadline: the first example compiles.
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("suite")

# The files of more than five seconds of processor time, longest first: started last, one of them would keep
# one worker busy while the others are done.
_SLOWEST = (
    "tests/zoo/test_zoo_models.py",
    "tests/zoo/test_zoo_modules.py",
    "tests/hosts/test_hosts.py",
    "tests/verifying/test_verify.py",
    "tests/verifying/test_settling.py",
    "tests/planning/suggesting/test_unseen_pairs.py",
    "tests/laws/test_law_03_owners.py",
    "tests/docs/test_docs.py",
    "tests/campaigns/test_campaigns.py",
    "tests/layouts/test_numpy_archives.py",
    "tests/planning/verdict/test_growth.py",
    "tests/storage/saving/test_saving.py",
    "tests/benchmarks/test_commands.py",
    "tests/test_demo.py",
    "tests/storage/saving/test_kept_aside.py",
    "tests/benchmarks/test_restores.py",
    "tests/verifying/test_mistakes.py",
    "tests/conformance/test_managers.py",
    "tests/laws/test_what_an_optimizer_trains.py",
    "tests/laws/test_law_02_collections.py",
    "tests/storage/reading/test_reading.py",
    "tests/planning/diagnosis/test_hints.py",
    "tests/cli/test_convert_to_linen.py",
    "tests/storage/saving/test_aside_follows_weights.py",
    "tests/planning/diagnosis/test_hints_never_lead_away.py",
    "tests/verifying/test_hard_programs.py",
    "tests/verifying/test_untold.py",
    "tests/storage/restoring/test_from_linen.py",
    "tests/cli/test_convert.py",
    "tests/planning/rules/test_add.py",
    "tests/types/test_types.py",
    "tests/handler/test_optimizers.py",
    "tests/laws/test_saving_by_the_laws.py",
    "tests/benchmarks/test_growth.py",
    "tests/planning/suggesting/test_suggest_end_to_end.py",
    "tests/storage/checkpoint/test_unfinished.py",
    "tests/laws/test_fuzz.py",
    "tests/handler/test_forms.py",
    "tests/planning/suggesting/test_confusable_names.py",
    "tests/handler/test_targets.py",
    "tests/planning/verdict/test_verdict_before_bytes.py",
    "tests/laws/test_law_08_moments.py",
    "tests/conformance/test_one_item.py",
    "tests/planning/suggesting/test_random_networks.py",
    "tests/storage/saving/test_shapes_of_programs.py",
    "tests/cli/test_start.py",
    "tests/handler/test_policies.py",
    "tests/gallery/test_gallery.py",
)

# Of so many tests each folder's stay on one worker: what one file has compiled, the next one need not load.
_MANY = 5000


def pytest_configure(config: pytest.Config) -> None:
    """Has a worker of a run tell how each test ended, not also that it began and was set up well."""
    plugins = config.pluginmanager.get_plugins() if hasattr(config, "workerinput") else ()
    worker = next((plugin for plugin in plugins if type(plugin).__name__ == "WorkerInteractor"), None)
    if (
        not worker
        or config.option.verbose > 0
        or config.option.durations is not None
        or config.option.xmlpath
    ):
        return
    tell = worker.pytest_runtest_logreport

    def tell_the_end(report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            tell(report)

    # Hooks are looked up when a plugin is registered.
    config.pluginmanager.unregister(worker)
    worker.pytest_runtest_logstart = worker.pytest_runtest_logfinish = None
    worker.pytest_runtest_logreport = tell_the_end
    config.pluginmanager.register(worker)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Has `--dist loadfile` keep the tests of a folder on one worker where the whole suite runs."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class FolderScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file.rpartition("/")[0] if len(self.collection) > _MANY else file

    return FolderScheduling(config, log)


def pytest_collection() -> None:
    """Shares out between the workers of a run what it costs to import each test file for the first time.

    Its assertions are rewritten and kept as bytecode; all workers would do so for all files at the same time.
    """
    number, count = os.environ.get("PYTEST_XDIST_WORKER", "")[2:], os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if not number.isdigit() or count is None:
        return
    root = pathlib.Path(__file__).parent
    for path in sorted(root.rglob("test_*.py"))[int(number) :: int(count)]:
        # Whatever is wrong with it is told when its tests are collected.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))


def pytest_collection_finish() -> None:
    spare_garbage_collector()
    # How much is frozen here takes long to tell, and each restore would ask.
    importlib.import_module("orbax_nnx_handler.storage")._MANY = 0


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Spares it what a file leaves behind: programs that JAX keeps, seconds for each full collection."""
    if nextitem is None or nextitem.path != item.path:
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slowest files first; all else stays as it was collected."""
    rank = {name: at for at, name in enumerate(_SLOWEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends a worker as soon as its results are told.

    To take down thousands of programs one by one takes seconds, and a save of Orbax's that could not begin
    leaves threads that wait for it for minutes: the run would wait for both.
    """
    if hasattr(config, "workerinput"):
        os._exit(0)


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    """A (4, 2) mesh over the eight CPU devices, axes `fsdp` and `tensor`."""
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
