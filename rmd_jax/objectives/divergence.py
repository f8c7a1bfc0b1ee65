"""Estimators of the forward divergence KL(π_ref ‖ π_θ) = E_{y ~ π_ref}[-h(x, y)].

What each is an expectation over, and so what it can be called:

- `forward_kl`, on the offline responses, which stand in for samples of π_ref. It is maximum
  likelihood on the data's responses and no KL unless they came from π_ref: it may be negative, and
  it inherits the data's bias. Log it as `kl/forward_pairs`.
- `forward_kl_samples`, on responses sampled from π_ref and stored with the data: unbiased.
- `forward_kl_tokenwise`, exact at every token of the prefixes it is given: lower variance, and
  unbiased where the prefixes came from π_ref. h [B, N] alone cannot give it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rmd_jax.objectives.inputs import expect_one_of, responses

ESTIMATORS = ("pairs", "chosen", "samples", "tokenwise")


def forward_kl(
  log_ratios: Float[Array, "B N"],
  *,
  estimator: str = "pairs",
  mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, " B"]:
  """The forward divergence as estimated from the data's own responses.

  -h is summed over tokens and never divided by length; `pairs` is the **mean** of -h over a
  prompt's responses. The paper writes the sum over the pair, so its γ is half of ours.

  Args:
    log_ratios: h = log π_θ - log π_ref, summed over the response's tokens, EOS included.
    estimator: `pairs` (all responses), or `chosen` (the first of a pair). `samples` and
      `tokenwise` need more than h: see `forward_kl_samples` and `forward_kl_tokenwise`.
    mask: True where a response exists; a row without any gives 0.

  Returns:
    Estimates [B], float32 (float64 if the input is).

  Raises:
    TypeError: log_ratios is None or no array.
    ValueError: shapes differ, the estimator is unknown or needs more than h, or `chosen` is asked
      of N > 2 responses, whose order says nothing.

  Source: Fisch et al., arXiv 2405.19316, section 4 (there with the sum over the pair).

  >>> forward_kl(jnp.array([[-1.0, -3.0]]))
  Array([2.], dtype=float32)
  >>> forward_kl(jnp.array([[-1.0, -3.0]]), estimator="chosen")
  Array([1.], dtype=float32)
  """
  mask, h = responses(mask, log_ratios=log_ratios)
  expect_one_of("estimator", estimator, ESTIMATORS)
  if estimator in ("samples", "tokenwise"):
    raise ValueError(
      f"estimator={estimator!r} cannot be had from log_ratios: call forward_kl_{estimator}"
    )
  if estimator == "pairs":
    return _mean(-h, mask)
  if h.shape[1] != 2:
    raise ValueError(f"estimator='chosen' reads the first of a pair; there are {h.shape[1]}")
  return -h[:, 0]


def forward_kl_samples(
  sample_log_ratios: Float[Array, "B S"], *, mask: Bool[Array, "B S"] | None = None
) -> Float[Array, " B"]:
  """Mean of -h over responses sampled from π_ref; unbiased, and negative by chance at most.

  >>> forward_kl_samples(jnp.array([[-1.0, 0.5, -1.0]]))
  Array([0.5], dtype=float32)
  """
  mask, h = responses(mask, sample_log_ratios=sample_log_ratios)
  return _mean(-h, mask)


def forward_kl_tokenwise(
  token_kl: Float[Array, "B N"], *, mask: Bool[Array, "B N"] | None = None
) -> Float[Array, " B"]:
  """Mean over a prompt's responses of exact per-token divergences, summed along the response.

  Args:
    token_kl: for each response, Σ_t KL(π_ref(·|x, y_<t) ‖ π_θ(·|x, y_<t)) over the vocabulary.
    mask: True where a response exists; a row without any gives 0.

  Source: ours.

  >>> forward_kl_tokenwise(jnp.array([[0.5, 1.5]]))
  Array([1.], dtype=float32)
  """
  mask, kl = responses(mask, token_kl=token_kl)
  return _mean(kl, mask)


def _mean(values: Float[Array, "B N"], mask: Bool[Array, "B N"]) -> Float[Array, " B"]:
  """Mean over the responses that exist; `values` are 0 elsewhere."""
  return jnp.where(mask, values, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
