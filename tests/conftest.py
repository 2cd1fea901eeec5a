"""Settings for all tests."""

import importlib.metadata
import os

import pytest

# Read when JAX starts. Machine code without optimisations, in one piece and, where XLA still has
# that choice, not by way of MLIR: the tests compile for longer than they compute. And eight CPU
# devices, so that sharded programs are more than a formality.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK += "--xla_cpu_use_fusion_emitters=false "
EIGHT = "--xla_force_host_platform_device_count=8 "
os.environ["XLA_FLAGS"] = EIGHT + QUICK + os.environ.get("XLA_FLAGS", "")


@pytest.fixture(autouse=True, scope="module")
def programs_are_forgotten():
    """Compiled programs of one file are of no use to the next, and take gigabytes together."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture
def float64():
    """The test, in float64."""
    import jax

    with jax.enable_x64(True):
        yield
