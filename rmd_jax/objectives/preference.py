"""Losses that fit the policy to preferences directly: DPO and IPO."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from rmd_jax.objectives.inputs import Scalar, expect_shape, preferences, responses, scalar
from rmd_jax.objectives.pairs import logistic
from rmd_jax.objectives.reward_models import plackett_luce


def dpo(
  log_ratios: Float[Array, "B N"],
  *,
  beta: Scalar,
  label_smoothing: Scalar = 0.0,
  preference: Float[Array, " B"] | None = None,
  ranks: Num[Array, "B N"] | None = None,
  mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, " B"]:
  """Direct preference optimisation: -log σ(β Δh) on pairs, Plackett-Luce on β h with ranks.

  With p = `preference` (1 by default) and ε = `label_smoothing`, the label of a pair is
  p (1 - ε) + (1 - p) ε and the loss its cross-entropy against σ(β Δh).

  Args:
    log_ratios: h = log π_θ - log π_ref, summed over the response's tokens, EOS included; of a
      pair, the preferred response comes first.
    beta: inverse temperature; β h is the implicit reward.
    label_smoothing: probability that a label is wrong; pairs only.
    preference: probability that the first response wins; pairs only.
    ranks: lower is better; needed for N > 2, where no order is implied.
    mask: True where a response exists; a row with fewer than two has loss 0.

  Returns:
    Losses [B], float32 (float64 if the input is).

  Raises:
    TypeError: log_ratios is None or no array.
    ValueError: shapes differ, N != 2 without ranks, or ranks together with soft labels.

  Source: Rafailov et al., arXiv 2305.18290, section 4 and appendix A.3.

  >>> dpo(jnp.array([[0.0, 0.0], [2.0, -2.0]]), beta=0.5).round(4)
  Array([0.6931, 0.1269], dtype=float32)
  """
  mask, h = responses(mask, log_ratios=log_ratios)
  beta = scalar("beta", beta, h.dtype)
  if ranks is not None:
    if preference is not None or not _is_zero(label_smoothing):
      raise ValueError(
        "dpo: ranks leave no room for preference or label_smoothing; "
        "pass ranks alone, or pairs without ranks"
      )
    return plackett_luce(beta * h, ranks, mask=mask)
  if h.shape[1] != 2:
    raise ValueError(
      f"dpo: {h.shape[1]} responses a prompt have no implied order; pass ranks, or pairs [B, 2]"
    )
  pairs = mask.all(-1)
  label_smoothing = scalar("label_smoothing", label_smoothing, h.dtype)
  first_wins = preferences(preference, pairs, h.dtype)
  return jnp.where(pairs, logistic(beta * (h[:, 0] - h[:, 1]), first_wins, label_smoothing), 0.0)


def ipo(log_ratios: Float[Array, "B 2"], *, tau: Scalar) -> Float[Array, " B"]:
  """Identity preference optimisation: (Δh - 1 / (2 τ))^2.

  Here log-ratios are **sums** over tokens, as in the paper. Several libraries average them over the
  response's length under the name of IPO, so that a β or τ tuned there does not transfer: theirs
  is `ipo(mean_over_length(log_ratios, lengths), tau=tau)`.

  Args:
    log_ratios: h, summed over the response's tokens; the preferred response comes first.
    tau: regularisation; the margin's target is 1 / (2 τ).

  Returns:
    Losses [B], float32 (float64 if the input is).

  Raises:
    TypeError: log_ratios is None or no array.
    ValueError: log_ratios are not [B, 2].

  Source: Azar et al., arXiv 2310.12036, equation 17.

  >>> ipo(jnp.array([[3.0, 1.0]]), tau=0.5)
  Array([1.], dtype=float32)
  """
  _, h = responses(None, log_ratios=log_ratios)
  if h.shape[1] != 2:
    raise ValueError(f"ipo: log_ratios have shape {h.shape}; IPO is defined on pairs, [B, 2]")
  return (h[:, 0] - h[:, 1] - 0.5 / scalar("tau", tau, h.dtype)) ** 2


def mean_over_length(
  log_ratios: Float[Array, "B N"], lengths: Int[Array, "B N"]
) -> Float[Array, "B N"]:
  """Log-ratios a token, for comparison with libraries that average; 0 where a length is 0.

  No objective here averages of its own accord: a mean over length changes what β means.

  >>> mean_over_length(jnp.array([[6.0, -2.0]]), jnp.array([[3, 4]]))
  Array([[ 2. , -0.5]], dtype=float32)
  """
  if lengths is None:
    raise TypeError("lengths is None: mean_over_length divides by them")
  mask, h = responses(lengths > 0, log_ratios=log_ratios)
  expect_shape("lengths", lengths, h.shape)
  return h / jnp.where(mask, lengths, 1)


def _is_zero(value: Scalar) -> bool:
  """Whether a hyperparameter is known to be 0: a Python number, not an array."""
  return isinstance(value, (int, float)) and value == 0
