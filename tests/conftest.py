"""Makes every machine the same for the suite: eight CPU devices, no chance, no leftovers."""

import os

# Before JAX is imported: it reads both when its backend starts, and the tests need a mesh on any machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )

import hypothesis
import jax
import numpy as np
import pytest
from jax.sharding import Mesh

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


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    """A (4, 2) mesh over the eight CPU devices, axes `fsdp` and `tensor`."""
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
