"""What a value is: as the parser gives it, and as it stands in a built configuration.

A built value can be hashed and compared by content, so that a dataclass that holds it can be a
static argument of a jitted function, and two loads of one file are equal.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Macro:
  """`%name` in a file."""

  name: str

  def __str__(self) -> str:
    return f"%{self.name}"


REQUIRED = Macro("gin.REQUIRED")


@dataclasses.dataclass(frozen=True)
class Reference:
  """`@scope/name`, or with `()` what calling it returns."""

  scope: tuple[str, ...]
  name: str
  evaluate: bool

  def __str__(self) -> str:
    return "@" + "/".join([*self.scope, self.name]) + ("()" if self.evaluate else "")


class FrozenMapping(Mapping[Any, Any]):
  """A mapping that can be hashed: what a dict in a gin file becomes."""

  def __init__(self, items: Mapping[Any, Any]) -> None:
    self._items = dict(items)

  def __getitem__(self, key: Any) -> Any:
    return self._items[key]

  def __iter__(self) -> Iterator[Any]:
    return iter(self._items)

  def __len__(self) -> int:
    return len(self._items)

  def __hash__(self) -> int:
    return hash(frozenset(self._items.items()))

  def __repr__(self) -> str:
    return f"FrozenMapping({self._items!r})"


@dataclasses.dataclass(frozen=True)
class Bound:
  """`@name` with bindings: the function (or class) with some arguments given."""

  target: Callable[..., Any]
  arguments: FrozenMapping

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self.target(*args, **{**self.arguments, **kwargs})


@dataclasses.dataclass(frozen=True)
class Made:
  """`@name()` of a function that returned another: equal when made in the same way.

  optax.cosine_decay_schedule(...) returns a new local function each time, which by itself neither
  compares with another nor says what it was made of.
  """

  maker: Callable[..., Any]
  arguments: FrozenMapping
  function: Callable[..., Any] = dataclasses.field(compare=False, repr=False)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self.function(*args, **kwargs)


def walk(value: Any) -> Iterator[Any]:
  """The leaves of a parsed value: literals, references and macros."""
  if isinstance(value, (list, tuple)):
    for item in value:
      yield from walk(item)
  elif isinstance(value, dict):
    for key, item in value.items():
      yield from walk(key)
      yield from walk(item)
  else:
    yield value
