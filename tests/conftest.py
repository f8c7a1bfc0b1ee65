"""All tests run on eight fake CPU devices, and refuse [B] against [B, 1]."""

import os

# Before jax starts a backend; the environment reaches the processes that tests start, too.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest

jax.config.update("jax_platforms", "cpu")  # where a pytest plugin has imported jax already
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def x64():
  """Double precision for one test module, and for no other."""
  with jax.enable_x64(True):
    yield
