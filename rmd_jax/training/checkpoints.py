"""Checkpoints: written whole, verified when read, and never silently replaced by a fresh start.

A checkpoint is a directory named by its step:

  <step>/state/         the arrays, by Orbax, as nested dictionaries of the state's path names
  <step>/manifest.json  step, metric, meta, the parameters' content hash, shape and dtype of every
                        leaf, SHA-256 of every file, and of the manifest itself

It is built in `.tmp-<step>` and renamed, so a kill leaves nothing half-made under a step's name. A
checkpoint whose sums disagree is passed over with a line in the log, and set aside as `bad-<step>`
once a newer good one is there.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rmd_jax.errors import RunError, UserError
from rmd_jax.training import files, manifests
from rmd_jax.training.progress import log


class Restored(NamedTuple):
  """What a checkpoint held.

  Attributes:
    state: as the abstract state, or nested dictionaries of NumPy arrays.
    step: the step it was saved at.
    meta: the JSON given to `save`.
    metric: the number it was ranked by, if any.
    params_hash: the content hash of its parameters.
  """

  state: Any
  step: int
  meta: dict[str, Any]
  metric: float | None
  params_hash: str


def _check_fits(directory: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  differences = []
  for path in sorted(stored.keys() | wanted.keys()):
    there = "{}{}".format(*stored[path]) if path in stored else "nothing"
    here = "{}{}".format(*wanted[path]) if path in wanted else "nothing"
    if there != here:
      differences.append(f"  {path or 'state'}  checkpoint {there}, run {here}   <- differs")
  if differences:
    more = f"\n  and {len(differences) - 12} more" if len(differences) > 12 else ""
    raise UserError(
      f"the checkpoint {directory} does not fit this run's state.\n"
      + "\n".join(differences[:12])
      + more
      + "\nRun it with the model and optimiser that it was saved with, or in another run directory."
    )


def _read_state(
  directory: Path, manifest: Mapping[str, Any], abstract: Any, only: str | None
) -> Any:
  """The arrays of a verified checkpoint, placed as `abstract` says; `only` one subtree of them."""
  import orbax.checkpoint as ocp

  prefix = "" if only is None else f"{only}/"
  specs = {k: v for k, v in manifest["leaves"].items() if k == only or k.startswith(prefix)}
  empty = [path for path in manifest["empty"] if path == only or path.startswith(prefix)]
  if only is not None and not specs and not empty:
    raise UserError(f"the checkpoint {directory} holds no {only!r}.")
  leaves: dict[str, Any]
  if abstract is None:
    leaves = dict.fromkeys(specs)
  else:
    leaves = {
      f"{prefix}{k}" if k else only or "": v for k, v in manifests.by_path(abstract)[0].items()
    }
    _check_fits(directory, specs, {path: manifests.spec(leaf) for path, leaf in leaves.items()})

  arguments = {}
  for path, leaf in leaves.items():
    if getattr(leaf, "sharding", None) is None:
      arguments[path] = ocp.RestoreArgs(restore_type=np.ndarray)
    else:  # strict (the default): no silent padding, cutting or casting
      arguments[path] = ocp.ArrayRestoreArgs(sharding=leaf.sharding)
  read: dict[str, Any] = {}
  if arguments:
    handler = ocp.PyTreeCheckpointHandler()
    request = ocp.args.PyTreeRestore(
      item=manifests.nested(dict.fromkeys(arguments, 0)),
      restore_args=manifests.nested(arguments),
      partial_restore=True,
    )
    read, _ = manifests.by_path(handler.restore(directory / "state", args=request))

  values = {}
  for path, leaf in leaves.items():
    value = read[path]
    if path in manifest["keys"]:
      value = jax.random.wrap_key_data(value, impl=manifest["keys"][path])
    elif isinstance(leaf, bool | int | float):
      value = type(leaf)(value)
    values[path] = value
  if abstract is not None:  # a dictionary keeps the order in which the tree was flattened
    return jax.tree.unflatten(jax.tree.structure(abstract), list(values.values()))
  tree = manifests.nested(values, empty)
  return tree if only is None else tree[only]


def _write_arrays(directory: Path, tree: dict[str, Any]) -> None:
  """Writes the arrays by Orbax.

  Raises:
    OSError: the disk is full, or failed. TensorStore says it as a ValueError with the code in it.
  """
  import orbax.checkpoint as ocp

  try:
    # Floats of a trained model shrink by 8 %, for three times the time
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as writer:
      writer.save(directory, args=ocp.args.PyTreeSave(tree))
  except ValueError as error:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code is None:
      raise
    raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _together(name: str) -> None:
  """Waits for the other processes, where there are any."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


class Checkpoints:
  """The checkpoints of one training run.

  Args:
    directory: where they lie; created, and cleared of what a kill left half-made, unless read only.
    keep_last: how many of the newest to keep, at least 1.
    keep_best: how many of the best by metric to keep besides.
    mode: whether the least ("min") or the greatest ("max") metric is best.
    read_only: touch nothing; for those who read another run's model.
  """

  def __init__(
    self,
    directory: Path,
    keep_last: int = 2,
    keep_best: int = 1,
    mode: str = "min",
    *,
    read_only: bool = False,
  ) -> None:
    if keep_last < 1 or keep_best < 0:
      raise UserError(f"keep_last must be >= 1 and keep_best >= 0, not {keep_last}, {keep_best}")
    if mode not in ("min", "max"):
      raise UserError(f"mode must be 'min' or 'max', not {mode!r}")
    self.directory = directory.absolute()  # Orbax takes no relative path
    self._keep_last, self._keep_best, self._mode = keep_last, keep_best, mode
    self._read_only = read_only
    self._bad: set[int] = set()
    self._metrics: dict[int, float | None] = {}  # by step; read when first needed
    if not read_only and jax.process_index() == 0:
      files.make_directory(self.directory)
      self._clean()

  def _clean(self) -> None:
    """Ends what a kill interrupted: half-made checkpoints go, a replaced one comes back."""
    for path in sorted(self.directory.iterdir()):
      kind, _, step = path.name.partition("-")
      if kind == ".old" and not (self.directory / step).exists():
        files.rename(path, self.directory / step)
      elif kind in (".tmp", ".old", ".gone"):
        files.remove_tree(path)

  def steps(self) -> list[int]:
    """The steps that have a checkpoint, good or not, ascending."""
    if not self.directory.is_dir():
      return []
    return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal())

  def _metric(self, step: int) -> float | None:
    if step not in self._metrics:
      try:
        self._metrics[step] = manifests.read(self.directory / str(step))["metric"]
      except ValueError:  # restore says why, when it comes to it; until then it is not ranked
        self._metrics[step] = None
    return self._metrics[step]

  def _ranked(self, steps: list[int]) -> list[int]:
    """Those with a metric, best first; of equals the earliest."""
    sign = 1 if self._mode == "min" else -1
    scored = [(sign * metric, step) for step in steps if (metric := self._metric(step)) is not None]
    return [step for _, step in sorted(scored)]

  def save(
    self,
    step: int,
    state: Any,
    meta: Mapping[str, Any] | None = None,
    metric: float | int | None = None,
  ) -> str:
    """Saves a checkpoint and removes those that the policy no longer keeps.

    On return it is committed and durable. A kill at any moment leaves the earlier ones.

    Args:
      step: names it; an existing checkpoint of that step is replaced.
      state: a pytree of arrays, random keys and numbers, with the parameters at `state["params"]`
        or `state.params`; named tuples and empty containers are fine.
      meta: JSON (strict: no NaN) to find again at restore.
      metric: ranks it for keep_best and `restore(which="best")`; None or NaN is never best.

    Returns:
      The content hash of the parameters.

    Raises:
      RunError: the disk is full, or failed; the earlier checkpoints are intact.
      UserError: the directory cannot be written by this user.
    """
    if self._read_only:
      raise ValueError(f"{self.directory} was opened read only")
    params = state["params"] if isinstance(state, Mapping) else state.params
    metric = None if metric is None or math.isnan(metric) else float(metric)
    manifest = manifests.describe(state, params, step=step, metric=metric, meta=meta or {})
    temporary, final = self.directory / f".tmp-{step}", self.directory / str(step)
    lead = jax.process_index() == 0
    if lead:
      files.remove_tree(temporary)
      files.make_directory(temporary)
    _together(f"checkpoint {step} begins")
    arrays = {path: manifests.stored(leaf) for path, leaf in manifests.by_path(state)[0].items()}
    try:
      with files.explained(temporary, "write"):
        _write_arrays(temporary / "state", manifests.nested(arrays))
      _together(f"checkpoint {step} is written")
      if lead:
        self._commit(temporary, final, manifest)
        self._metrics[step] = metric
        self._bad.discard(step)
        self._prune()
    except (RunError, UserError):
      if lead:
        files.remove_tree(temporary)
      raise
    _together(f"checkpoint {step} is committed")
    return manifest["params"]

  def _commit(self, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    manifests.seal(temporary, manifest)
    old = final.with_name(f".old-{final.name}")
    if final.exists():
      files.remove_tree(old)
      files.rename(final, old)
    files.rename(temporary, final)
    files.remove_tree(old)

  def _prune(self) -> None:
    good = [step for step in self.steps() if step not in self._bad]
    keep = {*good[-self._keep_last :], *self._ranked(good)[: self._keep_best]}
    for step in good:
      if step not in keep:
        # renamed first: a kill in the middle must not leave a damaged checkpoint under its step
        gone = self.directory / f".gone-{step}"
        files.rename(self.directory / str(step), gone, sync=False)
        files.remove_tree(gone)
    for step in sorted(self._bad):  # kept as evidence, but out of the way of the good ones
      aside = self.directory / f"bad-{step}"
      files.remove_tree(aside)
      files.rename(self.directory / str(step), aside)
    self._bad.clear()

  def restore(
    self, abstract: Any = None, which: str | int = "last", *, only: str | None = None
  ) -> Restored | None:
    """Reads the newest (or best, or a named) checkpoint whose sums are right.

    Args:
      abstract: the state's structure, as arrays or `jax.ShapeDtypeStruct`s; a leaf with a sharding
        is placed so, on any mesh; one without becomes a NumPy array. None: everything in NumPy, in
        nested dictionaries (random keys stay keys, tuples become dictionaries of "0", "1", …).
      which: "last", "best" (by metric), or a step. The first two pass over damaged checkpoints to
        the next good one, and log it; a step that is damaged is an error, for nothing else is it.
      only: restore only this top-level part of the state ("params"); `abstract` describes that.

    Returns:
      None when there are no checkpoints at all.

    Raises:
      RunError: there are checkpoints, but none is good; or the step asked for is not good.
      UserError: `abstract` does not fit; no such step; "best" where no checkpoint has a metric.
    """
    steps = self.steps()
    if isinstance(which, int):
      if which not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{self.directory} has no checkpoint of step {which}; there are: {there}.")
      order = [which]
    elif which == "best":
      ranked = self._ranked(steps)
      order = ranked + [step for step in reversed(steps) if step not in ranked]
    elif which == "last":
      order = steps[::-1]
    else:
      raise ValueError(f"which must be 'last', 'best' or a step, not {which!r}")

    reasons = []
    for step in order:
      path = self.directory / str(step)
      try:
        manifest = manifests.verify(path)
      except ValueError as error:
        self._bad.add(step)
        reasons.append(f"checkpoint {path} is not good: {error}")
        continue
      if which == "best" and manifest["metric"] is None:
        raise UserError(
          f"no good checkpoint in {self.directory} has a metric, so none is best. "
          "Evaluate while training, or take the last one."
        )
      for reason in reasons:
        log(reason)
      if reasons:
        log(f"falling back to checkpoint {path}")
      state = _read_state(path, manifest, abstract, only)
      return Restored(
        state, manifest["step"], manifest["meta"], manifest["metric"], manifest["params"]
      )

    if not reasons and not self._set_aside():
      return None
    what = "none of its checkpoints is good" if not isinstance(which, int) else "it is damaged"
    raise RunError(
      f"cannot restore from {self.directory}: {what}.\n"
      + "".join(f"  {reason}\n" for reason in reasons)
      + "Bring back a good copy, or remove that directory to start afresh."
    )

  def result(self) -> str:
    """Which checkpoint training ended with: "best" where any was ranked, else "last"."""
    return "best" if self._ranked(self.steps()) else "last"

  def _set_aside(self) -> bool:
    return self.directory.is_dir() and any(self.directory.glob("bad-*"))


def load_params(
  directory: Path, *, which: str | int = "result", abstract: Any = None
) -> tuple[Any, str, int]:
  """The parameters of a stage's run, for others to use: verified, and nothing is touched.

  Args:
    directory: the stage's folder, which holds checkpoints/.
    which: "result", what training ended with: the best where evaluation selected one, else the
      last; or "best" by the metric, "last", or a step.
    abstract: the parameters' structure, as in `Checkpoints.restore`; None for NumPy.

  Returns:
    (parameters, their content hash, step).

  Raises:
    UserError: there are no checkpoints.
    RunError: none is good.
  """
  checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
  if which == "result":
    which = checkpoints.result()
  restored = checkpoints.restore(abstract, which, only="params")
  if restored is None:
    raise UserError(f"{checkpoints.directory} has no checkpoint. Train that stage first.")
  return restored.state, restored.params_hash, restored.step
