from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def without_hook() -> Iterator[None]:
  """Users call without the shape-checking hook of the tests: errors must not depend on it."""
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", before)
