"""Evaluate: sample from policy and reference, judge both, and say how sure the numbers are.

Reads   SFT and aligned checkpoints, scores of the test split, the judge.
Writes  evaluate/reference/{samples.npz, reward.json}, evaluate/<objective>/{evaluation.json,
        margins.npz, scores.npz, samples.jsonl}.
"""

import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from rmd_jax import objectives
from rmd_jax.data.batch import Dataset
from rmd_jax.errors import UserError
from rmd_jax.evaluation import calibration, statistics
from rmd_jax.stages import inference
from rmd_jax.stages.align import Align
from rmd_jax.stages.context import Context
from rmd_jax.stages.inference import Generated, Sampling
from rmd_jax.training.files import write_atomic, write_json
from rmd_jax.training.loop import load_params

if TYPE_CHECKING:
  from rmd_jax.stages.run import Run


diagnostics = jax.jit(objectives.diagnostics, static_argnames="first_member")


@runtime_checkable
class Judging(Protocol):
  """What gives a score to sampled responses."""

  @property
  def name(self) -> str:
    """What the report calls it."""

  def scores(self, prompts: Dataset, generated: Generated) -> np.ndarray:
    """[M, S] scores of the samples, higher is better."""


@dataclasses.dataclass(frozen=True)
class OracleJudge:
  """The data's own oracle, on texts."""

  context: Context
  name: str = "oracle"

  def scores(self, prompts: Dataset, generated: Generated) -> np.ndarray:
    """[M, S] oracle scores."""
    data = self.context.data
    texts = inference.texts(data, prompts, generated)
    count = generated.tokens.shape[1]
    questions = [text for text in texts.prompts for _ in range(count)]
    answers = [text for row in texts.responses for text in row]
    return self.context.source.source.oracle.scores(questions, answers).reshape(-1, count)


@dataclasses.dataclass(frozen=True)
class ModelJudge:
  """The held-out reward model."""

  context: Context
  run: "Run"
  name: str = "held-out reward model"

  def scores(self, prompts: Dataset, generated: Generated) -> np.ndarray:
    """[M, S] rewards."""
    assert self.run.judge is not None
    stage = self.run.judge.stage(self.context)
    params, _, _ = load_params(self.context.directory / "judge")
    answered = inference.answered(prompts, generated)
    return inference.rewards(
      stage.ensemble, params, answered, self.run.evaluate.batch_size, self.context.mesh
    )[0]


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """The stage as a run configures it.

  Attributes:
    prompts: at most that many prompts of the test split.
    samples: responses drawn for each.
    temperature: of sampling; 0 is greedy.
    top_k: draw among the k likeliest tokens; None for all.
    top_p: draw from the nucleus of that mass; None for all.
    batch_size: prompts in a batch.
    resamples: of the bootstrap.
    show: prompts whose samples are written out for people.
  """

  prompts: int = 256
  samples: int = 4
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  batch_size: int = dataclasses.field(default=64, metadata={"key": False})
  resamples: int = 2000
  show: int = 12

  def __post_init__(self) -> None:
    for name in ("prompts", "samples", "batch_size", "resamples"):
      if getattr(self, name) < 1:
        raise UserError(f"Evaluate.{name} must be at least 1, not {getattr(self, name)}")

  def prepare(self, context: Context, run: "Run") -> "Evaluation":
    """The evaluation of one seed; nothing is read until it is needed."""
    return Evaluation(self, context, run)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Evaluates any number of policies against one reference, whose samples are drawn once."""

  options: Evaluate
  context: Context
  run: "Run"

  @cached_property
  def judge(self) -> Judging:
    """The held-out reward model where the run has one, else the data's oracle."""
    return (
      OracleJudge(self.context) if self.run.judge is None else ModelJudge(self.context, self.run)
    )

  @cached_property
  def prompts(self) -> Dataset:
    """One example for each distinct prompt of the test split, the first ones."""
    test = self.context.data.splits["test"]
    if not len(test):
      raise UserError("the test split is empty: set Splits.test to a share of the data, e.g. 0.1")
    seen: dict[bytes, int] = {}
    for row in range(len(test)):
      seen.setdefault(test.prompt[row, : test.prompt_length[row]].tobytes(), row)
    return test.take(np.array(list(seen.values())[: self.options.prompts]))

  @cached_property
  def test(self) -> Dataset:
    """The scored test split."""
    return self.run.score.attach(self.context, self.run.reward, ("test",))["test"]

  @cached_property
  def reference_params(self) -> Any:
    """The SFT policy's parameters."""
    return load_params(self.context.directory / "sft")[0]["shared"]

  def generate(self, params: Any) -> Generated:
    """Samples of a policy; with equal random numbers for every policy of a seed."""
    options = self.options
    sampling = Sampling(
      decoder=self.context.policy,
      samples=options.samples,
      max_tokens=self.context.source.response_length,
      eos_id=self.context.data.vocabulary.eos_id,
      temperature=options.temperature,
      top_k=options.top_k,
      top_p=options.top_p,
    )
    return inference.generate(
      sampling,
      params,
      self.prompts,
      seed=self.context.seed,
      batch_size=options.batch_size,
      mesh=self.context.mesh,
    )

  def logp(self, params: Any, dataset: Dataset) -> np.ndarray:
    """[M, N] log-probabilities under a policy."""
    return inference.log_probabilities(
      self.context.policy, params, dataset, self.options.batch_size, self.context.mesh
    )

  def reference(self, directory: Path) -> None:
    """Samples of the reference with their scores, and the evaluation of the reward models."""
    generated = self.generate(self.reference_params)
    scores = self.judge.scores(self.prompts, generated)
    generated.save(directory / "samples.npz", scores=scores)
    test = self.test
    best, worst = ends(test)
    rows = np.arange(len(test))
    lengths = test.response_mask.sum(-1)

    def pick(values: np.ndarray) -> np.ndarray:
      return np.stack([values[..., rows, best], values[..., rows, worst]], -1)

    assert test.rewards is not None
    report = calibration.reward_report(
      pick(test.rewards).astype(float),
      pick(lengths),
      preference=certainty(test),
      weights=test.weight,
    )
    write_json(directory / "reward.json", report)

  def policy(self, name: str, align: Align, directory: Path) -> None:
    """One aligned policy against the reference."""
    context, seed = self.context, self.context.seed
    prompts = np.repeat(np.arange(len(self.prompts)), self.options.samples)
    params = load_params(context.directory / "align" / name)[0]["shared"]
    reference, reference_scores = Generated.load(
      context.directory / "evaluate" / "reference" / "samples.npz"
    )
    generated = self.generate(params)
    scores = self.judge.scores(self.prompts, generated)
    forward = self.logp(params, inference.answered(self.prompts, reference)) - reference.logp
    backward = generated.logp - self.logp(
      self.reference_params, inference.answered(self.prompts, generated)
    )
    held_out, margins = self.margins(params, align)
    comparison = self.compare(generated, scores, reference, reference_scores)
    evaluation = {
      "objective": name,
      "seed": seed,
      "beta": held_out["beta"],
      "judge": self.judge.name,
      **comparison,
      "reward_policy": float(scores.mean()),
      "reward_reference": float(reference_scores.mean()),
      "length_policy": float(generated.length.mean()),
      "length_reference": float(reference.length.mean()),
      "finished_policy": float(generated.finished.mean()),
      "kl_forward": statistics.kl_forward(forward.ravel(), seed, prompts=prompts).json(),
      "kl_reverse": statistics.kl_reverse(backward.ravel(), seed, prompts=prompts).json(),
      **held_out,
    }
    write_json(directory / "evaluation.json", evaluation)
    inference.save_arrays(directory / "margins.npz", margins)
    lengths = {"policy_length": generated.length, "reference_length": reference.length}
    inference.save_arrays(
      directory / "scores.npz", {"policy": scores, "reference": reference_scores, **lengths}
    )
    lines = self.side_by_side(generated, scores, reference, reference_scores)
    write_atomic(directory / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

  def compare(
    self, policy: Generated, scores: np.ndarray, reference: Generated, reference_scores: np.ndarray
  ) -> dict[str, Any]:
    """Advantage and win rates, with intervals over prompts."""
    seed, resamples = self.context.seed, self.options.resamples
    prompts = np.repeat(np.arange(len(self.prompts)), self.options.samples)
    mine, theirs = scores.ravel(), reference_scores.ravel()
    advantage = statistics.bootstrap_interval(
      mine - theirs, seed, prompts=prompts, samples=resamples
    )
    win = statistics.win_rate(mine, theirs, seed, prompts=prompts, samples=resamples)
    controlled = statistics.length_controlled_win_rate(
      mine,
      theirs,
      policy.length.ravel(),
      reference.length.ravel(),
      seed,
      prompts=prompts,
      samples=resamples,
    )
    return {
      "advantage": advantage.json(n=len(self.prompts)),
      "win_rate": win.json(),
      "win_rate_length_controlled": controlled.json(),
    }

  def margins(self, params: Any, align: Align) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Implicit against explicit margins on the held-out comparisons."""
    test = self.test
    assert test.rewards is not None
    assert test.reference_logp is not None
    best, worst = ends(test)
    rows = np.arange(len(test))
    beta = align.beta
    log_ratios = self.logp(params, test) - test.reference_logp
    lengths = test.response_mask.sum(-1)
    first = int(len(test.rewards) > 1)
    chosen, rejected = log_ratios[rows, best], log_ratios[rows, worst]
    implicit = beta * (chosen - rejected)
    reward = test.rewards[:, rows, best] - test.rewards[:, rows, worst]
    difference = (lengths[rows, best] - lengths[rows, worst]).astype(float)
    numbers = {
      "beta": beta,
      "implicit_accuracy": statistics.implicit_accuracy(
        implicit, preference=certainty(test), weights=test.weight
      ),
      "margin_correlation": statistics.correlation(implicit, reward[0]),
      "margin_correlations": [statistics.correlation(implicit, member) for member in reward],
      "chosen_log_ratio": float(chosen.mean()),
      "rejected_log_ratio": float(rejected.mean()),
      "diagnostics": {
        key: float(value)
        for key, value in diagnostics(
          jnp.asarray(log_ratios),
          jnp.asarray(test.rewards[first:]),
          jnp.asarray(lengths),
          beta=beta,
          mask=jnp.asarray(test.mask),
          ranks=None if test.ranks is None else jnp.asarray(test.ranks),
          first_member=first,
        ).items()
      },
    }
    arrays = {
      "implicit": implicit,
      "reward": reward,
      "length_difference": difference,
      "chosen_log_ratio": chosen,
      "rejected_log_ratio": rejected,
    }
    return numbers, arrays

  def side_by_side(
    self, policy: Generated, scores: np.ndarray, reference: Generated, reference_scores: np.ndarray
  ) -> list[dict[str, Any]]:
    """The first sample of policy and reference for the first prompts, as texts."""
    data, prompts = self.context.data, self.prompts
    mine = inference.texts(data, prompts, policy)
    theirs = inference.texts(data, prompts, reference)
    return [
      {
        "prompt": mine.prompts[row],
        "policy": mine.responses[row][0],
        "reference": theirs.responses[row][0],
        "chosen": data.vocabulary.decode(
          prompts.responses[row, 0, : prompts.response_length[row, 0] - 1].tolist()
        ),
        "reward_policy": float(scores[row, 0]),
        "reward_reference": float(reference_scores[row, 0]),
        "length_policy": int(policy.length[row, 0]),
        "length_reference": int(reference.length[row, 0]),
      }
      for row in range(min(self.options.show, len(prompts)))
    ]


def ends(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
  """[M] indices of each example's best and worst response, by ranks, ratings or preference."""
  if dataset.ranks is not None:
    order = np.where(dataset.mask, -dataset.ranks.astype(float), np.nan)
  elif dataset.ratings is not None:
    order = np.where(dataset.mask, dataset.ratings, np.nan)
  else:
    first = preferences(dataset)
    order = np.stack([first + 1e-9, 1 - first], -1)  # an undecided pair keeps its order
  return np.nanargmax(order, 1), np.nanargmin(order, 1)


def certainty(dataset: Dataset) -> np.ndarray:
  """[M] probability that the best response beats the worst."""
  if dataset.ranks is not None or dataset.ratings is not None:
    return np.ones(len(dataset))
  first = preferences(dataset)
  return np.maximum(first, 1 - first)


def preferences(dataset: Dataset) -> np.ndarray:
  """[M] probability that the first of a pair wins."""
  if dataset.preference is None:
    return np.ones(len(dataset))
  return dataset.preference.astype(float)
