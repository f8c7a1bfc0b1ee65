"""Whether a parsed value fits an annotation, found out before anything is built."""

import collections.abc
import types
import typing
from collections.abc import Callable
from typing import Any

from rmd_jax.config.names import Public, did_you_mean
from rmd_jax.config.values import FrozenMapping, Reference

SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
MAPPINGS = (dict, collections.abc.Mapping)


def bare(annotation: Any) -> Any:
  """The annotation without Annotated, NewType and the like."""
  while True:
    if typing.get_origin(annotation) is typing.Annotated:
      annotation = typing.get_args(annotation)[0]
    elif isinstance(annotation, typing.NewType):
      annotation = annotation.__supertype__
    elif isinstance(annotation, typing.TypeVar):
      annotation = annotation.__bound__ or Any
    else:
      return annotation


def alternatives(annotation: Any) -> tuple[Any, ...]:
  """The members of a union, or the annotation alone."""
  annotation = bare(annotation)
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return tuple(x for arg in typing.get_args(annotation) for x in alternatives(arg))
  return (annotation,)


def mismatch(value: Any, annotation: Any, lookup: Callable[[str], Public | None]) -> str | None:
  """Why the value, macros already replaced, does not fit; None when it does."""
  options = alternatives(annotation)
  if any(_fits(value, option, lookup) for option in options):
    return None
  if isinstance(value, (list, tuple)):  # the item at fault says more than the whole
    for option in options:
      if typing.get_origin(option) in SEQUENCES and (why := _item_fault(value, option, lookup)):
        return why
  hint = ""
  if isinstance(value, Reference) and not value.evaluate:
    called = Reference(value.scope, value.name, True)
    if any(_fits(called, option, lookup) for option in options):
      hint = f"; did you mean {called}?"
  elif isinstance(value, Reference):
    uncalled = Reference(value.scope, value.name, False)
    if any(_fits(uncalled, option, lookup) for option in options):
      hint = f"; did you mean {uncalled}?"
  elif isinstance(value, str):
    choices = [
      c for o in options if typing.get_origin(o) is typing.Literal for c in typing.get_args(o)
    ]
    hint = did_you_mean(value, [c for c in choices if isinstance(c, str)])
  elif isinstance(value, (int, float)) and str in options:
    hint = f'; text needs quotes: "{value}"'
  shown = str(value) if isinstance(value, Reference) else repr(value)
  return f"expected {describe(annotation)}, not {shown}{hint}"


def _fits(value: Any, annotation: Any, lookup: Callable[[str], Public | None]) -> bool:
  if annotation in (Any, object):
    return True
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if isinstance(value, Reference):
    return _reference_fits(value, annotation, lookup)
  if annotation in (None, type(None)):
    return value is None
  if origin is typing.Literal:
    return any(type(value) is type(choice) and value == choice for choice in args)
  kind = origin or annotation
  if kind is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if kind in (bool, int, str, bytes, complex):
    return type(value) is kind
  if kind in SEQUENCES:
    return isinstance(value, (list, tuple)) and _item_fault(value, annotation, lookup) is None
  if kind in MAPPINGS:
    if not isinstance(value, dict):
      return False
    of_key, of_value = args or (Any, Any)
    return all(
      mismatch(k, of_key, lookup) is None and mismatch(v, of_value, lookup) is None
      for k, v in value.items()
    )
  return False


def _item_fault(
  value: list[Any] | tuple[Any, ...], annotation: Any, lookup: Callable[[str], Public | None]
) -> str | None:
  args = typing.get_args(annotation)
  if not args:
    return None
  if typing.get_origin(annotation) is tuple and args[-1] is not Ellipsis:
    if len(value) != len(args):
      return f"expected {len(args)} items, not {len(value)}"
    wanted = args
  else:
    wanted = (args[0],) * len(value)
  for number, (item, annotation_of_item) in enumerate(zip(value, wanted, strict=True), 1):
    if (why := mismatch(item, annotation_of_item, lookup)) is not None:
      return f"item {number}: {why}"
  return None


def _reference_fits(
  value: Reference, annotation: Any, lookup: Callable[[str], Public | None]
) -> bool:
  public = lookup(value.name)
  if public is None:  # reported as an unknown name
    return True
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  kind = origin or annotation
  if not value.evaluate:
    if kind is type:
      return isinstance(public.target, type) and (
        not args or not isinstance(args[0], type) or issubclass(public.target, args[0])
      )
    return kind is collections.abc.Callable or (
      _is_callable_protocol(kind) and not isinstance(public.target, type)
    )
  for result in alternatives(public.result):
    made = typing.get_origin(result) or result
    if made is Any or _is_protocol(kind):
      return True
    if kind is collections.abc.Callable:
      if made is kind or (isinstance(made, type) and "__call__" in dir(made)):
        return True
    elif isinstance(made, type) and isinstance(kind, type) and issubclass(made, kind):
      return True
  return False


def _is_protocol(annotation: Any) -> bool:
  return isinstance(annotation, type) and getattr(annotation, "_is_protocol", False)


def _is_callable_protocol(annotation: Any) -> bool:
  return _is_protocol(annotation) and "__call__" in vars(annotation)


def describe(annotation: Any) -> str:
  """An annotation in words that a person who writes gin files knows."""
  words = []
  for option in alternatives(annotation):
    origin, args = typing.get_origin(option), typing.get_args(option)
    kind = origin or option
    if option in (None, type(None)):
      words.append("None")
    elif kind is typing.Literal:
      words.append("one of " + ", ".join(map(repr, args)))
    elif kind in SEQUENCES:
      items = [a for a in args if a is not Ellipsis]
      of = " of " + ", ".join(describe(a) for a in items) if items else ""
      words.append(f"a list{of}")
    elif kind in MAPPINGS:
      words.append("a dict {key: value}")
    elif kind is collections.abc.Callable or _is_callable_protocol(kind):
      words.append("a function (@name)")
    elif kind in NAMES:
      words.append(NAMES[kind])
    else:
      name = getattr(kind, "__name__", str(kind))
      words.append(f"@{name}()" if isinstance(kind, type) else name)
  return " or ".join(dict.fromkeys(words))


NAMES = {
  bool: "True or False",
  bytes: "bytes",
  complex: "a complex number",
  float: "a number",
  int: "an integer",
  str: "a string",
}


def coerce(value: Any, annotation: Any) -> Any:
  """Integers become floats where the annotation has floats and no integers, at any depth.

  So `BETA = 1` and `BETA = 1.0` are one configuration, with one key.
  """
  options = alternatives(annotation)
  if type(value) is int and float in options and int not in options:
    return float(value)
  if isinstance(value, tuple):
    for option in options:
      args = typing.get_args(option)
      if typing.get_origin(option) in SEQUENCES and args:
        fixed = typing.get_origin(option) is tuple and args[-1] is not Ellipsis
        wanted = args if fixed else (args[0],) * len(value)
        if len(wanted) == len(value):
          return tuple(coerce(v, a) for v, a in zip(value, wanted, strict=True))
  if isinstance(value, FrozenMapping):
    for option in options:
      args = typing.get_args(option)
      if typing.get_origin(option) in MAPPINGS and args:
        return FrozenMapping({coerce(k, args[0]): coerce(v, args[1]) for k, v in value.items()})
  return value
