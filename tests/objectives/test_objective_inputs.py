"""Precision, extreme values, traced scalars, and what is refused at the call."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmd_jax import objectives

H = jnp.array([[1.0, -2.0], [0.5, 3.0], [0.0, 0.0]])
R = jnp.stack([H[:, ::-1], 2.0 * H, H - 1.0])  # [K, B, N]
RANKS = jnp.array([[0, 1], [1, 0], [0, 1]])

LOSSES = {
  "dpo": lambda h, r: objectives.dpo(h, beta=0.1),
  "dpo, soft": lambda h, r: objectives.dpo(
    h, beta=0.1, preference=jnp.full(len(h), 0.7, h.dtype), label_smoothing=0.1
  ),
  "dpo, ranks": lambda h, r: objectives.dpo(h, beta=0.1, ranks=RANKS),
  "ipo": lambda h, r: objectives.ipo(h, tau=0.1),
  "distill": lambda h, r: objectives.distill(h, r[0], beta=0.1),
  "distill, bernoulli": lambda h, r: objectives.distill(h, r[0], beta=0.1, form="bernoulli"),
  "bradley_terry": lambda h, r: objectives.bradley_terry(h, label_smoothing=0.1, centre=0.01),
  "plackett_luce": lambda h, r: objectives.plackett_luce(h, RANKS),
  "rating": lambda h, r: objectives.rating(h, r[0]),
  "forward_kl": lambda h, r: objectives.forward_kl(h),
  **{
    selection: functools.partial(
      lambda h, r, selection: objectives.ensemble_distill(h, r, beta=0.1, selection=selection)[0],
      selection=selection,
    )
    for selection in ("batch", "example", "running", "worst", "soft", "mean", "hull", "lcb")
  },
}


def test_losses_and_gradients_are_finite_at_extreme_log_ratios():
  @jax.jit
  def losses_and_slopes(h):
    losses = {name: loss(h, R) for name, loss in LOSSES.items()}
    slopes = {
      name: jax.grad(lambda h, loss=loss: loss(h, R).sum())(h) for name, loss in LOSSES.items()
    }
    return losses, slopes

  for extreme in (1e4, -1e4):
    h = jnp.array([[extreme, -extreme], [extreme, extreme], [0.0, extreme]])
    losses, slopes = losses_and_slopes(h)
    for name in LOSSES:
      assert losses[name].shape == (3,), name
      assert jnp.isfinite(losses[name]).all(), name
      assert jnp.isfinite(slopes[name]).all(), name


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_becomes_single_and_double_stays(name):
  for given in (jnp.bfloat16, jnp.float16, jnp.float32):
    shape = jax.eval_shape(LOSSES[name], H.astype(given), R.astype(given))
    assert (shape.shape, shape.dtype) == ((3,), jnp.float32), given
  with jax.enable_x64(True):
    double = [jax.ShapeDtypeStruct(x.shape, jnp.float64) for x in (H, R)]
    assert jax.eval_shape(LOSSES[name], *double).dtype == jnp.float64


def test_half_precision_is_widened_before_any_arithmetic():
  h = jnp.array([[256.0, 0.0]], jnp.bfloat16)
  r = jnp.array([[1.0, 0.0]], jnp.bfloat16)
  np.testing.assert_array_equal(objectives.distill(h, r, beta=1.0), [255.0**2])  # 256 in bf16


def test_scalars_may_be_traced_and_change_without_compiling_anew():
  traces = []

  @jax.jit
  def losses(beta, tau, kappa, temperature, gamma):
    traces.append(None)
    return (
      objectives.dpo(H, beta=beta, label_smoothing=kappa / 10)
      + objectives.ipo(H, tau=tau)
      + objectives.ensemble_distill(H, R, beta=beta, selection="lcb", kappa=kappa)[0]
      + objectives.ensemble_distill(H, R, beta=beta, selection="soft", temperature=temperature)[0]
      + gamma * objectives.forward_kl(H)
    )

  one, other = losses(0.1, 0.2, 0.5, 1.0, 0.0), losses(0.2, 0.2, 0.5, 1.0, 0.0)
  assert len(traces) == 1
  assert (one != other).any()
  with_numbers = jax.jit(lambda: losses.__wrapped__(0.2, 0.2, 0.5, 1.0, 0.0))()
  np.testing.assert_allclose(other, with_numbers, rtol=1e-5)


@pytest.mark.parametrize("selection", ["batch", "hull"])
def test_objectives_can_be_mapped_over_hyperparameters(selection):
  betas = jnp.array([0.1, 0.5, 2.0])

  @jax.jit
  def losses(beta):
    return objectives.ensemble_distill(H, R, beta=beta, selection=selection)[0]

  mapped = jax.jit(jax.vmap(losses))(betas)
  for beta, row in zip(betas, mapped, strict=True):
    np.testing.assert_allclose(row, losses(beta), rtol=1e-4, atol=1e-5)


REFUSALS = """
import jax, jax.numpy as jnp, numpy as np
from rmd_jax import objectives as o

pair, three, family = jnp.zeros((4, 2)), jnp.zeros((4, 3)), jnp.zeros((2, 4, 2))
calls = {
  "dpo: no log-ratios": lambda: o.dpo(None, beta=0.1),
  "dpo: beta None": lambda: o.dpo(pair, beta=None),
  "dpo: beta [B]": lambda: o.dpo(pair, beta=jnp.ones(4)),
  "dpo: one axis": lambda: o.dpo(pair[:, 0], beta=0.1),
  "dpo: a list": lambda: o.dpo([[0.0, 0.0]], beta=0.1),
  "dpo: booleans": lambda: o.dpo(pair > 0, beta=0.1),
  "dpo: preference [B, 1]": lambda: o.dpo(pair, beta=0.1, preference=jnp.ones((4, 1))),
  "dpo: ranks of another shape": lambda: o.dpo(three, beta=0.1, ranks=jnp.zeros((4, 2))),
  "ipo: three responses": lambda: o.ipo(three, tau=0.1),
  "distill: no rewards": lambda: o.distill(pair, None, beta=0.1),
  "distill: rewards of fewer rows": lambda: o.distill(pair, pair[:1], beta=0.1),
  "distill: rewards [B, 1]": lambda: o.distill(pair, pair[:, :1], beta=0.1),
  "distill: mask of another shape": lambda: o.distill(
    pair, pair, beta=0.1, mask=jnp.ones((4, 1), bool)),
  "distill: mask of numbers": lambda: o.distill(pair, pair, beta=0.1, mask=jnp.ones((4, 2))),
  "distill: unknown form": lambda: o.distill(pair, pair, beta=0.1, form="cubic"),
  "ensemble: no rewards": lambda: o.ensemble_distill(pair, None, beta=0.1),
  "ensemble: no log-ratios": lambda: o.ensemble_distill(None, family, beta=0.1),
  "ensemble: one reward model": lambda: o.ensemble_distill(pair, pair, beta=0.1),
  "ensemble: no member": lambda: o.ensemble_distill(pair, family[:0], beta=0.1),
  "ensemble: unknown selection": lambda: o.ensemble_distill(pair, family, beta=0.1, selection="x"),
  "ensemble: unknown statistics": lambda: o.ensemble_distill(
    pair, family, beta=0.1, selection="hull", statistics="x"),
  "ensemble: weights [B, 1]": lambda: o.ensemble_distill(
    pair, family, beta=0.1, weights=jnp.ones((4, 1))),
  "forward_kl: unknown estimator": lambda: o.forward_kl(pair, estimator="x"),
  "forward_kl: no log-ratios": lambda: o.forward_kl(None),
  "bradley_terry: three": lambda: o.bradley_terry(three),
  "plackett_luce: no ranks": lambda: o.plackett_luce(three, None),
  "rating: no ratings": lambda: o.rating(three, None),
  "rating: another shape": lambda: o.rating(three, pair),
  "diagnostics: three of unknown order": lambda: o.diagnostics(three, beta=0.1),
  "diagnostics: no log-ratios": lambda: o.diagnostics(None, family, beta=0.1),
  "diagnostics: lengths [B]": lambda: o.diagnostics(pair, None, jnp.ones(4), beta=0.1),
  "mean_over_length: no lengths": lambda: o.mean_over_length(pair, None),
  "ensemble_disagreement: no rewards": lambda: o.ensemble_disagreement(None),
  "ensemble_disagreement: two axes": lambda: o.ensemble_disagreement(pair),
}
for name, call in calls.items():
  for how, run in {"eager": call, "jit": jax.jit(call)}.items():
    try:
      run()
    except (TypeError, ValueError) as error:
      assert type(error) in (TypeError, ValueError), (name, error)
      message = str(error)
      assert any(word in message for word in ("None", "shape", "pass", "unknown", "mask")), message
    else:
      raise SystemExit(f"{name} ({how}) was not refused")
print("refused", len(calls))
"""


def test_mistakes_are_refused_at_the_call_without_a_checking_hook():
  # A process of its own: here, pytest has put jaxtyping's hook on the package.
  done = subprocess.run(
    [sys.executable, "-c", REFUSALS], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.startswith("refused")


def test_objectives_import_jax_and_jaxtyping_only():
  folder = Path(objectives.__file__).parent
  for file in folder.glob("*.py"):
    for node in ast.walk(ast.parse(file.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) else []
      for name in names:
        root = name.split(".")[0]
        ours = name.startswith("rmd_jax.objectives")
        assert ours or root in {"jax", "jaxtyping", *sys.stdlib_module_names}, (file.name, name)
