"""Strict JAX, quickly compiled, and a deterministic hypothesis for all tests."""

import os
import pathlib
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax: tests are exact on a CPU
# Tests compile without optimization, in a quarter of the time, because compiling takes most
# of it. `XLA_FLAGS= pytest` turns optimization on, here and in the processes they start.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    # jaxlib 0.11 and later abort at a flag that they do not know, such as this one.
    + " --xla_cpu_use_fusion_emitters=false" * (version("jaxlib") < "0.11"),
)

import hypothesis
import jax
import pytest

import data as datasets
from tasks import TASKS

# Compile a program once, for all processes and later runs. `pytest --cache-clear` forgets.
CACHE = pathlib.Path(__file__).with_name(".pytest_cache") / "d" / "jax"
options = {"jax_compilation_cache_dir": str(CACHE)}
options["jax_persistent_cache_min_compile_time_secs"] = 0.05
for name, value in options.items():
    os.environ[name.upper()] = str(value)  # for the processes that tests start
    jax.config.update(name, value)
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile(
    "star",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("star")


@pytest.fixture(scope="session")
def stand_in():
    return datasets.stand_in_images(datasets.FASHION_MNIST, (4000, 500))


@pytest.fixture(scope="session")
def stand_ins(stand_in):
    """Small stand-ins for all data sets: name of the function in data.py -> its result."""
    return {
        "fashion_mnist": stand_in,
        "mnist": stand_in,
        "cifar10": datasets.stand_in_images(datasets.CIFAR_10, (400, 50)),
        "cifar100": datasets.stand_in_images(datasets.CIFAR_100, (400, 50)),
        "text": datasets.stand_in_text(datasets.TINY_SHAKESPEARE, (20_000,)),
    }


@pytest.fixture
def use_stand_in(stand_ins, monkeypatch):
    """Tasks get the small stand-ins, whatever data they ask for."""
    for name, found in stand_ins.items():
        monkeypatch.setattr(datasets, name, lambda *_, found=found, **__: found)


@pytest.fixture
def small_task(use_stand_in):
    """(build, data) of fmnist_small on the stand-in."""
    return TASKS["fmnist_small"].build, TASKS["fmnist_small"].load()[0]


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs of a module's tests are not kept in memory to the end."""
    yield
    jax.clear_caches()
