"""Forward passes over a whole data set: log-probabilities, rewards and samples."""

import dataclasses
import io
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rmd_jax.data.batch import Batch, Dataset
from rmd_jax.data.preference_data import Prepared
from rmd_jax.models.decoder import Decoder
from rmd_jax.models.ensemble import RewardEnsemble
from rmd_jax.models.sampling import Samples
from rmd_jax.training import preemption
from rmd_jax.training.files import write_atomic
from rmd_jax.training.loop import map_batches
from rmd_jax.training.partitioning import MeshConfig


@dataclasses.dataclass(frozen=True)
class Sampling:
  """A policy and how its responses are drawn; static in the compiled program.

  Attributes:
    decoder: the policy's architecture.
    samples: S, responses for each prompt.
    max_tokens: R, the longest response, EOS included.
    eos_id: the id that ends a response.
    temperature: 0 is greedy.
    top_k: draw among the k likeliest tokens; None for all.
    top_p: draw from the nucleus of that mass; None for all.
  """

  decoder: Decoder
  samples: int
  max_tokens: int
  eos_id: int
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def draw(self, params: dict[str, Any], batch: Batch) -> Samples:
    """Responses to the batch's prompts; each row's numbers come from the seed and its row alone."""
    return self.decoder.sample(
      params["policy"],
      batch.prompt,
      batch.prompt_length,
      jax.random.wrap_key_data(params["rng"]),
      samples=self.samples,
      max_tokens=self.max_tokens,
      eos_id=self.eos_id,
      temperature=self.temperature,
      top_k=self.top_k,
      top_p=self.top_p,
      rows=batch.index,
    )


class Generated(NamedTuple):
  """Sampled responses on the host: `Samples` of M prompts.

  Attributes:
    tokens: [M, S, R] ids.
    length: [M, S], EOS included.
    logp: [M, S] under the model that drew them, at temperature 1.
    finished: [M, S], False where the longest length came before EOS.
  """

  tokens: np.ndarray
  length: np.ndarray
  logp: np.ndarray
  finished: np.ndarray

  def save(self, path: Path, **beside: np.ndarray) -> None:
    """Writes the samples with the given arrays beside them."""
    save_arrays(path, {**self._asdict(), **beside})

  @classmethod
  def load(cls, path: Path) -> tuple["Generated", np.ndarray]:
    """The samples and their scores."""
    with np.load(path) as arrays:
      return cls(*(arrays[name] for name in cls._fields)), arrays["scores"]


class Texts(NamedTuple):
  """Samples as people read them."""

  prompts: list[str]
  responses: list[list[str]]


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes an .npz file, whole or not at all."""
  content = io.BytesIO()
  np.savez(content, allow_pickle=False, **arrays)
  write_atomic(path, content.getvalue())


def gather(dataset: Dataset, pieces: Any, axis: int = 0) -> Any:
  """Puts what `map_batches` yields for batches, in order, together for the whole data set.

  Stops between two batches when the process was told to: nothing of a data set is kept by halves.
  """
  outputs = []
  for _, output in pieces:
    outputs.append(output)
    preemption.check()
  assert outputs, f"a data set of {len(dataset)} examples gives no batch"
  return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis), *outputs)


def log_probabilities(
  decoder: Decoder, params: Any, dataset: Dataset, batch_size: int, mesh: MeshConfig
) -> np.ndarray:
  """[M, N] log-probabilities of the responses, summed over tokens."""
  pieces = map_batches(decoder.logp, params, dataset, batch_size, mesh, axes=decoder.axes())
  return gather(dataset, pieces)


def rewards(
  ensemble: RewardEnsemble, params: Any, dataset: Dataset, batch_size: int, mesh: MeshConfig
) -> np.ndarray:
  """[K, M, N] rewards of the responses."""
  pieces = map_batches(
    ensemble.rewards,
    params,
    dataset,
    batch_size,
    mesh,
    axes=ensemble.axes(),
    members=ensemble.members,
  )
  return gather(dataset, pieces, axis=1)


def generate(
  sampling: Sampling, params: Any, prompts: Dataset, *, seed: int, batch_size: int, mesh: MeshConfig
) -> Generated:
  """Samples responses to every prompt.

  Args:
    sampling: the policy's architecture and how to draw.
    params: the policy's parameters.
    prompts: whose responses are not read.
    seed: with a prompt's row it decides its samples, whatever the batch size.
    batch_size: prompts in a batch.
    mesh: the devices.
  """
  rng = np.asarray(jax.random.key_data(jax.random.key(seed)))
  axes = {"policy": sampling.decoder.axes(), "rng": (None,)}
  arguments = {"policy": params, "rng": rng}
  pieces = map_batches(sampling.draw, arguments, prompts, batch_size, mesh, axes=axes)
  return Generated(*gather(prompts, pieces))


def answered(prompts: Dataset, generated: Generated) -> Dataset:
  """The prompts with the sampled responses in place of their own, without labels."""
  positions = np.arange(generated.tokens.shape[-1])
  return Dataset(
    ids=prompts.ids,
    prompt=prompts.prompt,
    prompt_length=prompts.prompt_length,
    responses=generated.tokens,
    response_length=generated.length,
    response_mask=positions < generated.length[:, :, None],
    weight=np.ones(len(prompts), np.float32),
  )


def texts(data: Prepared, prompts: Dataset, generated: Generated) -> Texts:
  """Prompts and samples as text, without BOS and EOS."""
  decode = data.vocabulary.decode
  asked = [
    decode(row[1:length].tolist())
    for row, length in zip(prompts.prompt, prompts.prompt_length, strict=True)
  ]
  ends = generated.length - generated.finished
  replied = [
    [decode(ids[:end].tolist()) for ids, end in zip(row, lengths, strict=True)]
    for row, lengths in zip(generated.tokens, ends, strict=True)
  ]
  return Texts(asked, replied)
