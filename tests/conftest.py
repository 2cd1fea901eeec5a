"""Settings for all tests."""

import os

import pytest

# Read when JAX starts. Eight CPU devices, so that sharded programs are more than a formality; and
# machine code without LLVM's optimisations, since the tests compile for longer than they compute.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    + os.environ.get("XLA_FLAGS", "")
)


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
