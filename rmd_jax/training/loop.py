"""The training loop that every stage shares: fit a stage to a data set, resumable at every step.

Reads   the data set; directory/checkpoints, when an earlier process left some.
Writes  directory/checkpoints, metrics.jsonl, tensorboard/, and bad_batches.jsonl where a loss or a
        gradient was not finite.

A line of metrics.jsonl has that step's values: loss/total (with members their sum, and
loss/member_3), the objective's aux, optimizer/learning_rate and grad_norm, guard/skipped (bad steps
so far), perf/step_seconds and tokens_per_second (since the last line), perf/compile_seconds (in
a process's first line). Lines of evaluation have eval/loss and eval/ before each aux.

The device never waits for the host: a step is put in its queue before the last one's numbers are
read. Everything that the next step depends on is in the checkpoint (parameters, optimiser, the
objective's carry, random state, early stopping), and the batches are a function of the step, so a
run that was killed ends with the same bits as one that was not.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rmd_jax.data.batch import Dataset
from rmd_jax.data.loader import Loader
from rmd_jax.errors import RunError, UserError
from rmd_jax.training import files, preemption
from rmd_jax.training.bookkeeping import Clock, Selection
from rmd_jax.training.checkpoints import Checkpoints, load_params
from rmd_jax.training.compilations import compilations
from rmd_jax.training.evaluation import evaluate, map_batches, run_evaluation
from rmd_jax.training.metrics import MetricsWriter, read_metrics
from rmd_jax.training.partitioning import Layout, MeshConfig, layout
from rmd_jax.training.progress import Progress, duration, log
from rmd_jax.training.settings import Hyper, Training, hyper_table
from rmd_jax.training.stage import Params, Stage
from rmd_jax.training.state import Blueprint, TrainState, abstract_state, frozen_carry, init_state
from rmd_jax.training.step import train_program

__all__ = [
  "Fitted",
  "Training",
  "compilations",
  "evaluate",
  "fit",
  "load_params",
  "map_batches",
]


class Fitted(NamedTuple):
  """What `fit` ends with.

  Attributes:
    params: frozen, shared, members, on the devices: of the best checkpoint where evaluation
      selects one, of the last step otherwise.
    step: the step they come from.
    metrics: the evaluation at that step; empty without validation data.
    history: path of metrics.jsonl.
    params_hash: the content hash of `params`, as `load_params` gives it.
    last_step: the last step trained.
    stopped_early: whether patience ran out before Training.steps.
  """

  params: Params
  step: int
  metrics: dict[str, float]
  history: Path
  params_hash: str
  last_step: int
  stopped_early: bool


class _Pending(NamedTuple):
  """A step that is in the device's queue: its numbers, not waited for yet."""

  step: int
  metrics: dict[str, jax.Array]
  flags: jax.Array
  rows: np.ndarray
  tokens: int


def _tokens(batch: Any) -> int:
  real = batch.index >= 0
  return int(batch.prompt_length[real].sum() + batch.response_length[real].sum())


def _fingerprint(dataset: Dataset) -> str:
  return hashlib.sha256("\0".join(map(str, dataset.ids)).encode()).hexdigest()[:16]


class _Run:
  """One call of `fit`."""

  def __init__(
    self,
    stage: Stage,
    training: Training,
    *,
    params: Params,
    axes: Params,
    carry: Any,
    train: Dataset,
    validation: Dataset | None,
    hyper: Hyper,
    directory: Path,
    seed: int,
    place: Layout,
    label: str,
    notes: Mapping[str, Any],
  ) -> None:
    self.stage, self.training, self.place, self.label = stage, training, place, label
    self.train, self.validation, self.directory = train, validation, directory
    self.notes = dict(notes)
    self.names, self.table = hyper_table(training, hyper)
    part = training.batch_size // training.microbatches
    place.check_batch(part, stage.members, "Training.batch_size / microbatches")
    if len(train) == 0:
      raise UserError(f"{label}: there are no training examples.")
    if validation is not None and len(validation) == 0:
      raise UserError(f"{label}: the validation split is empty; give it examples, or none at all.")
    if training.patience and validation is None:
      raise UserError(f"{label}: patience = {training.patience} needs validation data.")

    self.blueprint = Blueprint.of(params, axes)
    self.blueprint.check_members(stage.members)
    self.identity = {
      "seed": seed,
      "batch_size": training.batch_size,
      "examples": len(train),
      "data": _fingerprint(train),
    }
    self.loader = Loader(
      train, training.batch_size, seed, host=jax.process_index(), hosts=jax.process_count()
    )
    # A greatest metric is ranked by its negative, so that who reads the checkpoints need not know.
    self.checkpoints = Checkpoints(
      directory / "checkpoints", training.keep_last, training.keep_best, "min"
    )
    self.bad_path = directory / "bad_batches.jsonl"
    self.selection = Selection()
    self.params_hash = ""
    self.saved = -1  # the step of the newest checkpoint that says all there is to say
    self.written = -1  # a step whose evaluation is in metrics.jsonl but in no checkpoint
    self.first = True  # the first step of this process compiles
    self.pending: _Pending | None = None
    self.loss: dict[str, float] = {}
    self.began, self.told = compilations(), False  # said once, in this process's first line
    self.state, self.step = self._start(params, carry, seed)
    self.frozen = place.put(params["frozen"], self.blueprint.shardings(place)["frozen"])
    self.program = train_program(
      stage,
      training.optimizer,
      training.microbatches,
      place,
      self.blueprint,
      self.names,
      frozen_carry(carry),
    )
    self.progress = Progress(label, training.steps, start=self.step)
    self.clock = Clock(self.step)

  # --- beginning ----------------------------------------------------------------------------------

  def _start(self, params: Params, carry: Any, seed: int) -> tuple[TrainState, int]:
    """The state of the newest good checkpoint, or the first one; the files are cut to it."""
    members, optimizer = self.stage.members, self.training.optimizer
    abstract = abstract_state(self.blueprint, optimizer, self.place, members=members, carry=carry)
    placed = self.blueprint.shardings(self.place)["frozen"]
    frozen = jax.tree.map(
      lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
      self.blueprint.params["frozen"],
      placed,
    )
    restored = self.checkpoints.restore(_saved(abstract, frozen))
    self.metrics = MetricsWriter(self.directory)
    if restored is None:
      self.metrics.cut_to(None)
      _cut(self.bad_path, 0)
      first = init_state(
        params, self.blueprint, optimizer, self.place, members=members, carry=carry, seed=seed
      )
      return first, 0
    self._check_identity(restored.meta["identity"], restored.step)
    self.selection = Selection.of_json(restored.meta["selection"])
    self.params_hash, self.saved = restored.params_hash, restored.step
    self.metrics.cut_to(restored.step)
    if self.selection.evaluated != restored.step:
      # Saved before its evaluation (SIGTERM), which may have been written since all the same.
      rows = read_metrics(self.metrics.path) if self.metrics.path.exists() else []
      if any(row["step"] == restored.step and "eval/loss" in row for row in rows):
        self.written = restored.step
    _cut(self.bad_path, restored.step)
    parts = dict(restored.state)
    parts["params"] = {group: parts["params"][group] for group in ("shared", "members")}
    # Copied: a restored array may lie in memory that is not JAX's to donate.
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.device_put(TrainState(**parts), where, may_alias=False)
    if not self._finished(restored.step):
      log(f"{self.label}: goes on from step {restored.step} of {self.training.steps}.")
    return state, restored.step

  def _check_identity(self, stored: Mapping[str, Any], step: int) -> None:
    lines = [
      f"  {name}  checkpoint {stored[name]}, run {value}   <- differs"
      for name, value in self.identity.items()
      if stored[name] != value
    ]
    if step > self.training.steps:
      lines.append(f"  steps  checkpoint {step}, run {self.training.steps}   <- is behind it")
    if lines:
      raise UserError(
        f"{self.label}: the checkpoint in {self.checkpoints.directory} belongs to another run.\n"
        + "\n".join(lines)
        + "\nChoose another run directory, or remove that one to start afresh."
      )

  # --- the loop -----------------------------------------------------------------------------------

  def run(self) -> Fitted:
    """Trains to the end, or until told to stop."""
    while True:
      self._stop_if_told()
      if self._evaluation_is_due():
        self._evaluate()
      if self._checkpoint_is_due():
        self._save()
      if self._finished(self.step):
        break
      self._train_step()
    if not self.first:
      self.progress.close(self.loss)
      self.metrics.close()
    return self._result()

  def _finished(self, step: int) -> bool:
    return step >= self.training.steps or self.selection.stopped

  def _evaluation_is_due(self) -> bool:
    if self.validation is None or self.step == 0 or self.selection.evaluated == self.step:
      return False
    every = self.training.eval_every
    return self.step == self.training.steps or (every is not None and self.step % every == 0)

  def _checkpoint_is_due(self) -> bool:
    if self.saved == self.step or self.step == 0:
      return False
    every = self.training.checkpoint_every
    new_best = self.training.keep_best > 0 and self.selection.best_step == self.step
    regular = every is not None and self.step % every == 0
    return regular or new_best or self._finished(self.step)

  def _train_step(self) -> None:
    """Queues one step, then reads the numbers of the one before it."""
    guard = contextlib.nullcontext() if self.first else jax.transfer_guard("disallow")
    with guard:
      batch = self.loader.batch(self.step)
      columns = self.place.put_batch(batch, self.stage.members)
      values = jax.device_put(self.table[self.step], self.place.replicated)
      self.state, metrics, flags = self.program(self.state, self.frozen, columns, values)
    self.step += 1
    self._read_pending()
    self.pending = _Pending(self.step, metrics, flags, np.asarray(batch.index), _tokens(batch))
    if self.first:  # compiled by now: its time is not the steps'
      self.first = False
      jax.block_until_ready(flags)
      seconds = compilations().since(self.began).seconds
      if seconds >= 1.0:
        log(f"{self.label}: compiled in {duration(seconds)}")
      self.progress = Progress(self.label, self.training.steps, start=self.step)
      self._read_pending()
      self.clock.restart(self.step)

  def _read_pending(self) -> None:
    """Waits for the step before the queued one; logs it when it is due, or when it was bad."""
    if self.pending is None:
      return
    step, metrics, flags, rows, tokens = self.pending
    self.pending = None
    streaks = jax.device_get(flags)
    bad = bool(streaks.any())
    due = step == 1 or step % self.training.log_every == 0 or step == self.training.steps
    self.clock.tokens += tokens
    if due or bad:
      line = {name: float(value) for name, value in jax.device_get(metrics).items()}
      line |= self.clock.lap(step)
      if not self.told:
        line["perf/compile_seconds"] = compilations().since(self.began).seconds
        self.told = True
      self.loss = {"loss": line["loss/total"]}
      self.metrics.write(step, line)
    if bad:
      self._report_bad(step, streaks, rows)
    self.progress.update(step, tokens=tokens, values=self.loss)

  def _report_bad(self, step: int, streaks: np.ndarray, rows: np.ndarray) -> None:
    """Writes the examples of a batch that made no update; ends the run when there are too many."""
    ids = [str(name) for name in self.train.ids[rows[rows >= 0]]]
    row: dict[str, Any] = {"step": step, "ids": ids}
    who = ""
    if self.stage.members:
      row["members"] = [int(k) for k in np.flatnonzero(streaks)]
      who = f" of member(s) {', '.join(map(str, row['members']))}"
    files.append(self.bad_path, json.dumps(row) + "\n", sync=True)
    log(
      f"{self.label}: step {step}: the loss or the gradient{who} is not finite; no update was made."
      f" Its examples are in {self.bad_path}."
    )
    if streaks.max() >= self.training.max_bad_steps:
      self.metrics.flush()
      raise RunError(
        f"{self.label}: {streaks.max()} steps in a row, up to step {step}, had a loss or a gradient"
        f" that is not finite. The examples of each are in {self.bad_path}: look at them, and lower"
        " the learning rate or clip_norm."
      )

  # --- what happens between steps -----------------------------------------------------------------

  def _evaluate(self) -> None:
    self._read_pending()
    assert self.validation is not None
    hyper = dict(zip(self.names, self.table[self.step - 1, :-1].tolist(), strict=True))
    with self.clock.stopped():
      means = run_evaluation(
        self.stage,
        self.place,
        params={"frozen": self.frozen, **self.state.params},
        carry=self.state.carry,
        step=self.state.step,
        rng=self.state.rng,
        dataset=self.validation,
        batch_size=self.training.batch_size,
        hyper=hyper,
        # Of several processes, all must do the same: they stop between steps, together.
        stop=preemption.requested if jax.process_count() == 1 else lambda: False,
      )
    if means is None:  # told to stop: the state is saved as not evaluated yet
      self._stop_if_told()
      return
    means = {f"eval/{name}": value for name, value in means.items()}
    if self.training.metric not in means:
      raise UserError(
        f"{self.label}: Training.metric = {self.training.metric!r} is not what evaluation gives:"
        f" {', '.join(sorted(means))}."
      )
    if self.step != self.written:
      self.metrics.write(self.step, means)
    selection = self.selection
    selection.consider(self.step, means, self.training)
    self.saved = -1  # a checkpoint of this step, if there is one, does not know of it
    if selection.stopped:
      log(
        f"{self.label}: stops at step {self.step}: {self.training.metric} has had no gain for"
        f" {selection.stale} evaluations; the best is {selection.best} at step"
        f" {selection.best_step}."
      )

  def _save(self) -> None:
    """Commits a checkpoint of this very step; what was logged up to it is on disk before."""
    self._read_pending()
    with self.clock.stopped():
      self.metrics.flush()
      meta = {
        "identity": self.identity,
        "selection": self.selection.as_json(),
        "steps": self.training.steps,
        "notes": self.notes,
      }
      self.params_hash = self.checkpoints.save(
        self.step,
        _saved(self.state, self.frozen),
        meta,
        self.selection.rank(self.step, self.training),
      )
    self.saved = self.step

  def _stop_if_told(self) -> None:
    if not preemption.requested(self.step):
      return
    if self.saved != self.step:
      self._save()
    log(f"{self.label}: stopped at step {self.step}, which is saved.")
    raise preemption.Preempted

  # --- ending -------------------------------------------------------------------------------------

  def _result(self) -> Fitted:
    last = {"frozen": self.frozen, **self.state.params}
    selection, step, digest, params = self.selection, self.step, self.params_hash, last
    selects = self.validation is not None and self.training.keep_best > 0
    if selects and selection.best_step not in (0, self.step):
      abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), last
      )
      restored = self.checkpoints.restore(abstract, "best", only="params")
      assert restored is not None  # the last step's, at least, is there
      params, step, digest = restored.state, restored.step, restored.params_hash
    metrics = selection.metrics_at(step)
    return Fitted(params, step, metrics, self.metrics.path, digest, self.step, selection.stopped)


def _saved(state: TrainState, frozen: Any) -> dict[str, Any]:
  """What a checkpoint holds: the state, with the frozen parameters among the others."""
  parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  return parts | {"params": {"frozen": frozen, **state.params}}


def _cut(path: Path, step: int) -> None:
  """Removes the lines that are later than `step`, and a torn last one."""
  if not path.exists():
    return
  kept = []
  for line in path.read_bytes().split(b"\n"):
    with contextlib.suppress(ValueError):  # torn by a kill
      if line and json.loads(line)["step"] <= step:
        kept.append(line + b"\n")
  files.write_atomic(path, b"".join(kept))


def fit(
  stage: Stage,
  training: Training,
  *,
  params: Params,
  axes: Params,
  carry: Any = (),
  train: Dataset,
  validation: Dataset | None,
  hyper: Hyper,
  directory: Path,
  seed: int,
  mesh: Mesh | MeshConfig,
  label: str,
  notes: Mapping[str, Any] | None = None,
) -> Fitted:
  """Trains a stage, from where `directory` says an earlier process got to.

  Args:
    stage: the model and the objective; equal stages share compiled programs.
    training: how.
    params: the first parameters, `{"frozen", "shared", "members"}`; they are copied, not consumed.
    axes: their logical axes.
    carry: the objective's first state.
    train: examples to fit.
    validation: held-out examples that select the best step; None: the last step is the result.
    hyper: numbers that the objective reads, each a float or one a step.
    directory: the stage's folder.
    seed: of the order of the batches and the model's random keys.
    mesh: where it runs.
    label: what progress and errors call it.
    notes: JSON that is kept in the checkpoints.

  Returns:
    The result, at once when the directory holds a finished run.

  Raises:
    UserError: contradictory settings, or a directory with another run's checkpoint.
    RunError: losses that stay non-finite, no good checkpoint, a full disk.
    Preempted: SIGTERM came; the step it stopped at is saved.
  """
  return _Run(
    stage,
    training,
    params=params,
    axes=axes,
    carry=carry,
    train=train,
    validation=validation,
    hyper=hyper,
    directory=directory,
    seed=seed,
    place=layout(mesh),
    label=label,
    notes=notes or {},
  ).run()
