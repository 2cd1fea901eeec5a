"""Settings for all tests."""

import os

# Two CPU devices, so that sharded programs are more than a formality. Read when JAX starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
