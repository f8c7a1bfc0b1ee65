"""Reward model distillation: the implicit reward regresses on an explicit one."""

import jax
from jaxtyping import Array, Bool, Float

from rmd_jax.objectives.inputs import Scalar, expect_one_of, responses, scalar
from rmd_jax.objectives.pairs import (
  FORMS,
  margin_loss,
  mean_over_pairs,
  mean_square_over_pairs,
  pair_differences,
)


def distill(
  log_ratios: Float[Array, "B N"],
  rewards: Float[Array, "B N"],
  *,
  beta: Scalar,
  mask: Bool[Array, "B N"] | None = None,
  form: str = "square",
) -> Float[Array, " B"]:
  """The distance of implicit from explicit margins, the mean over all pairs of the N responses.

  `square` is (Δr - β Δh)^2: with e_j = r_j - β h_j, the mean over j < k of (e_j - e_k)^2, in O(N).
  `bernoulli` is KL(σ(Δr) ‖ σ(β Δh)), whose gradient by the margin is at most 1; in O(N^2).

  Args:
    log_ratios: h = log π_θ - log π_ref, summed over the response's tokens, EOS included.
    rewards: one reward model's scores, the target; a constant per prompt cancels.
    beta: inverse temperature; β h is the implicit reward.
    mask: True where a response exists; fewer than two give loss 0.
    form: square or bernoulli.

  Returns:
    Losses [B], float32 (float64 if an input is).

  Raises:
    TypeError: an array is missing.
    ValueError: shapes differ, or form is unknown.

  Source: Fisch et al., arXiv 2405.19316 (d-DPO). N > 2 and the Bernoulli form are ours.

  >>> import jax.numpy as jnp
  >>> distill(jnp.zeros((1, 2)), jnp.array([[3.0, 1.0]]), beta=0.1)
  Array([4.], dtype=float32)
  """
  mask, h, r = responses(mask, log_ratios=log_ratios, rewards=rewards)
  expect_one_of("form", form, FORMS)
  implicit = scalar("beta", beta, h.dtype) * h
  target = jax.lax.stop_gradient(r)
  if form == "square":
    return mean_square_over_pairs(target - implicit, mask)
  losses = margin_loss(pair_differences(target), pair_differences(implicit), form)
  return mean_over_pairs(losses, mask)
