"""A stable text of a built configuration, from which a stage's key is hashed."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from rmd_jax.config.names import identity
from rmd_jax.config.values import Bound, Made


def canonical(obj: Any) -> str:
  """The text of a graph of dataclasses: equal for equal content, in any process.

  A dataclass is its name and its fields by name, those with `metadata={"key": False}` left out; a
  function is its dotted name.

  >>> canonical((1, 2.0, "a", None))
  "(1,2.0,'a',None)"

  Raises:
    TypeError: something in it has no stable text (an array, an open file).
  """
  if obj is None or isinstance(obj, (bool, int, float, str, bytes)):
    return repr(obj)
  if isinstance(obj, (tuple, list)):
    return "(" + "".join(f"{canonical(item)}," for item in obj).removesuffix(",") + ")"
  if isinstance(obj, Mapping):
    return "{" + ",".join(sorted(f"{canonical(k)}:{canonical(v)}" for k, v in obj.items())) + "}"
  if isinstance(obj, (Bound, Made)):
    target, call = (obj.target, "") if isinstance(obj, Bound) else (obj.maker, "()")
    return f"{identity(target)}{canonical(obj.arguments)}{call}"
  if isinstance(obj, functools.partial):
    return f"{canonical(obj.func)}{canonical(obj.args)}{canonical(obj.keywords)}"
  if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
    fields = [f for f in dataclasses.fields(obj) if f.metadata.get("key", True)]
    values = ",".join(f"{f.name}={canonical(getattr(obj, f.name))}" for f in fields)
    return f"{type(obj).__qualname__}({values})"
  name = getattr(obj, "__qualname__", "<locals>")
  if callable(obj) and not {"<lambda>", "<locals>"} & set(name.split(".")):
    return identity(obj)
  raise TypeError(
    f"{obj!r} has no stable text; a configuration holds numbers, strings, "
    "tuples, mappings, dataclasses and module-level functions"
  )
