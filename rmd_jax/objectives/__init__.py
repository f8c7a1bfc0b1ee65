"""What a policy, or a reward model, is trained on: arrays in, one loss per example out.

Functions of arrays, in the paper's words (arXiv 2405.19316):

- `dpo`, `ipo`: preferences, directly.
- `distill`, `ensemble_distill`: reward model distillation, from one model or from K of them.
- `forward_kl` and its siblings: the divergence that pessimism penalises, weighted by γ.
- `bradley_terry`, `plackett_luce`, `rating`: reward models.
- `diagnostics`: what is logged of all of them.

And the same as frozen dataclasses for the align stage: `DPO`, `IPO`, `Distill`, `EnsembleDistill`,
with `LinearGamma` or `DualGamma`. Reduction over examples is the caller's. jax and jaxtyping are
all that is imported here.
"""

from rmd_jax.objectives.distillation import distill
from rmd_jax.objectives.divergence import forward_kl, forward_kl_samples, forward_kl_tokenwise
from rmd_jax.objectives.ensemble import (
  Selection,
  ensemble_disagreement,
  ensemble_distill,
  initial_state,
)
from rmd_jax.objectives.gamma import DualGamma, DualState, LinearGamma, dual_gamma, dual_step
from rmd_jax.objectives.hull import nearest_in_hull
from rmd_jax.objectives.metrics import diagnostics
from rmd_jax.objectives.plugs import DPO, IPO, Distill, EnsembleDistill
from rmd_jax.objectives.preference import dpo, ipo, mean_over_length
from rmd_jax.objectives.reward_models import bradley_terry, plackett_luce, rating

__all__ = [
  "DPO",
  "IPO",
  "Distill",
  "DualGamma",
  "DualState",
  "EnsembleDistill",
  "LinearGamma",
  "Selection",
  "bradley_terry",
  "diagnostics",
  "distill",
  "dpo",
  "dual_gamma",
  "dual_step",
  "ensemble_disagreement",
  "ensemble_distill",
  "forward_kl",
  "forward_kl_samples",
  "forward_kl_tokenwise",
  "initial_state",
  "ipo",
  "mean_over_length",
  "nearest_in_hull",
  "plackett_luce",
  "rating",
]
