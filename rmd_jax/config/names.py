"""The public names: what a configuration can reach, imported when it is referred to."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from rmd_jax.errors import UserError

PUBLIC = {
  # The pipeline.
  "Run": "rmd_jax.stages.run:Run",
  "Sft": "rmd_jax.stages.sft:Sft",
  "Reward": "rmd_jax.stages.reward:Reward",
  "Judge": "rmd_jax.stages.reward:Judge",
  "Score": "rmd_jax.stages.score:Score",
  "Align": "rmd_jax.stages.align:Align",
  "Evaluate": "rmd_jax.stages.evaluate:Evaluate",
  # Data.
  "PreferenceData": "rmd_jax.data.preference_data:PreferenceData",
  "FileSource": "rmd_jax.data.readers:FileSource",
  "SeqioSource": "rmd_jax.data.readers:SeqioSource",
  "TfdsSource": "rmd_jax.data.readers:TfdsSource",
  "WorldSource": "rmd_jax.data.world:WorldSource",
  "Oracle": "rmd_jax.data.world:Oracle",
  "Writer": "rmd_jax.data.world:Writer",
  "Splits": "rmd_jax.data.splits:Splits",
  "AllData": "rmd_jax.data.subsets:AllData",
  "BiasedSubsets": "rmd_jax.data.subsets:BiasedSubsets",
  "BootstrapSubsets": "rmd_jax.data.subsets:BootstrapSubsets",
  "DisjointSubsets": "rmd_jax.data.subsets:DisjointSubsets",
  "ByteVocabulary": "rmd_jax.data.vocabulary:ByteVocabulary",
  "SentencePieceVocabulary": "rmd_jax.data.vocabulary:SentencePieceVocabulary",
  "TrainedSentencePiece": "rmd_jax.data.vocabulary:TrainedSentencePiece",
  # Models and training.
  "Decoder": "rmd_jax.models.decoder:Decoder",
  "MeshConfig": "rmd_jax.training.partitioning:MeshConfig",
  "Rules": "rmd_jax.training.partitioning:Rules",
  "Training": "rmd_jax.training.settings:Training",
  "AdamW": "rmd_jax.training.optimisers:AdamW",
  "Adafactor": "rmd_jax.training.optimisers:Adafactor",
  # Objectives that Align takes, and schedules of their gamma.
  "DPO": "rmd_jax.objectives.plugs:DPO",
  "IPO": "rmd_jax.objectives.plugs:IPO",
  "Distill": "rmd_jax.objectives.plugs:Distill",
  "EnsembleDistill": "rmd_jax.objectives.plugs:EnsembleDistill",
  "LinearGamma": "rmd_jax.objectives.gamma:LinearGamma",
  "DualGamma": "rmd_jax.objectives.gamma:DualGamma",
  # Schedules of optax, for learning rates and gamma.
  "constant_schedule": "optax:constant_schedule",
  "cosine_decay_schedule": "optax:cosine_decay_schedule",
  "exponential_decay": "optax:exponential_decay",
  "join_schedules": "optax:join_schedules",
  "linear_schedule": "optax:linear_schedule",
  "piecewise_constant_schedule": "optax:piecewise_constant_schedule",
  "polynomial_schedule": "optax:polynomial_schedule",
  "warmup_constant_schedule": "optax:warmup_constant_schedule",
  "warmup_cosine_decay_schedule": "optax:warmup_cosine_decay_schedule",
}
"""Name in gin -> module:attribute."""

_registered: dict[str, Any] = {}  # a user's own objects, by name

T = TypeVar("T")


@typing.overload
def public(obj: T, *, name: str | None = None) -> T: ...
@typing.overload
def public(*, name: str) -> Callable[[T], T]: ...
def public(obj: Any = None, *, name: str | None = None) -> Any:
  """Lets gin files refer to a function or a dataclass of your own.

  A call or a decorator; the object itself is returned as it is. The module that makes the call is
  named on the command line, `--module=package.module`; a gin file cannot load it.

  >>> import dataclasses
  >>> @public
  ... @dataclasses.dataclass(frozen=True)
  ... class Hinge:
  ...   margin: float = 1.0

  Args:
    obj: a frozen dataclass, or a function.
    name: its name in gin files; by default its own.

  Raises:
    TypeError: it is neither; what a run depends on could not be written down.
    ValueError: the name is taken, or is no identifier.
  """
  if obj is None:
    return functools.partial(public, name=name)
  is_class = isinstance(obj, type)
  if is_class and not (dataclasses.is_dataclass(obj) and obj.__hash__ is not None):
    raise TypeError(f"{obj!r} must be a dataclass with frozen=True to be public")
  if not callable(obj) or not (is_class or hasattr(obj, "__qualname__")):
    raise TypeError(f"only a function or a frozen dataclass can be public, not {obj!r}")
  name = obj.__name__ if name is None else name
  if not name.isidentifier():
    raise ValueError(f"{name!r} is no name for gin: pass name=, an identifier")
  known = _registered.get(name)
  if name in PUBLIC or (known is not None and identity(known) != identity(obj)):
    owner = PUBLIC.get(name) or identity(known)
    raise ValueError(f"the public name {name} is taken by {owner}: pass another name=")
  _registered[name] = obj
  return obj


def identity(obj: Any) -> str:
  """Where an object is defined, as module:qualified.name."""
  return f"{obj.__module__}:{obj.__qualname__}"


def known_names() -> list[str]:
  """All names that a configuration can refer to."""
  return sorted([*PUBLIC, *_registered])


def did_you_mean(word: str, words: Iterable[str]) -> str:
  """`; did you mean X?`, or nothing when no word is near."""
  words = list(words)
  lower = {w.lower(): w for w in reversed(words)}
  near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
  return f"; did you mean {lower[near[0]]}?" if near else ""


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A parameter of a public object."""

  annotation: Any
  required: bool
  default: Any


@dataclasses.dataclass(frozen=True)
class Public:
  """A public object as the checks need it.

  Attributes:
    name: its name in gin.
    target: the dataclass or function.
    parameters: those that can be bound by name.
    open: it takes any keyword.
    result: the type of what a call returns, `Any` where it is not stated.
  """

  name: str
  target: Any
  parameters: Mapping[str, Parameter]
  open: bool
  result: Any


@functools.cache
def _describe(name: str, target: Any) -> Public:
  try:
    hints = typing.get_type_hints(target)
  except NameError:  # a third party's names that exist for type checkers only
    hints = {}
  parameters = {}
  takes_any = False
  for parameter in inspect.signature(target).parameters.values():
    if parameter.kind is parameter.VAR_KEYWORD:
      takes_any = True
    elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
      parameters[parameter.name] = Parameter(
        annotation=hints.get(parameter.name, Any),
        required=parameter.default is parameter.empty,
        default=parameter.default,
      )
  is_class = isinstance(target, type)
  result = target if is_class else hints.get("return", Any)
  return Public(name, target, parameters, takes_any, result)


def lookup(name: str) -> Public | None:
  """The public object of that name, imported now; None when there is none.

  Raises:
    UserError: the table names it, but it cannot be imported.
  """
  if name in _registered:
    return _describe(name, _registered[name])
  if name not in PUBLIC:
    return None
  module, attribute = PUBLIC[name].split(":")
  try:
    return _describe(name, getattr(importlib.import_module(module), attribute))
  except (ImportError, AttributeError) as error:
    raise UserError(f"{name} is {PUBLIC[name]}, which cannot be imported: {error}") from error
