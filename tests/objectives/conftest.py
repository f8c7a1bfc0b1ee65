"""Fixtures of the objectives' tests."""

import jax
import pytest


@pytest.fixture(scope="module")
def x64():
  """Double precision for one test module, and for no other."""
  with jax.enable_x64(True):
    yield
