"""Where activations lie on a mesh.

A model knows the logical names of its activations' axes, the caller knows the mesh. Left to itself,
the partitioner follows the parameters: with these split over `embed` it splits the residual stream
so, too, gathers the whole batch on every device and sums each norm over the mesh.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

Names = tuple[str | None, ...]
Constrain = Callable[[jax.Array, Names], jax.Array]

_constrain: ContextVar[Constrain | None] = ContextVar("constrain", default=None)


@contextmanager
def activations(constrain: Constrain) -> Iterator[None]:
  """While a model is traced in here, its activations go through `constrain`.

  Args:
    constrain: takes an array and a logical name (or None) for each of its dimensions; returns it
      with a sharding constraint. Under `vmap` it does not see the mapped axis.
  """
  token = _constrain.set(constrain)
  try:
    yield
  finally:
    _constrain.reset(token)


def place(x: Any, *names: str | None) -> Any:
  """The array (NumPy's, too), constrained as the model's caller says, or unchanged."""
  constrain = _constrain.get()
  return x if constrain is None else constrain(x, names)
