"""Pessimistic ensemble distillation (e-DPO): one policy, K reward models.

Two families share one interface. `batch`, `example`, `running`, `worst` and `soft` weight the
members' losses; `mean`, `hull` and `lcb` change the target. Weights and targets are constants in
the gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rmd_jax.objectives.averages import MovingAverage
from rmd_jax.objectives.distillation import distill
from rmd_jax.objectives.hull import hull_statistics, nearest_in_hull
from rmd_jax.objectives.inputs import (
  Scalar,
  example_weights,
  expect_one_of,
  members,
  scalar,
  weighted_mean,
)
from rmd_jax.objectives.pairs import (
  FORMS,
  centred,
  margin_loss,
  mean_over_pairs,
  mean_square_over_pairs,
  pair_differences,
)

SELECTIONS = ("batch", "example", "running", "worst", "soft", "mean", "hull", "lcb")
STATISTICS = ("batch", "running")


class Selection(NamedTuple):
  """What an ensemble objective made of its members.

  Attributes:
    weights: how much each member counts: [K], or [K, B] for `example`. One-hot where a member is
      picked, λ for `hull`, uniform for `mean` and `lcb`.
    state: the moving averages after this step, to be passed to the next one; None where the
      selection keeps none.
  """

  weights: Float[Array, "K *B"]
  state: MovingAverage | None = None


def initial_state(
  members: int, *, selection: str, statistics: str = "batch"
) -> MovingAverage | None:
  """The state before the first step: moving averages of nothing, or None where none are kept."""
  expect_one_of("selection", selection, SELECTIONS)
  expect_one_of("statistics", statistics, STATISTICS)
  if selection == "running":
    return MovingAverage.empty((members,))
  if selection == "hull" and statistics == "running":
    return MovingAverage.empty((members, members), (members,))
  return None


def ensemble_distill(
  log_ratios: Float[Array, "B N"],
  rewards: Float[Array, "K B N"],
  *,
  beta: Scalar,
  selection: str = "batch",
  mask: Bool[Array, "B N"] | None = None,
  weights: Float[Array, " B"] | None = None,
  kappa: Scalar = 1.0,
  temperature: Scalar = 1.0,
  state: MovingAverage | None = None,
  form: str = "square",
  statistics: str = "batch",
  update: Scalar = True,
) -> tuple[Float[Array, " B"], Selection]:
  """Distillation of the reward model, or the mixture of them, that is nearest to the policy.

  With L_i the distillation loss of member i and L̄_i its mean over the batch, the loss is

  - `batch`: L_i of the least L̄_i, as min_i E[.] is written;
  - `example`: the least L_i of each example;
  - `running`: L_i of the least moving average of L̄_i, after this step's update (ours);
  - `worst`: L_i of the member that thinks least of the policy: the least
    A_i = mean_b Σ_j (softmax_j(h_b) - 1/n_b) r_ibj, an estimate of E_π r_i - E_ref r_i;
  - `soft`: Σ w_i L_i with w = softmax(-L̄ / temperature);
  - `mean`: distillation of the mean reward;
  - `hull`: of Σ λ_i r_i, with λ in the simplex that minimises the batch mean (ours): never above
    `batch`, and the saddle point of the max-min problem that the argmin only approximates;
  - `lcb`: of the margins sign(μ) max(|μ| - kappa σ, 0), with mean μ and population deviation σ of
    the members' margins.

  Ties take the lowest index. K = 1 is `distill`.

  Args:
    log_ratios: h = log π_θ - log π_ref, summed over the response's tokens, EOS included.
    rewards: each member's scores; a constant per prompt and member cancels.
    beta: inverse temperature; β h is the implicit reward.
    selection: how the members are used, see above.
    mask: True where a response exists; fewer than two give loss 0.
    weights: example weights in the means that select; not multiplied into the returned losses.
    kappa: deviations that `lcb` takes off a margin.
    temperature: of `soft`.
    state: moving averages from the step before (`Selection.state`); None starts afresh.
    form: square or bernoulli, as in `distill`; `hull` is a quadratic programme, so square only.
    statistics: what `hull` solves its programme on: this `batch`, or `running` averages of the
      Gram matrix and right side, which keep λ from fitting the noise of small batches.
    update: 0 freezes the moving averages, as evaluation must.

  Returns:
    Losses [B], float32 (float64 if an input is), and the `Selection`.

  Raises:
    TypeError: an array is missing.
    ValueError: shapes differ, a name is unknown, `hull` with bernoulli, or running statistics with
      a selection that has none.

  Source: Fisch et al., arXiv 2405.19316, section 4.2 (e-DPO, `batch`); Coste et al., arXiv
    2310.02743, for `worst`- and `lcb`-like uses of ensembles; the others are ours.

  >>> rewards = jnp.array([[[3.0, 1.0]], [[1.0, 1.0]]])  # two members, one pair
  >>> losses, chosen = ensemble_distill(jnp.zeros((1, 2)), rewards, beta=0.1)
  >>> losses, chosen.weights
  (Array([0.], dtype=float32), Array([0., 1.], dtype=float32))
  """
  mask, h, rewards = members(rewards, log_ratios, mask)
  weights = example_weights(weights, h)
  expect_one_of("selection", selection, SELECTIONS)
  expect_one_of("form", form, FORMS)
  expect_one_of("statistics", statistics, STATISTICS)
  if selection == "hull" and form != "square":
    raise ValueError("selection='hull' is a quadratic programme: use form='square', or 'batch'")
  if selection != "hull" and statistics != "batch":
    raise ValueError(f"statistics='running' belongs to 'hull'; {selection!r} has no such option")
  beta, kappa, temperature = (
    scalar(name, value, h.dtype)
    for name, value in {"beta": beta, "kappa": kappa, "temperature": temperature}.items()
  )
  start = initial_state(len(rewards), selection=selection, statistics=statistics)
  state = start if state is None or start is None else _expect_like(start, state)
  learn = (scalar("update", update, h.dtype) > 0) & (weights.sum() > 0)
  even = jnp.full(len(rewards), 1.0 / len(rewards), h.dtype)

  if selection == "lcb":
    target = _lower_margins(rewards, kappa)
    losses = margin_loss(target, pair_differences(beta * h), form)
    return mean_over_pairs(losses, mask), Selection(even)

  if selection in ("mean", "hull"):
    mixture = even
    if selection == "hull":
      moments = jax.lax.stop_gradient(hull_statistics(beta * h, rewards, mask, weights))
      if state is not None:
        state = state.updated(moments, learn)
        moments = tuple(moment.astype(h.dtype) for moment in state.mean(moments))
      mixture = nearest_in_hull(*moments)
    target = (mixture[:, None, None] * rewards).sum(0)
    return distill(h, target, beta=beta, mask=mask, form=form), Selection(mixture, state)

  losses = jax.vmap(lambda r: distill(h, r, beta=beta, mask=mask, form=form))(rewards)  # [K, B]
  fixed = jax.lax.stop_gradient(losses)
  if selection == "example":
    chosen = _one_hot_least(fixed)
    return (chosen * losses).sum(0), Selection(chosen)
  means = weighted_mean(fixed, weights)
  if selection == "soft":
    chosen = jax.nn.softmax(-means / jax.lax.stop_gradient(temperature))
  elif selection == "worst":
    chosen = _one_hot_least(_advantages(h, rewards, mask, weights))
  else:
    if state is not None:
      state = state.updated((means,), learn)
      (means,) = state.mean((means,))
    chosen = _one_hot_least(means.astype(h.dtype))
  return (chosen[:, None] * losses).sum(0), Selection(chosen, state)


def ensemble_disagreement(
  rewards: Float[Array, "K B N"],
  *,
  mask: Bool[Array, "B N"] | None = None,
  weights: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
  """E[Var_i Δr_i]: the members' population variance of a margin, the mean over pairs and examples.

  It is the default of the dual controller's ε: a policy can come no nearer to all members.

  >>> ensemble_disagreement(jnp.array([[[3.0, 1.0]], [[1.0, 1.0]]]))
  Array(1., dtype=float32)
  """
  first = None if rewards is None or rewards.ndim != 3 or len(rewards) == 0 else rewards[0]
  mask, _, rewards = members(rewards, first, mask)
  own = rewards - rewards[:1]  # first, so that members that agree are exactly 0 apart
  own = own - own.mean(0, keepdims=True)
  variance = jax.vmap(lambda r: mean_square_over_pairs(r, mask))(own).mean(0)
  return weighted_mean(variance, example_weights(weights, rewards[0]))


def _expect_like(start: MovingAverage, state: MovingAverage) -> MovingAverage:
  """The state, if its averages have the shapes that this selection and K ask for."""
  wanted, given = ([leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (start, state))
  if wanted != given:
    raise ValueError(
      f"state holds arrays of shapes {given}, this selection needs {wanted}: it belongs to another "
      "selection or number of members; start with initial_state"
    )
  return state


def _one_hot_least(values: Float[Array, "K *B"]) -> Float[Array, "K *B"]:
  """1 at the least member, the first of equals, 0 at the others."""
  return jax.nn.one_hot(jnp.argmin(values, 0), len(values), axis=0, dtype=values.dtype)


def _advantages(
  h: Float[Array, "B N"],
  rewards: Float[Array, "K B N"],
  mask: Bool[Array, "B N"],
  weights: Float[Array, " B"],
) -> Float[Array, " K"]:
  """A_i: by how much member i prefers the policy's weighting of the responses to an even one."""
  policy = jax.nn.softmax(jnp.where(mask, h, jnp.finfo(h.dtype).min), axis=-1)
  above_average = centred(rewards, jnp.broadcast_to(mask, rewards.shape))
  return weighted_mean((policy[None] * above_average).sum(-1), weights)


def _lower_margins(rewards: Float[Array, "K B N"], kappa: Float[Array, ""]) -> Float[Array, "B P"]:
  """The members' mean margins, drawn towards 0 by kappa deviations."""
  margins = pair_differences(rewards)  # [K, B, P]
  mean = margins.mean(0)
  deviation = margins.std(0)
  return jax.lax.stop_gradient(jnp.sign(mean) * jnp.maximum(jnp.abs(mean) - kappa * deviation, 0.0))
