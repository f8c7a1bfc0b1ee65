"""What a stage gives to the training loop."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, PRNGKeyArray

from rmd_jax.data.batch import Batch

Params = dict[str, Any]
"""`{"frozen", "shared", "members"}`: never updated; one copy; a leading member axis a leaf."""


class Loss(NamedTuple):
  """An unreduced loss, so that microbatches and hosts add up to the large batch.

  Attributes:
    sum: sum of weighted losses, a scalar, or [K] with members.
    weight: the denominator, of the same shape; a function of the batch alone.
    aux: scalars to log.
    carry: the objective's state after this step (moving averages, dual variables).
  """

  sum: Float[Array, "*K"]
  weight: Float[Array, "*K"]
  aux: dict[str, Float[Array, ""]]
  carry: Any


@runtime_checkable
class Stage(Protocol):
  """A frozen, hashable dataclass: the jitted step takes it as a static argument.

  `outputs` runs the model on some of the examples; `objective` turns the outputs of the whole batch
  into a loss. The split lets the loop accumulate over microbatches an objective that is no sum over
  examples (`coupled`).
  """

  @property
  def members(self) -> int:
    """K, the length of the member axis; 0 where there is none."""

  @property
  def coupled(self) -> bool:
    """Whether the objective is no sum over examples."""

  def __hash__(self) -> int:
    """Equal stages share a program."""

  def outputs(self, params: Params, batch: Batch, *, rng: PRNGKeyArray) -> Any:
    """Per-example arrays: examples on axis 0, or on axis 1 where `members` > 0."""

  def objective(
    self,
    outputs: Any,
    batch: Batch,
    *,
    step: Array,
    hyper: Mapping[str, Array],
    carry: Any,
  ) -> Loss:
    """The loss of a whole batch from its outputs."""

  def denominator(self, batch: Batch) -> Float[Array, "*K"]:
    """`Loss.weight` of that batch."""
