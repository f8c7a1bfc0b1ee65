"""From statements to a plan: what would be built, with every fault found before anything is.

gin's own evaluation is not used: it wraps objects in functions that look their bindings up in
global state when they are called, so that they depend on what was loaded last and cannot be
compared. The rules kept are gin's: a later statement wins; `@a/b/X()` sees the bindings of X, a/X
and a/b/X, the deepest winning, and what it refers to inherits its scope.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rmd_jax.config.checking import bare, coerce, mismatch
from rmd_jax.config.names import Public, did_you_mean, known_names, lookup
from rmd_jax.config.syntax import Key, Location, Statement
from rmd_jax.config.values import REQUIRED, Bound, FrozenMapping, Macro, Made, Reference, walk
from rmd_jax.errors import UserError

ROOT = Reference((), "Run", True)


@dataclasses.dataclass(frozen=True)
class Call:
  """A reference with its arguments, checked; they hold values and further calls."""

  public: Public
  reference: Reference
  arguments: Mapping[str, Any]
  location: Location

  def build(self, memo: dict[int, Any]) -> Any:
    """The object, each call made once.

    Raises:
      UserError: the object itself refuses its values.
    """
    if id(self) not in memo:
      memo[id(self)] = self._build(memo)
    return memo[id(self)]

  def _build(self, memo: dict[int, Any]) -> Any:
    arguments = {}
    for name, value in self.arguments.items():
      parameter = self.public.parameters.get(name)
      built = _build_value(value, memo)
      arguments[name] = built if parameter is None else coerce(built, parameter.annotation)
    target = self.public.target
    if not self.reference.evaluate:
      return Bound(target, FrozenMapping(arguments)) if arguments else target
    try:
      made = target(**arguments)
    except UserError as error:
      raise UserError(f"{self.location}: {error}") from error
    except (TypeError, ValueError) as error:
      raise UserError(f"{self.location}: {self.reference}: {error}") from error
    if not isinstance(target, type) and callable(made) and not dataclasses.is_dataclass(made):
      return Made(target, FrozenMapping(arguments), made)
    return made


def _build_value(value: Any, memo: dict[int, Any]) -> Any:
  if isinstance(value, Call):
    return value.build(memo)
  if isinstance(value, (list, tuple)):
    return tuple(_build_value(item, memo) for item in value)
  if isinstance(value, dict):
    return FrozenMapping({_build_value(k, memo): _build_value(v, memo) for k, v in value.items()})
  return value


class Environment:
  """Statements in the order in which they count, later ones winning."""

  def __init__(self, statements: Sequence[Statement]) -> None:
    self.statements = tuple(statements)
    self.chains: dict[Key, list[Statement]] = {}
    for statement in self.statements:
      chain = self.chains.setdefault(statement.key, [])
      if statement.value == REQUIRED and chain:
        continue  # it declares that a value is needed, and there is one
      chain.append(statement)
    self._of_name: dict[str, list[Key]] = {}
    for key in self.chains:
      if not key.is_macro:
        self._of_name.setdefault(key.name, []).append(key)

  def winner(self, key: Key) -> Statement | None:
    """The statement that counts."""
    return self.chains[key][-1] if key in self.chains else None

  def keys_seen(self, name: str, scope: tuple[str, ...]) -> list[Key]:
    """The bindings that a call in this scope considers, outer scopes first."""
    keys = [k for k in self._of_name.get(name, []) if scope[: len(k.scope)] == k.scope]
    return sorted(keys, key=lambda key: len(key.scope))

  def arguments(self, name: str, scope: tuple[str, ...]) -> dict[str, Statement]:
    """The binding that counts for each parameter of a call in this scope."""
    return {key.parameter: self.chains[key][-1] for key in self.keys_seen(name, scope)}

  def reached(self, *, effective: bool) -> set[Key]:
    """The keys that the root reaches through @ and %.

    Args:
      effective: only what counts in the end. Otherwise also what an overridden statement reaches:
        a file's BETA stays used when a flag replaces the binding that reads it.
    """
    keys: set[Key] = set()
    seen: set[tuple[Any, tuple[str, ...]]] = set()

    def visit(value: Any, scope: tuple[str, ...]) -> None:
      for leaf in walk(value):
        if isinstance(leaf, (Macro, Reference)) and (leaf, scope) not in seen:
          seen.add((leaf, scope))
          if isinstance(leaf, Macro):
            follow([Key((), leaf.name, "")], scope)
          else:
            inner = leaf.scope or scope
            considered = self.keys_seen(leaf.name, inner)
            if effective:
              considered = list({key.parameter: key for key in considered}.values())
            follow(considered, inner)

    def follow(considered: list[Key], scope: tuple[str, ...]) -> None:
      for key in considered:
        if chain := self.chains.get(key, []):
          keys.add(key)
          for statement in chain[-1:] if effective else chain:
            visit(statement.value, scope)

    visit(ROOT, ())
    return keys

  def expand(self, value: Any, reader: Statement) -> tuple[Any, Statement]:
    """The value with its macros replaced, and the statement that it comes from.

    Raises:
      UserError: a macro that is not set, must be set, or refers to itself.
    """
    return self._expand(value, reader, ())

  def _expand(self, value: Any, reader: Statement, trail: tuple[str, ...]) -> tuple[Any, Statement]:
    if value == REQUIRED:
      flag = f"--gin.{reader.key}"
      raise UserError(
        f"{reader.location}: {reader.key} must be set: {flag}=VALUE, or {reader.key} = VALUE in a "
        "gin file"
      )
    if isinstance(value, Macro):
      if value.name in trail:
        raise UserError(f"{reader.location}: %{value.name} refers to itself")
      statement = self.winner(Key((), value.name, ""))
      if statement is None:
        raise UserError(self._undefined(value.name, reader))
      return self._expand(statement.value, statement, (*trail, value.name))
    if isinstance(value, (list, tuple)):
      return type(value)(self._expand(item, reader, trail)[0] for item in value), reader
    if isinstance(value, dict):
      items = value.items()
      return {
        self._expand(k, reader, trail)[0]: self._expand(v, reader, trail)[0] for k, v in items
      }, reader
    return value, reader

  def name_faults(self) -> Iterator[str]:
    """Names that do not exist, in any statement, used or not."""
    for statement in self.statements:
      key, at = statement.key, statement.location
      public = None if key.is_macro else _lookup(key.name, at)
      if not key.is_macro and public is None:
        yield f"{at}: there is no {key.name}{did_you_mean(key.name, known_names())}"
      elif public is not None and not public.open and key.parameter not in public.parameters:
        near = did_you_mean(key.parameter, public.parameters)
        known = near or f"; it has {', '.join(public.parameters) or 'none'}"
        yield f"{at}: {key.name} has no parameter {key.parameter}{known}"
      for leaf in walk(statement.value):
        if isinstance(leaf, Reference) and _lookup(leaf.name, at) is None:
          yield f"{at}: there is no {leaf}{did_you_mean(leaf.name, known_names())}"

  def macro_faults(self) -> Iterator[str]:
    """Macros that are read and set nowhere, in any statement that is reached, overridden or not."""
    reached = self.reached(effective=False)
    for statement in self.statements:
      if statement.key in reached:
        for leaf in walk(statement.value):
          is_macro = isinstance(leaf, Macro) and leaf != REQUIRED
          if is_macro and Key((), leaf.name, "") not in self.chains:
            yield self._undefined(leaf.name, statement)

  def _undefined(self, name: str, reader: Statement) -> str:
    near = did_you_mean(name, [key.name for key in self.chains if key.is_macro])
    return (
      f"{reader.location}: nothing sets the macro %{name}{near}; set it with --gin.{name}=VALUE"
    )


class Planner:
  """Makes the plan of an environment, and collects what is wrong with it."""

  def __init__(self, environment: Environment) -> None:
    self.environment = environment
    self.faults: list[str] = []
    self._calls: dict[tuple[Reference, tuple[str, ...]], Call | None] = {}

  def root(self) -> Call | None:
    """The plan of the pipeline; None when it has a fault."""
    call = self._call(ROOT, (), Location("the configuration"))
    return None if self.faults else call

  @property
  def calls(self) -> list[Call]:
    """All calls of the plan."""
    return [call for call in self._calls.values() if call is not None]

  def _call(self, reference: Reference, scope: tuple[str, ...], at: Location) -> Call | None:
    public = _lookup(reference.name, at)
    if public is None:  # name_faults says so
      return None
    scope = reference.scope or scope
    index = (reference, scope)
    if index in self._calls:
      if self._calls[index] is None:
        self.faults.append(f"{at}: {reference} refers to itself")
      return self._calls[index]
    self._calls[index] = None
    arguments = {}
    given = self.environment.arguments(reference.name, scope)
    for name, statement in given.items():
      try:
        value, source = self.environment.expand(statement.value, statement)
      except UserError as error:
        self.faults.append(str(error))
        continue
      parameter = public.parameters.get(name)
      why = parameter and mismatch(value, bare(parameter.annotation), lookup)
      if why:
        reader = "" if source is statement else f", read by {statement.key} ({statement.location})"
        self.faults.append(f"{source.location}: {source.key}{reader}: {why}")
      else:
        arguments[name] = self._value(value, scope, source.location)
    if reference.evaluate:
      for name, parameter in public.parameters.items():
        if parameter.required and name not in given:
          key = Key(scope, public.name, name)
          self.faults.append(
            f"{at}: {reference} needs {name}, which nothing sets: --gin.{key}=VALUE, or "
            f"{key} = VALUE in a gin file"
          )
    call = Call(public, reference, arguments, at)
    self._calls[index] = call
    return call

  def _value(self, value: Any, scope: tuple[str, ...], at: Location) -> Any:
    if isinstance(value, Reference):
      return self._call(value, scope, at)
    if isinstance(value, (list, tuple)):
      return tuple(self._value(item, scope, at) for item in value)
    if isinstance(value, dict):
      items = value.items()
      return {self._value(k, scope, at): self._value(v, scope, at) for k, v in items}
    return value


def _lookup(name: str, at: Location) -> Public | None:
  try:
    return lookup(name)
  except UserError as error:
    raise UserError(f"{at}: {error}") from error
