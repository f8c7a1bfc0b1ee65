"""Align: fit the policy's implicit reward to stored scores.

Reads   the SFT checkpoint; scores (reference_logp [B, N], rewards [K, B, N]).
Writes  align/<objective>/checkpoints, align/<objective>/metrics.jsonl.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rmd_jax import objectives
from rmd_jax.data.batch import Batch, Dataset
from rmd_jax.errors import UserError
from rmd_jax.models.decoder import Decoder
from rmd_jax.objectives.inputs import weighted_mean
from rmd_jax.stages.context import Context
from rmd_jax.training.loop import Training, fit, load_params
from rmd_jax.training.stage import Loss, Params

Objective = Any
"""`objective(log_ratios [B, N], batch, hyper, carry) -> (losses [B], Selection | None, carry)`.

One of `rmd_jax.objectives`' dataclasses, or a plain function of the user's.
"""


@dataclasses.dataclass(frozen=True)
class Alignment:
  """The policy's log-ratios under any objective.

  Attributes:
    decoder: the policy's architecture.
    plug: the objective.
  """

  decoder: Decoder
  plug: Objective
  members: ClassVar[int] = 0

  @property
  def coupled(self) -> bool:
    """Whether it is no sum over examples; of a plain function that is assumed, for safety."""
    return getattr(self.plug, "coupled", True)

  @property
  def estimator(self) -> str | None:
    """What the objective's forward divergence is estimated from."""
    return getattr(self.plug, "estimator", None)

  def outputs(self, params: Params, batch: Batch, *, rng: PRNGKeyArray) -> dict[str, Array]:
    """`logp` [B, N], and what the divergence's estimator needs beside it."""
    policy = params["shared"]
    if self.estimator == "samples":
      count = batch.responses.shape[1]
      logp = self.decoder.logp(policy, batch.with_samples())
      return {"logp": logp[:, :count], "sample_logp": logp[:, count:]}
    outputs = {"logp": self.decoder.logp(policy, batch)}
    if self.estimator == "tokenwise":
      kl = self.decoder.token_kl(policy, params["frozen"], batch)
      outputs["token_kl"] = objectives.forward_kl_tokenwise(kl, mask=batch.mask)
    return outputs

  def denominator(self, batch: Batch) -> Float[Array, ""]:
    """The summed example weights."""
    return batch.weight.sum()

  def objective(
    self,
    outputs: dict[str, Array],
    batch: Batch,
    *,
    step: Array,
    hyper: Mapping[str, Array],
    carry: Any,
  ) -> Loss:
    """The objective's losses, and METHOD's diagnostics of degeneracy."""
    assert batch.reference_logp is not None
    log_ratios = outputs["logp"] - batch.reference_logp
    divergences = {}
    if "token_kl" in outputs:
      divergences["tokenwise"] = outputs["token_kl"]
      batch = dataclasses.replace(batch, token_kl=outputs["token_kl"])
    if "sample_logp" in outputs:
      assert batch.sample_logp is not None
      sampled = outputs["sample_logp"] - batch.sample_logp
      divergences["samples"] = objectives.forward_kl_samples(sampled)
      batch = dataclasses.replace(batch, sample_log_ratios=sampled)
    losses, selection, carry = self.plug(log_ratios, batch, hyper, carry)
    rewards = batch.rewards
    assert rewards is not None
    first = int(rewards.shape[0] > 1)  # the family, or the only model there is
    aux = objectives.diagnostics(
      log_ratios,
      rewards[first:],
      batch.response_mask.sum(-1),
      beta=hyper.get("beta", 1.0),
      mask=batch.mask,
      selection=selection,
      weights=batch.weight,
      ranks=batch.ranks,
      first_member=first,
    )
    for name, divergence in divergences.items():
      aux[f"kl/forward_{name}"] = weighted_mean(divergence, batch.weight)
    if hasattr(self.plug, "report"):
      aux |= self.plug.report(carry, hyper)
    return Loss((batch.weight * losses).sum(), batch.weight.sum(), aux, carry)


@dataclasses.dataclass(frozen=True)
class Align:
  """The stage as a run configures it.

  Attributes:
    training: steps, batch, optimiser.
    objective: gin/objectives/NAME.gin sets it.
    hyper: numbers passed to an objective that is a plain function.
  """

  training: Training
  objective: Objective = None
  hyper: Mapping[str, float] | None = None

  def expect_objective(self) -> None:
    """Refuses a configuration that chooses none."""
    if self.objective is None:
      raise UserError(
        "no objective is chosen: include one of gin/objectives/, "
        "or list them in Run.objectives, e.g. Run.objectives = ['ensemble']"
      )

  def stage(self, context: Context) -> Alignment:
    """The policy and its objective as the loop trains them."""
    self.expect_objective()
    return Alignment(context.policy, self.objective)

  @property
  def beta(self) -> float:
    """The implicit reward's scale: 1 for an objective without one, such as IPO."""
    numbers = dict(self.hyper or {})
    return float(getattr(self.objective, "beta", numbers.get("beta", 1.0)))

  def resolved_hyper(self) -> dict[str, Any]:
    """The objective's numbers as it names them."""
    plug = self.objective
    return dict(plug.hyper()) if hasattr(plug, "hyper") else dict(self.hyper or {})

  def check(self, dataset: Dataset, *, members: int) -> None:
    """Refuses, before anything is trained, records that cannot feed the objective.

    Args:
      dataset: the training split, not yet scored.
      members: how many reward models will score it.
    """
    if self.objective is None or not hasattr(self.objective, "check"):
      return
    scored = dataset.replace(rewards=np.zeros((members, *dataset.mask.shape), np.float32))
    try:
      self.objective.check(scored)
    except ValueError as error:
      raise UserError(f"the data cannot feed this objective: {error}") from error

  def numbers(self) -> dict[str, Any]:
    """The objective's traced numbers: floats, or arrays with one value a step."""
    numbers = self.resolved_hyper()
    steps = np.arange(self.training.steps)
    for name, value in numbers.items():
      if callable(value):
        numbers[name] = np.array([float(value(step)) for step in steps], np.float32)
    return numbers

  def run(self, context: Context, directory: Path, splits: Mapping[str, Dataset]) -> None:
    """Trains the policy from the SFT checkpoint on the scored splits."""
    plug = self.objective
    if hasattr(plug, "resolve"):
      try:
        plug = plug.resolve(splits["train"])
      except ValueError as error:
        raise UserError(f"the scores cannot feed this objective: {error}") from error
    resolved = dataclasses.replace(self, objective=plug)
    stage = resolved.stage(context)
    policy, _, _ = load_params(context.directory / "sft")
    frozen = policy["shared"] if stage.estimator == "tokenwise" else {}
    axes = context.policy.axes()
    fit(
      stage,
      self.training,
      params={"frozen": frozen, "shared": policy["shared"], "members": {}},
      axes={"frozen": axes if frozen else {}, "shared": axes, "members": {}},
      carry=plug.init_carry() if hasattr(plug, "init_carry") else (),
      train=splits["train"],
      validation=splits["validation"],
      hyper=resolved.numbers(),
      directory=directory,
      seed=context.seed,
      mesh=context.mesh,
      label=f"{directory.name}{context.suffix}",
    )
