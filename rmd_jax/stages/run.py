"""Run: the whole pipeline from one configuration, each stage only where its result is missing.

Reads   a configuration whose root is `Run`.
Writes  RUN/config.gin, RUN/run.json, RUN/log.txt, RUN/seed_S/<stage>/, RUN/report/.
"""

import contextlib
import dataclasses
import fcntl
import functools
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from rmd_jax.config import Config, canonical
from rmd_jax.data.preference_data import PreferenceData, Prepared
from rmd_jax.errors import UserError
from rmd_jax.models.decoder import Decoder
from rmd_jax.report.page import terminal_table, write_report
from rmd_jax.stages import artefacts
from rmd_jax.stages.align import Align
from rmd_jax.stages.artefacts import Key, Outcome
from rmd_jax.stages.context import Context
from rmd_jax.stages.evaluate import Evaluate
from rmd_jax.stages.reward import Judge, Reward
from rmd_jax.stages.score import Score
from rmd_jax.stages.sft import Sft
from rmd_jax.training import preemption
from rmd_jax.training.files import make_directory, write_atomic, write_json
from rmd_jax.training.loop import compilations
from rmd_jax.training.partitioning import MeshConfig
from rmd_jax.training.progress import duration, log, log_to

STAGES = ("sft", "reward", "score", "align", "evaluate", "report")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "gin-config", "numpy")


@dataclasses.dataclass(frozen=True)
class Run:
  """A pipeline: what gin/pipeline.gin wires together.

  Attributes:
    data: the preference data.
    policy: the policy's architecture.
    sft: the stage that makes the reference.
    reward: the stage that trains reward models.
    score: the stage that stores reference log-probabilities and rewards.
    align: the stage that trains the policy; its objective comes from gin/objectives/.
    evaluate: the stage that samples and judges.
    mesh: sizes of the mesh axes.
    judge: a held-out reward model, where the data has no oracle.
    objectives: names of gin/objectives/ to align with, each on its own; empty: the one that the
      configuration itself binds to Align.objective.
    seeds: the whole pipeline is run once for each.
  """

  data: PreferenceData
  policy: Decoder
  sft: Sft
  reward: Reward
  score: Score
  align: Align
  evaluate: Evaluate
  mesh: MeshConfig = MeshConfig()
  judge: Judge | None = None
  objectives: tuple[str, ...] = ()
  seeds: tuple[int, ...] = (0,)

  def __post_init__(self) -> None:
    for name in ("objectives", "seeds"):
      values = getattr(self, name)
      if len(set(values)) != len(values):
        raise UserError(f"Run.{name} names one twice: {list(values)}")
    if not self.seeds:
      raise UserError("Run.seeds is empty: name at least one, e.g. Run.seeds = [0]")
    estimator = getattr(self.align.objective, "estimator", None)
    if estimator == "samples" and not self.score.samples:
      raise UserError(
        "the estimator 'samples' reads responses that the reference wrote, and Score.samples is 0: "
        "set Score.samples = 2 or more, or choose another estimator"
      )
    if self.judge is None and not hasattr(self.data.source, "oracle"):
      raise UserError(
        "samples of the aligned policy have nothing to be judged by: this data has no oracle. "
        "Add include 'judge.gin' and Splits.judge = 0.2 to the run file."
      )


@dataclasses.dataclass(frozen=True)
class Objective:
  """An objective of the run: its name and its own configuration."""

  name: str
  config: Config

  @property
  def align(self) -> Align:
    """The alignment stage with this objective."""
    return self.config.root.align


def objectives_of(config: Config) -> list[Objective]:
  """The objectives that the run aligns with."""
  names = config.root.objectives
  if not names:
    plug = config.root.align.objective
    name = getattr(plug, "__name__", type(plug).__name__).lower()
    return [Objective(name, config)]
  return [Objective(Path(name).stem, config.with_objective(name)) for name in names]


class Pipeline:
  """The stages of one seed: their keys, in the order of their dependence, and how to run them.

  `only` names the one stage to run; the others must have been finished with these very options.
  None runs every stage whose result is missing.
  """

  def __init__(self, config: Config, directory: Path, seed: int, only: str | None) -> None:
    self.run: Run = config.root
    self.config = config
    self.only = only
    self.objectives = objectives_of(config)
    if only in (None, "align", "evaluate"):
      for objective in self.objectives:
        objective.align.expect_objective()
    source = for_seed(self.run.data, seed)
    self.context = Context(
      directory=directory / f"seed_{seed}",
      seed=seed,
      source=source,
      architecture=self.run.policy,
      mesh=self.run.mesh,
      suffix=f" (seed {seed})" if len(self.run.seeds) > 1 else "",
    )
    self.outcomes: list[tuple[str, Outcome]] = []

  def stage(self, name: str, stage: str, key: Key, make: Callable[[Path], None]) -> Key:
    """Runs a stage, or takes its finished result, in the folder `name` of the seed."""
    preemption.check()
    directory = self.context.directory / name
    if self.only not in (None, stage):
      outcome = artefacts.require(directory, key, stage=stage, command=f"rmd {stage}")
    else:
      outcome = artefacts.produce(directory, key, make, stage=f"{name}{self.context.suffix}")
    self.outcomes.append((name, outcome))
    return key

  def through(self, last: str) -> bool:
    """Whether the stage is needed, given `only`."""
    return self.only is None or STAGES.index(last) <= STAGES.index(self.only)

  def execute(self) -> None:
    """All stages, in order."""
    context, run = self.context, self.run
    seed = str(context.seed)
    make_directory(context.directory)
    data = Key.of(data=context.source.key())
    if self.only in (None, "sft"):
      artefacts.produce(
        context.directory / "data", data, self.describe, stage=f"data{context.suffix}"
      )
    policy = canonical(run.policy)
    sft = self.stage(
      "sft",
      "sft",
      Key.of(options=canonical(run.sft), policy=policy, data=data.digest, seed=seed),
      lambda place: run.sft.run(context, place),
    )
    if not self.through("reward"):
      return
    parts = {"policy": policy, "data": data.digest, "sft": sft.digest, "seed": seed}
    reward = self.stage(
      "reward",
      "reward",
      Key.of(options=canonical(run.reward), **parts),
      lambda place: run.reward.run(context, place),
    )
    judge = None
    if (train_judge := run.judge) is not None:
      judge = self.stage(
        "judge",
        "reward",
        Key.of(options=canonical(train_judge), **parts),
        lambda place: train_judge.run(context, place),
      )
    if not self.through("score"):
      return
    score = self.stage(
      "scores",
      "score",
      Key.of(options=canonical(run.score), data=data.digest, sft=sft.digest, reward=reward.digest),
      lambda place: run.score.run(context, place, run.reward),
    )
    if not self.through("align"):
      return
    aligned = {
      objective.name: Key.of(options=canonical(objective.align), scores=score.digest, seed=seed)
      for objective in self.objectives
    }
    self.check_objectives(aligned)
    for objective in self.objectives:
      self.stage(
        f"align/{objective.name}",
        "align",
        aligned[objective.name],
        functools.partial(self.align, objective),
      )
    if not self.through("evaluate"):
      return
    self.evaluate(score, aligned, "oracle" if judge is None else judge.digest)

  def describe(self, directory: Path) -> None:
    """Reads the data, so that what is wrong with it ends the run before anything is trained."""
    data = self.context.data
    for objective in self.objectives:
      self.check(objective)
    write_json(directory / "summary.json", data.summary)
    write_atomic(directory / "left_out.txt", "".join(f"{problem}\n" for problem in data.left_out))
    log(f"{data.text()}\n{examples(data)}")

  def check(self, objective: Objective) -> None:
    """Refuses data that cannot feed the objective."""
    objective.align.check(self.context.data.splits["train"], members=1 + self.run.reward.family)

  def check_objectives(self, aligned: dict[str, Key]) -> None:
    """Refuses what `describe` has not seen: objectives that the run was given later."""
    if self.only not in (None, "align"):
      return
    for objective in self.objectives:
      place = self.context.directory / "align" / objective.name
      if not artefacts.finished(place, aligned[objective.name]):
        self.check(objective)

  def align(self, objective: Objective, directory: Path) -> None:
    """Trains one policy on the scored splits."""
    write_atomic(directory / "config.gin", objective.config.operative)
    splits = self.run.score.attach(self.context, self.run.reward, ("train", "validation"))
    objective.align.run(self.context, directory, splits)

  def evaluate(self, score: Key, aligned: dict[str, Key], judge: str) -> None:
    """Samples, judges and compares; the reference's samples are drawn once."""
    context, run = self.context, self.run
    options = canonical(run.evaluate)
    parts = {"options": options, "scores": score.digest, "judge": judge, "seed": str(context.seed)}
    evaluation = run.evaluate.prepare(context, run)
    reference = self.stage(
      "evaluate/reference",
      "evaluate",
      Key.of(**parts),
      lambda place: evaluation.reference(place),
    )
    place = context.directory / "evaluate"
    write_atomic(place / "reward.json", (place / "reference" / "reward.json").read_bytes())
    for objective in self.objectives:
      self.stage(
        f"evaluate/{objective.name}",
        "evaluate",
        Key.of(policy=aligned[objective.name].digest, reference=reference.digest),
        functools.partial(evaluation.policy, objective.name, objective.align),
      )


def for_seed(data: PreferenceData, seed: int) -> PreferenceData:
  """The data of one seed: a source that is drawn at random (a world) is drawn anew for each."""
  if not hasattr(data.source, "seed"):
    return data
  return dataclasses.replace(
    data, source=dataclasses.replace(data.source, seed=data.source.seed + seed)
  )


def examples(data: Prepared, count: int = 2) -> str:
  """The first training examples as texts, so that a glance finds what is wrong with them."""
  train, decode = data.splits["train"], data.vocabulary.decode
  lines = []
  for row in range(min(count, len(train))):
    lines.append(
      f"  prompt    {shorten(decode(train.prompt[row, 1 : train.prompt_length[row]].tolist()))}"
    )
    for j, length in enumerate(train.response_length[row]):
      if length:
        text = decode(train.responses[row, j, : length - 1].tolist())
        lines.append(f"  response {j} {shorten(text)}")
  return "\n".join(["examples as the model sees them, preferred first:", *lines])


def shorten(text: str, width: int = 160) -> str:
  """One line of at most `width` characters: the end of a prompt says most, so the head goes."""
  text = " ".join(text.split())
  return text if len(text) <= width else "… " + text[-width:]


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
  """Holds the run directory for this process."""
  with (directory / ".lock").open("a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f"another process is running in {directory}: wait for it, or choose another --run_dir"
      ) from None
    yield


def run(config: Config, directory: Path, *, only: str | None = None) -> int:
  """Runs the pipeline, or one stage of it, in a run directory.

  Args:
    config: a loaded configuration whose root is `Run`.
    directory: where the run keeps everything.
    only: one of `STAGES`; None runs all whose results are missing.

  Returns:
    The exit status, 0.

  Raises:
    UserError: bad configuration or data, or an input that is missing or stale.
    RunError: training failed, or no checkpoint is good.
  """
  make_directory(directory)
  with preemption.handling(), exclusive(directory), log_to(directory / "log.txt"):
    started = time.monotonic()
    pipelines = [Pipeline(config, directory, seed, only) for seed in config.root.seeds]
    write_atomic(directory / "config.gin", config.operative)
    log(f"rmd {only or 'run'}: {directory}  (seeds {', '.join(map(str, config.root.seeds))})")
    for pipeline in pipelines:
      pipeline.execute()
    programs, seconds = compilations()
    total = duration(time.monotonic() - started)
    log(f"compiled {programs} programs in {duration(seconds)}; {total} in all")
    write_json(directory / "run.json", record(pipelines, programs, seconds))
    if only in (None, "report"):
      write_report(directory)
      print(terminal_table(directory))
    preemption.check()
  return 0


def record(pipelines: list[Pipeline], programs: int, seconds: float) -> dict[str, object]:
  """What run.json says: the stages, their keys and times, and what they ran on."""
  return {
    "command": shlex.join(["rmd", *sys.argv[1:]]),
    "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES},
    "compiled": {"programs": programs, "seconds": seconds},
    "stages": [
      {
        "name": name,
        "seed": pipeline.context.seed,
        "key": outcome.key.digest,
        "seconds": outcome.seconds,
        "skipped": outcome.skipped,
      }
      for pipeline in pipelines
      for name, outcome in pipeline.outcomes
    ],
  }
