"""Loads a configuration: files, then flags, all checked, then built."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rmd_jax.config.names import PUBLIC, did_you_mean
from rmd_jax.config.operative import operative_text
from rmd_jax.config.planning import Call, Environment, Planner
from rmd_jax.config.syntax import Key, Reader, SearchPaths, Statement, parse_flag
from rmd_jax.errors import UserError

OBJECTIVES = Key((), "Run", "objectives")
OBJECTIVE = Key((), "Align", "objective")
SHOWN = 20  # faults in one message


@dataclasses.dataclass(frozen=True)
class Config:
  """A loaded configuration.

  Attributes:
    root: the pipeline, a graph of frozen dataclasses.
    operative: a gin file that, loaded again, gives the same root.
    objective: the name given to `with_objective`, else None.
  """

  root: Any
  operative: str
  objective: str | None = None
  _objectives: Mapping[str, "Config"] = dataclasses.field(default_factory=dict, repr=False)

  def with_objective(self, name: str) -> "Config":
    """The same configuration with one of the objectives that `Run.objectives` lists.

    The objective's file counts as read before the run's files, so that they and the flags win.
    `Run.objectives` is empty in it: it is a run of its own, with `Align.objective` bound. All were
    read and checked when this configuration was loaded; files changed since have no effect.

    Raises:
      UserError: it is not listed.
    """
    if name not in self._objectives:
      listed = ", ".join(self._objectives) or "none"
      raise UserError(f"{name} is not among Run.objectives, which lists {listed}")
    return self._objectives[name]


def load(
  files: Sequence[str | Path],
  bindings: Iterable[str] = (),
  search_paths: Sequence[str | Path] = (),
  modules: Iterable[str] = (),
) -> Config:
  """Reads gin files and bindings, checks everything, and builds the pipeline.

  Each of `Run.objectives` is NAME, for objectives/NAME.gin in the search paths, or the path of a
  file. Its file is parsed with the run's files, not into them, and a binding of the run counts as
  used when the pipeline reaches it with at least one of the objectives, or with none.

  Args:
    files: paths, or names in the search paths; later ones win.
    bindings: `NAME=value` or `Configurable.parameter=value`; they win over files.
    search_paths: folders that includes may come from, searched first; then come the current folder
      and the gin files of the library.
    modules: a user's modules to import; they register by `public`.

  Raises:
    UserError: what is wrong, each fault with FILE:LINE or its flag: a name that does not exist, a
      binding or macro that nothing uses, one bound twice in a file, a type that does not fit, a
      value that is required and missing, an include that is missing, circular or outside the search
      paths, an import, a file that is not UTF-8.
  """
  if not files:
    raise UserError("no configuration: name a gin file, --gin_file=FILE")
  for module in modules:
    import_module(module)
  paths = SearchPaths.of(search_paths)
  reader = Reader()
  for file in files:
    reader.user_file(str(file), paths)
  flags = [parse_flag(binding) for binding in bindings]
  return _Loader(reader, [*reader.statements, *flags], paths).config()


def import_module(name: str) -> None:
  """Imports a user's module, from the current folder too, as `python -m` does.

  Raises:
    UserError: there is no such module, or it cannot be imported.
  """
  here = os.getcwd()
  if here not in sys.path:
    sys.path.append(here)  # last: a file there must not hide an installed package
  try:
    importlib.import_module(name)
  except ImportError as error:
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name):
      hint = "; it is looked for in the current folder, PYTHONPATH and what is installed"
    raise UserError(f"--module={name}: {error}{hint}") from error
  except SyntaxError as error:
    raise UserError(f"--module={name}: {error.filename}:{error.lineno}: {error.msg}") from error


class _Loader:
  def __init__(self, reader: Reader, run: list[Statement], paths: SearchPaths) -> None:
    self.reader = reader
    self.run = run
    self.paths = dataclasses.replace(paths, own=tuple({f.parent: None for f in reader.files}))
    self.main = Environment(run)
    self.objectives: dict[str, Reader] = {}

  def config(self) -> Config:
    names = self.listed(self.main)
    self.objectives = {name: self.read_objective(name) for name in names}
    combined = {name: self.combine(reader) for name, reader in self.objectives.items()}
    environments = [self.main, *combined.values()]
    self.refuse(self.objective_faults())
    self.refuse(fault for e in environments for fault in e.name_faults())
    self.refuse(fault for e in environments for fault in e.macro_faults())
    planners = {name: Planner(e) for name, e in combined.items()}
    main = Planner(self.main)
    plans = [(p, p.root()) for p in [main, *planners.values()]]
    unused = list(self.unused(environments, combined))
    self.refuse([*(fault for planner, _ in plans for fault in planner.faults), *unused])
    roots: list[Call] = [root for _, root in plans if root is not None]
    built = [root.build({}) for root in roots]
    effective = set().union(*(e.reached(effective=True) for e in environments))
    configs = {
      name: Config(root, self.text(e, e.reached(effective=True), planners[name]), name)
      for (name, e), root in zip(combined.items(), built[1:], strict=True)
    }
    return Config(built[0], self.text(self.main, effective, main), None, configs)

  @staticmethod
  def refuse(faults: Iterable[str]) -> None:
    distinct = list(dict.fromkeys(faults))
    if len(distinct) > SHOWN:
      distinct[SHOWN:] = [f"and {len(distinct) - SHOWN} more"]
    if distinct:
      raise UserError("\n".join(distinct))

  @staticmethod
  def text(environment: Environment, keys: set[Key], planner: Planner) -> str:
    chains = environment.chains.items()
    return operative_text([chain[-1] for key, chain in chains if key in keys], planner.calls)

  def listed(self, environment: Environment) -> list[str]:
    """Run.objectives, where it is a list of strings; the plan says so if it is not."""
    statement = environment.winner(OBJECTIVES)
    if statement is None:
      return []
    value, _ = environment.expand(statement.value, statement)
    names = value if isinstance(value, (list, tuple)) else []
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))

  def find_objective(self, name: str) -> Path | None:
    if name.endswith(".gin"):
      return Path(name) if Path(name).is_file() else self.paths.find(name)
    return self.paths.find(f"objectives/{name}.gin")

  def read_objective(self, name: str) -> Reader:
    statement = self.main.winner(OBJECTIVES)
    at = statement.location if statement else OBJECTIVES
    path = self.find_objective(name)
    if path is None:
      folders = [*self.paths.own, *self.paths.common]
      known = sorted({f.stem for folder in folders for f in folder.glob("objectives/*.gin")})
      raise UserError(
        f"{at}: there is no objective {name}{did_you_mean(name, known)}; "
        f"there are {', '.join(known)}, or name a file of your own, with its path and .gin"
      )
    reader = Reader()
    reader.user_file(str(path.resolve()), self.paths)
    return reader

  def combine(self, objective: Reader) -> Environment:
    return Environment([*objective.statements, *(s for s in self.run if s.key != OBJECTIVES)])

  def objective_faults(self) -> Iterator[str]:
    listing, bound = self.main.winner(OBJECTIVES), self.main.winner(OBJECTIVE)
    if not self.objectives or listing is None:
      return
    if bound is not None:
      yield (
        f"{bound.location}: Align.objective is bound, and Run.objectives ({listing.location}) "
        "lists objectives too; keep one (--gin.Run.objectives='[]' drops the list)"
      )
      return
    for name, reader in self.objectives.items():
      if all(statement.key != OBJECTIVE for statement in reader.statements):
        at = reader.statements[0].location if reader.statements else listing.location
        yield f"{at}: the objective {name} has no line Align.objective = @…"
      # Read again by the run, such a file would undo what the objective's file sets after it.
      for file in sorted(reader.files & self.reader.files):
        yield (
          f"{listing.location}: the objective {name} includes {file}, as the run does; "
          "with Run.objectives, only one of them may"
        )

  def unused(
    self, environments: Sequence[Environment], combined: Mapping[str, Environment]
  ) -> Iterator[str]:
    touched = set().union(*(e.reached(effective=False) for e in self.with_overridden(environments)))
    effective = set().union(*(e.reached(effective=True) for e in environments))
    for statement in self.run:
      if statement.key not in touched:
        yield self.unused_text(statement)
      elif statement.location.command_line and statement.key not in effective:
        yield f"{statement.location}: has no effect; another binding hides what would read it"
    for name, reader in self.objectives.items():
      reached = combined[name].reached(effective=False)
      yield from (self.unused_text(s) for s in reader.statements if s.key not in reached)

  def with_overridden(self, environments: Sequence[Environment]) -> Iterator[Environment]:
    """The environments, and those of objectives that an overridden Run.objectives lists.

    `--gin.Run.objectives="['dpo']"` must not turn the file's TAU, which only ipo reads, into an
    error.
    """
    yield from environments
    others = [s for s in self.run if s.key != OBJECTIVES]
    for statement in self.main.chains.get(OBJECTIVES, [])[:-1]:
      for name in self.listed(Environment([*others, statement])):
        if name not in self.objectives and self.find_objective(name) is not None:
          yield self.combine(self.read_objective(name))

  def unused_text(self, statement: Statement) -> str:
    key, at = statement.key, statement.location
    if not key.is_macro:
      called = "/".join([*key.scope, key.name])
      return f"{at}: {key} is not used: the pipeline (Run) reaches no @{called}"
    if key.name in PUBLIC:
      return f"{at}: {key.name} is no macro; bind one of its parameters, {key.name}.parameter = …"
    environments = [self.main, *map(self.combine, self.objectives.values())]
    macros = {k.name for e in environments for k in e.reached(effective=False) if k.is_macro}
    return f"{at}: nothing reads the macro {key.name}{did_you_mean(key.name, macros)}"
