"""What a model sees: one prompt and N responses an example, in a batch or as a whole data set."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
  Array = jax.Array
else:
  Array = jax.Array | np.ndarray  # a batch lies on the host first, then on the devices

COLUMNS = (
  "prompt",
  "prompt_length",
  "responses",
  "response_length",
  "response_mask",
  "weight",
  "preference",
  "ranks",
  "ratings",
  "member_weight",
  "reference_logp",
  "rewards",
  "samples",
  "sample_length",
  "sample_logp",
)
MEMBER_COLUMNS = ("member_weight", "rewards")  # [K, B, ...]: examples lie on axis 1


@flax.struct.dataclass
class Batch:
  """B examples in the shared-prompt layout; a pair is N = 2 with the preferred response first.

  Prompt and responses are right-padded, and padding is told from tokens by length alone, never by
  id. A prompt starts with BOS, so `prompt_length >= 1`; a response ends with EOS.

  Attributes:
    prompt: token ids.
    prompt_length: number of prompt tokens, at least 1.
    responses: token ids.
    response_length: number of tokens, EOS included; 0 where there is no such response.
    response_mask: True on the tokens whose log-probability counts.
    weight: example weight; 0 marks a row that only fills the batch.
    index: the example's row in its data set, -1 in a row that fills the batch.
    preference: probability that response 0 beats response 1 (pairs); None: it does for certain.
    ranks: 0 is best; read only where `response_length > 0`.
    ratings: a number a response, on one scale.
    member_weight: weight of each example for each ensemble member.
    reference_logp: log pi_ref(y|x), summed over tokens.
    rewards: explicit rewards; row 0 is the model trained on all data, the others are the family.
    samples: responses that the reference wrote for this prompt, for the divergence's estimator.
    sample_length: their lengths; all S exist.
    sample_logp: their log pi_ref(y|x).
    token_kl: within a step only: exact KL(pi_ref || pi_theta), summed over tokens, the mean over
      responses.
    sample_log_ratios: within a step only: log-ratios of `samples`.
  """

  prompt: Int[Array, "B P"]
  prompt_length: Int[Array, " B"]
  responses: Int[Array, "B N R"]
  response_length: Int[Array, "B N"]
  response_mask: Bool[Array, "B N R"]
  weight: Float[Array, " B"]
  index: Int[Array, " B"]
  preference: Float[Array, " B"] | None = None
  ranks: Int[Array, "B N"] | None = None
  ratings: Float[Array, "B N"] | None = None
  member_weight: Float[Array, "K B"] | None = None
  reference_logp: Float[Array, "B N"] | None = None
  rewards: Float[Array, "K B N"] | None = None
  samples: Int[Array, "B S R"] | None = None
  sample_length: Int[Array, "B S"] | None = None
  sample_logp: Float[Array, "B S"] | None = None
  token_kl: Float[Array, " B"] | None = None
  sample_log_ratios: Float[Array, "B S"] | None = None

  @property
  def mask(self) -> Bool[Array, "B N"]:
    """True where a response exists."""
    return self.response_length > 0

  def with_samples(self) -> "Batch":
    """The batch whose responses are this one's, followed by the reference's samples.

    It has no labels and no scores, which are of this one's responses alone.
    """
    if self.samples is None or self.sample_length is None:
      raise ValueError(
        "the batch holds no samples of the reference: set Score.samples, and score again"
      )
    positions = jnp.arange(self.samples.shape[-1])[None, None]
    sample_mask = positions < self.sample_length[:, :, None]
    return dataclasses.replace(
      self,
      responses=jnp.concatenate([self.responses, self.samples], 1),
      response_length=jnp.concatenate([self.response_length, self.sample_length], 1),
      response_mask=jnp.concatenate([self.response_mask, sample_mask], 1),
      preference=None,
      ranks=None,
      ratings=None,
      reference_logp=None,
      rewards=None,
    )


@dataclasses.dataclass(frozen=True)
class Dataset:
  """M examples in columns (NumPy), named as in `Batch`, with `ids` and content `keys`.

  `ids` names an example to people and seeds the hashes of subsets; `keys` (a hash of prompt
  and response ids) names its content to the score store.
  """

  ids: np.ndarray
  prompt: np.ndarray
  prompt_length: np.ndarray
  responses: np.ndarray
  response_length: np.ndarray
  response_mask: np.ndarray
  weight: np.ndarray
  preference: np.ndarray | None = None
  ranks: np.ndarray | None = None
  ratings: np.ndarray | None = None
  member_weight: np.ndarray | None = None
  reference_logp: np.ndarray | None = None
  rewards: np.ndarray | None = None
  samples: np.ndarray | None = None
  sample_length: np.ndarray | None = None
  sample_logp: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.prompt_length)

  @property
  def mask(self) -> np.ndarray:
    """[M, N], True where a response exists."""
    return self.response_length > 0

  @property
  def keys(self) -> np.ndarray:
    """[M] hexadecimal, 32 characters: a hash of prompt ids, response ids and response mask."""
    out = np.empty(len(self), "S32")
    for row in range(len(self)):
      digest = hashlib.sha256()
      digest.update(self.prompt[row, : self.prompt_length[row]].astype("<i4").tobytes())
      for j, length in enumerate(self.response_length[row]):
        digest.update(b"|%d|" % length)
        digest.update(self.responses[row, j, :length].astype("<i4").tobytes())
        digest.update(np.packbits(self.response_mask[row, j, :length]).tobytes())
      out[row] = digest.hexdigest()[:32].encode()
    return out

  @classmethod
  def concatenate(cls, parts: Sequence["Dataset"]) -> "Dataset":
    """The examples of several data sets of one shape, in order; a column must be in all or none."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
      columns = [getattr(part, field.name) for part in parts]
      if any(column is None for column in columns):
        if any(column is not None for column in columns):
          raise ValueError(f"column {field.name!r} is in some of the data sets, not in all")
        values[field.name] = None
      else:
        values[field.name] = np.concatenate(columns, int(field.name in MEMBER_COLUMNS))
    return cls(**values)

  def take(self, rows: np.ndarray) -> "Dataset":
    """The data set of the given rows, in the given order."""
    values = {}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is not None:
        value = value[:, rows] if field.name in MEMBER_COLUMNS else value[rows]
      values[field.name] = value
    return Dataset(**values)

  def replace(self, **columns: Any) -> "Dataset":
    """A copy with the given columns replaced."""
    return dataclasses.replace(self, **columns)

  def batch(self, rows: np.ndarray, size: int | None = None) -> Batch:
    """The examples of `rows` as a NumPy-backed `Batch`, filled to `size` rows of weight 0."""
    rows = np.asarray(rows)
    real = len(rows)
    size = real if size is None else size
    index = np.concatenate([rows, np.full(size - real, -1, rows.dtype)]).astype(np.int32)
    filled = np.concatenate([rows, np.zeros(size - real, rows.dtype)])
    columns: dict[str, Any] = {"index": index}
    for name in COLUMNS:
      value = getattr(self, name)
      if value is not None:
        columns[name] = value[:, filled] if name in MEMBER_COLUMNS else value[filled]
    if size > real:
      columns["weight"] = columns["weight"].copy()
      columns["weight"][real:] = 0.0
      if "member_weight" in columns:
        columns["member_weight"] = columns["member_weight"].copy()
        columns["member_weight"][:, real:] = 0.0
    return Batch(**columns)
