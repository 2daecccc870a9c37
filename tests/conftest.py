"""Eight simulated CPU devices, strict dtypes and ranks, warnings as errors, and the tiny models tests share."""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before JAX is imported, and inherited by every process that a test starts: each program of a command is compiled once
# for all tests, and anew in each run of the suite. The models' tests run on an accelerator too, in full float32:
#   TEST_PLATFORM=cuda JAX_DEFAULT_MATMUL_PRECISION=highest python -m pytest tests/models
os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORM", "cpu")
if "PYTEST_XDIST_WORKER" in os.environ:  # it runs a process a core: threads of one would only wait for each other
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
else:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tortoise_jax-tests-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
if importlib.metadata.version("jax").startswith("0.10."):  # a flag that a later XLA may not know would end the process
    # Compile in 0.6 of the time, to fewer pieces; and in one thread.
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

import hypothesis
import jax
import pytest

if TYPE_CHECKING:
    from tests.support.parity import Twin
    from tests.support.torch_reference import DiscreteVAE, UnifiedVoice

WORKER = "PYTEST_XDIST_WORKER" in os.environ  # of pytest-xdist: a process that another one with this file has started
MANY_MAPPINGS = 30_000
NEVER = 1e9

if not WORKER:
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

jax.config.update("jax_persistent_cache_min_compile_time_secs", NEVER)  # a test's own programs: none is read again
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiles three times as fast; tiny models run alike
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, max_examples=20)
hypothesis.settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    if WORKER or not config.getoption("numprocesses", None):
        import_what_tests_need()
    for line in (
        "error",
        "default::ResourceWarning",
        "default::pytest.PytestUnraisableExceptionWarning",
        # Other packages' deprecations are theirs to mend; ours are raised in our own modules.
        r"ignore::DeprecationWarning:(?!tortoise_jax|convert|configs|train|tests)",
        r"ignore::PendingDeprecationWarning:(?!tortoise_jax|convert|configs|train|tests)",
        r"ignore::FutureWarning:(?!tortoise_jax|convert|configs|train|tests)",
    ):
        config.addinivalue_line("filterwarnings", line)


def import_what_tests_need() -> None:
    """Not in a process that only hands tests out, which it would delay by seconds; and before warnings are errors."""
    from tests.support import runs, torch_reference  # noqa: F401

    gc.freeze()  # all this stays: to look through it again and again takes a tenth of the time to trace programs
    gc.set_threshold(50_000)  # of 700: and so does looking through what is traced


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go() -> Iterator[None]:
    """Each compiled program of a step is a thousand memory mappings on CPU; beyond 65,530 XLA dies of SIGSEGV."""
    yield
    maps = Path("/proc/self/maps")  # Linux only
    if maps.exists() and len(maps.read_bytes().splitlines()) > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def torch_voice() -> UnifiedVoice:
    """Not to be changed by a test: parameters without gradients, no dropout."""
    from tests.support import torch_reference

    return torch_reference.tiny_unified_voice(seed=1).requires_grad_(False)


@pytest.fixture(scope="session")
def voice(torch_voice: UnifiedVoice) -> Twin:
    """`torch_voice` converted to Flax."""
    from tests.support.parity import voice_twin

    return voice_twin(torch_voice)


@pytest.fixture(scope="session")
def torch_dvae() -> DiscreteVAE:
    """Not to be changed by a test (a training forward moves its codebook)."""
    from tests.support import torch_reference

    return torch_reference.tiny_dvae(seed=1).requires_grad_(False)


@pytest.fixture(scope="session")
def dvae(torch_dvae: DiscreteVAE) -> Twin:
    """`torch_dvae` converted to Flax."""
    from tests.support.parity import dvae_twin

    return dvae_twin(torch_dvae)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with recordings and their data set, not to be changed; whole runs are written beside them.

    All workers have it in common. Each run beside it is made by a fixture of the session with `runs.made_once`, or has
    a name that one test alone gives it; to write into a finished one, a test takes a copy.
    """
    from tests.support import runs

    base = tmp_path_factory.getbasetemp()
    return runs.made_once((base.parent if WORKER else base) / "project", runs.write_project)


@pytest.fixture
def compilers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As train.py compiles for machines that are not here, in a process whose JAX has started.

    With Flax's own promotions, and optimised, in quick tests with little effort.
    """
    from tests.support.compilers import LITTLE_EFFORT
    from tortoise_jax import parallel

    slow = request.node.get_closest_marker("slow")
    for name, value in parallel.COMPILING_AHEAD.items():
        monkeypatch.setenv(name, value)
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_exec_time_optimization_effort", 0.0 if slow else float(LITTLE_EFFORT))
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_exec_time_optimization_effort", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
