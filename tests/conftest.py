"""Settings every test shares: eight fake CPU devices, one compilation cache."""

import os
import pathlib

# Before jax is imported anywhere: eight CPU devices stand in for a mesh. `gpu` tests
# run on a GPU machine with JAXTRAIN_TEST_PLATFORM=cuda.
_PLATFORM = os.environ.get("JAXTRAIN_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = _PLATFORM
if _PLATFORM == "cpu":
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        # Most of the time goes into compiling programs that run for milliseconds: a
        # third less without LLVM's optimizations.
        + " --xla_backend_optimization_level=0"
    )
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "JAXTRAIN_CACHE",
    str(pathlib.Path(__file__).resolve().parent.parent / ".cache" / "data"),
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"

jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_threefry_partitionable", True)

# Compilation makes the first example of a property slow; that is no flakiness.
settings.register_profile("jaxtrain", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("jaxtrain")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_gpu = pytest.mark.skip(reason="needs JAXTRAIN_TEST_PLATFORM=cuda and a GPU")
    for item in items:
        if "gpu" in item.keywords and _PLATFORM == "cpu":
            item.add_marker(skip_gpu)


@pytest.fixture(scope="session")
def shared_directory() -> pathlib.Path:
    """The folder of large test data beside the repository, or skip."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: it holds the test's larger data")
    return SHARED
