import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import TINY, make_batch

from rmd_jax.models import logprobs


def naive(hidden, table, targets):
  """Full log-softmax, and its gradients for a given cotangent, in float64 NumPy."""
  scores = hidden @ table
  log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
  probs = np.exp(log_probs)
  values = np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  one_hot = targets[..., None] == np.arange(table.shape[1])

  def pull(cotangent):
    error = cotangent[..., None] * (one_hot - probs)
    return error @ table.T, np.einsum("btd,btv->dv", hidden, error)

  return values, pull


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "chunk", [pytest.param(1, marks=SLOW), 7, pytest.param(12, marks=SLOW), 99]
)
def test_chunks_equal_the_full_softmax(chunk):
  """Pieces of one position, pieces that do not divide the length, even pieces, one piece."""
  rng = np.random.default_rng(0)
  hidden, table = 2 * rng.normal(size=(3, 11, 5)), 2 * rng.normal(size=(5, 17))
  targets = rng.integers(0, 17, (3, 11)).astype(np.int32)
  cotangent = rng.normal(size=(3, 11))
  values, pull = naive(hidden, table, targets)

  @jax.jit
  def ours(hidden, table, targets, cotangent):
    out, vjp = jax.vjp(lambda *x: logprobs.token_logp(*x, targets, chunk=chunk), hidden, table)
    return out, vjp(cotangent)

  with jax.enable_x64(True):
    out, grads = ours(hidden, table, targets, cotangent)
    assert out.dtype == jnp.float64
  np.testing.assert_allclose(out, values, rtol=1e-11, atol=1e-13)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), grads, pull(cotangent)
  )


def test_half_precision_operands_reduce_in_float32():
  rng = np.random.default_rng(1)
  hidden = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.bfloat16)
  table = jnp.asarray(rng.normal(size=(8, 500)), jnp.bfloat16)
  targets = rng.integers(0, 500, (2, 3)).astype(np.int32)
  out = logprobs.token_logp(hidden, table, jnp.asarray(targets), chunk=4)
  assert out.dtype == jnp.float32
  expected, _ = naive(np.float64(hidden), np.float64(table), targets)
  np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_huge_logits_stay_finite():
  hidden = jnp.full((1, 2, 1), 1e4)
  table = jnp.array([[1.0, -1.0, 0.0]])
  targets = jnp.array([[0, 1]])
  out, grads = jax.value_and_grad(lambda h: logprobs.token_logp(h, table, targets, chunk=10).sum())(
    hidden
  )
  np.testing.assert_allclose(out, -2e4)
  assert np.isfinite(grads).all()


def temp_bytes(function, *shapes):
  """Peak temporary memory of the compiled gradient of a sum, in bytes."""
  gradient = jax.grad(lambda *args: function(*args).sum(), argnums=(0, 1))
  return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_log_probabilities_is_a_chunks():
  """Four times the tokens cost next to nothing of what their logits would take."""

  def used(length, chunk=64):
    shapes = [(2, length, 8), (8, 8192)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    targets = jnp.zeros((2, length), jnp.int32)
    return temp_bytes(lambda h, w: logprobs.token_logp(h, w, targets, chunk=chunk), *arrays)

  few, many = used(64), used(256)
  logits = 2 * (256 - 64) * 8192 * 4  # of the added tokens
  assert many - few < 0.02 * logits, (few, many)
  assert many < 4 * 64 * 8192 * 4, "a few chunks' logits, and no more"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["logp", "token_kl"])
def test_memory_of_a_step_does_not_grow_with_vocabulary_times_length(method):
  decoder = dataclasses.replace(TINY, layers=1, vocab_size=8192, logit_chunk=64)
  shapes = jax.eval_shape(decoder.init, jax.random.key(0))

  def used(n):
    batch = make_batch(b=2, n=n, r=8)
    if method == "logp":
      return temp_bytes(lambda params, _: decoder.logp(params, batch), shapes, 0.0)
    return temp_bytes(lambda p, q: decoder.token_kl(p, q, batch), shapes, shapes)

  few, many = used(8), used(32)
  logits = 2 * (32 - 8) * 8 * 8192 * 4
  assert many - few < 0.1 * logits, (few, many)
  assert many < 8 * 64 * 8192 * 4, "a few chunks' logits, and no more"
