"""Score: reference log-probabilities and every member's rewards, once per example, on disk.

Reads   the SFT and reward checkpoints; the splits that alignment and evaluation use.
Writes  scores/header.json, scores/reference.bin, scores/member_<k>.bin; scores/samples.npz where
        the divergence is to be estimated from the reference's samples.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rmd_jax.data.batch import Batch, Dataset
from rmd_jax.data.scores import ScoreStore
from rmd_jax.errors import UserError
from rmd_jax.models.ensemble import RewardEnsemble
from rmd_jax.stages import artefacts, inference
from rmd_jax.stages.context import Context
from rmd_jax.stages.inference import Sampling
from rmd_jax.stages.reward import Reward
from rmd_jax.training import preemption
from rmd_jax.training.loop import load_params, map_batches
from rmd_jax.training.manifests import params_hash
from rmd_jax.training.progress import Progress

SPLITS = ("train", "validation", "test")
SAMPLED = ("train", "validation")
SAMPLE_COLUMNS = ("samples", "sample_length", "sample_logp")


@dataclasses.dataclass(frozen=True)
class Score:
  """The stage as a run configures it.

  Attributes:
    batch_size: examples in a batch.
    samples: responses that the reference writes for each prompt of the training and validation
      splits, for objectives whose divergence is estimated from them; 0 for none.
  """

  batch_size: int = dataclasses.field(default=128, metadata={"key": False})
  samples: int = 0

  def __post_init__(self) -> None:
    if self.samples < 0 or self.batch_size < 1:
      raise UserError("Score.samples must be 0 or more, and Score.batch_size at least 1")

  def run(self, context: Context, directory: Path, reward: Reward) -> None:
    """Scores what is not scored yet."""
    models = self.models(context, reward)
    store = self.store(context, models)
    data = Dataset.concatenate([context.data.splits[name] for name in SPLITS])
    decoder = context.policy
    scored = functools.partial(self.fill, store, data, context)
    scored(decoder.logp, models.policy, decoder.axes(), ("reference",))
    ensemble, columns = models.ensemble, store.columns[1:]
    scored(ensemble.rewards, models.members, ensemble.axes(), columns)
    store.flush()
    if self.samples:
      self.sample(context, models.policy, directory)

  def models(self, context: Context, reward: Reward) -> "Models":
    """The checkpoints that scores come from, with the content hashes of their parameters."""
    policy, reference, _ = load_params(context.directory / "sft")
    params, _, _ = load_params(context.directory / "reward")
    ensemble = reward.stage(context).ensemble
    common = {group: params[group] for group in ("frozen", "shared")}
    hashes = tuple(
      params_hash({**common, "member": jax.tree.map(lambda leaf, k=k: leaf[k], params["members"])})
      for k in range(ensemble.members)
    )
    return Models(policy["shared"], reference, ensemble, params, hashes)

  def store(self, context: Context, models: "Models") -> ScoreStore:
    """The score store of these checkpoints."""
    return ScoreStore(
      context.directory / "scores",
      {
        "data": context.source.key(),
        "tokeniser": context.data.vocabulary.fingerprint(),
        "prompt_length": context.source.prompt_length,
        "response_length": context.source.response_length,
        "dtype": f"{context.policy.dtype}, {models.ensemble.decoder.dtype}",
      },
      reference=models.reference,
      members=models.hashes,
    )

  def fill(
    self,
    store: ScoreStore,
    data: Dataset,
    context: Context,
    function: Callable[[Any, Batch], Any],
    params: Any,
    axes: Any,
    columns: tuple[str, ...],
  ) -> None:
    """Scores the rows that any of the columns lacks; stops, with what it has, when told to."""
    rows = store.missing(data, columns)
    if not len(rows):
      return
    members = len(columns) if "reference" not in columns else 0
    label = f"score {'rewards' if members else 'reference'}{context.suffix}"
    progress = Progress(label, len(rows))
    tokens = data.prompt_length + data.response_length.sum(-1)
    pieces = map_batches(
      function, params, data, self.batch_size, context.mesh, axes=axes, rows=rows, members=members
    )
    done = 0
    for batch_rows, scores in pieces:
      by_column = dict(zip(columns, scores, strict=True)) if members else {"reference": scores}
      store.write(data, batch_rows, by_column)
      done += len(batch_rows)
      progress.update(done, tokens=int(tokens[batch_rows].sum()))
      preemption.check()
    progress.close()

  def sample(self, context: Context, policy: Any, directory: Path) -> None:
    """Draws the reference's responses for the divergence, with their log-probabilities."""
    sampling = Sampling(
      decoder=context.policy,
      samples=self.samples,
      max_tokens=context.source.response_length,
      eos_id=context.data.vocabulary.eos_id,
    )
    arrays: dict[str, np.ndarray] = {}
    for number, name in enumerate(SAMPLED):
      prompts = context.data.splits[name]
      drawn = inference.generate(
        sampling,
        policy,
        prompts,
        seed=context.seed + number,
        batch_size=self.batch_size,
        mesh=context.mesh,
      )
      preemption.check()
      logp = inference.log_probabilities(
        context.policy, policy, inference.answered(prompts, drawn), self.batch_size, context.mesh
      )
      arrays |= {f"{name}/samples": drawn.tokens, f"{name}/sample_length": drawn.length}
      arrays[f"{name}/sample_logp"] = logp
    inference.save_arrays(directory / "samples.npz", arrays)

  def attach(self, context: Context, reward: Reward, names: Sequence[str]) -> dict[str, Dataset]:
    """The named splits with reference_logp, rewards and, where there are any, samples.

    Raises:
      UserError: the scores are stale or not complete; names what differs.
    """
    store = self.store(context, self.models(context, reward))
    splits = {}
    for name in names:
      try:
        data = store.attach(context.data.splits[name])
      except UserError:
        artefacts.reopen(store.directory)
        raise
      if self.samples and name in SAMPLED:
        with np.load(context.directory / "scores" / "samples.npz") as arrays:
          data = data.replace(**{column: arrays[f"{name}/{column}"] for column in SAMPLE_COLUMNS})
      splits[name] = data
    return splits


class Models(NamedTuple):
  """What scores come from.

  Attributes:
    policy: the SFT policy's parameters.
    reference: their content hash.
    ensemble: the reward models.
    members: their parameters.
    hashes: a content hash for each member.
  """

  policy: Any
  reference: str
  ensemble: RewardEnsemble
  members: Any
  hashes: tuple[str, ...]
