"""Settings for all tests."""

import os

import pytest

# Eight CPU devices, so that sharded programs are more than a formality. Read when JAX starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)


@pytest.fixture
def float64():
    """The test, in float64."""
    import jax

    with jax.enable_x64(True):
        yield
