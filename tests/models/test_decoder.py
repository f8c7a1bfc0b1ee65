import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TINY, make_batch, parameters, variant

from rmd_jax.errors import UserError
from rmd_jax.models import Decoder, placement
from rmd_jax.models.attention import Places, places, visible
from rmd_jax.models.transformer import Transformer

AXES = {"vocab": "vocab_size", "embed": "width", "heads": "heads", "kv_heads": "kv_heads",
        "head_dim": "head_dim", "mlp": "mlp_width", "layers": "layers"}  # fmt: skip


def vary(params, seed=1):
  """Parameters in which nothing has its initial special value (norm scales of 1)."""
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  noise = [0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves]
  return tree.unflatten([leaf + n for leaf, n in zip(leaves, noise, strict=True)])


@functools.partial(jax.jit, static_argnums=0)
def step(decoder, params, batch, weights):
  """Log-probabilities, and the gradient of a loss in which every response counts differently."""

  def loss(params):
    values = decoder.logp(params, batch)
    return (values * weights + 0.1 * values**2).sum(), values

  grads, values = jax.grad(loss, has_aux=True)(params)
  return values, grads


logp = jax.jit(lambda decoder, params, batch: decoder.logp(params, batch), static_argnums=0)
WEIGHTS = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)


@pytest.mark.parametrize(
  "decoder, sizes",
  [
    (TINY, {"p": 7, "n": 3, "r": 5}),
    pytest.param(
      variant(heads=3, kv_heads=1, activation="gelu", tie_embeddings=False),
      {"p": 1, "n": 1, "r": 4}, marks=pytest.mark.slow
    ),
    pytest.param(
      variant(kv_heads=4, logit_chunk=7), {"p": 4, "n": 2, "r": 9}, marks=pytest.mark.slow
    ),
  ],
  ids=["grouped-query", "multi-query-untied-gelu", "multi-head-chunked"],
)  # fmt: skip
def test_shared_prompt_equals_concatenated_rows(decoder, sizes):
  """Value and gradient, in float64, against code that shares nothing with the package."""
  params = reference.exact(parameters(decoder))
  batch = make_batch(3, **sizes)
  weights = WEIGHTS[:, : sizes["n"]].astype(np.float64)

  def loss(params):
    values = reference.logp(decoder, params, batch)
    return (values * weights + 0.1 * values**2).sum()

  with jax.enable_x64(True):
    exact = dataclasses.replace(decoder, dtype="float64", param_dtype="float64")
    values, grads = step(exact, params, batch, weights)
  np.testing.assert_allclose(values, reference.logp(decoder, params, batch), rtol=1e-12)
  for name, direction, slope in reference.slopes(loss, params):
    assert abs(slope) > 1e-3, name  # else equality says nothing
    np.testing.assert_allclose(reference.dot(grads, direction), slope, rtol=1e-7, err_msg=name)


def exact_step(batch):
  """`step` of TINY in float64, on the sizes that share one program."""
  params = reference.exact(parameters(TINY))
  decoder = variant(dtype="float64", param_dtype="float64")
  with jax.enable_x64(True):
    return jax.tree.map(np.asarray, step(decoder, params, batch, WEIGHTS.astype(np.float64)))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_lengths_equal_the_rows(data):
  lengths = data.draw(st.lists(st.integers(1, 7), min_size=3, max_size=3))
  responses = data.draw(st.lists(st.integers(0, 5), min_size=9, max_size=9))
  batch = make_batch(
    data.draw(st.integers(0, 99)), prompt_length=lengths,
    response_length=np.reshape(responses, (3, 3)),
  )  # fmt: skip
  values, grads = exact_step(batch)
  expected = reference.logp(TINY, reference.exact(parameters(TINY)), batch)
  np.testing.assert_allclose(values, expected, rtol=1e-11, atol=1e-11)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def garbage(batch, seed):
  """The batch with other ids in its padding: outside the vocabulary, negative, huge."""
  rng = np.random.default_rng(seed)
  ids = np.array([-1, -(2**31), 2**31 - 1, 36, 37, 10**6, 0], np.int32)
  pad = np.arange(batch.prompt.shape[1])[None] >= batch.prompt_length[:, None]
  prompt = np.where(pad, rng.choice(ids, batch.prompt.shape), batch.prompt)
  pad = np.arange(batch.responses.shape[2])[None, None] >= batch.response_length[:, :, None]
  responses = np.where(pad, rng.choice(ids, batch.responses.shape), batch.responses)
  return batch.replace(prompt=prompt, responses=responses)


def test_padding_is_not_read():
  """Bit for bit, in value and gradient, and a mask that is True in the padding changes nothing."""
  batch = make_batch(5)
  expected = exact_step(batch)
  for seed in range(3):
    other = garbage(batch, seed)
    assert (other.prompt != batch.prompt).any()
    other = other.replace(response_mask=np.ones_like(batch.response_mask))
    jax.tree.map(np.testing.assert_array_equal, exact_step(other), expected)


def test_more_padding_changes_nothing():
  batch = make_batch(6)
  wide = batch.replace(
    prompt=np.pad(batch.prompt, [(0, 0), (0, 4)], constant_values=9),
    responses=np.pad(batch.responses, [(0, 0), (0, 0), (0, 3)], constant_values=9),
    response_mask=np.pad(batch.response_mask, [(0, 0), (0, 0), (0, 3)]),
  )
  values = logp(TINY, parameters(TINY), wide)  # float32 against float64
  np.testing.assert_allclose(values, exact_step(batch)[0], rtol=1e-5, atol=1e-5)


def test_masks_know_positions_not_indices():
  """Tokens in any order in the array, with padding between, give the same states."""
  params = parameters(TINY)
  batch = make_batch(7, n=2, p=6, prompt_length=[4, 6, 1], response_length=[[3, 5], [2, 4], [5, 1]])
  b, p = batch.prompt.shape
  n, r = batch.responses.shape[1:]
  lengths = jnp.asarray(batch.prompt_length), jnp.asarray(batch.response_length)
  prompt, response = places(*lengths, (p, r))
  rng = np.random.default_rng(0)

  @jax.jit
  def states(prompt_tokens, prompt, response_tokens, response):
    flat = lambda x, y: jnp.concatenate([x, y.reshape(b, -1)], axis=1)  # noqa: E731
    hidden, _ = Transformer(TINY).apply(
      {"params": params}, flat(prompt_tokens, response_tokens),
      Places(*map(flat, prompt, response)), prompt, response,
    )  # fmt: skip
    return hidden[:, :p], hidden[:, p:].reshape(b, n, r, -1)

  def shuffled(order, *arrays):
    return [np.take_along_axis(np.asarray(x), order, axis=-1) for x in arrays]

  of_prompt, of_response = states(batch.prompt, prompt, batch.responses, response)
  order = rng.permuted(np.broadcast_to(np.arange(p), (b, p)), axis=-1)
  orders = rng.permuted(np.broadcast_to(np.arange(r), (b, n, r)), axis=-1)
  prompt_tokens, *prompt_at = shuffled(order, batch.prompt, *prompt)
  response_tokens, *response_at = shuffled(orders, batch.responses, *response)
  out = states(prompt_tokens, Places(*prompt_at), response_tokens, Places(*response_at))
  valid = np.asarray(prompt.segment > 0), np.asarray(response.segment > 0)
  back = np.take_along_axis(np.asarray(out[0]), np.argsort(order)[:, :, None], axis=1)
  np.testing.assert_allclose(back[valid[0]], of_prompt[valid[0]], rtol=2e-5, atol=2e-5)
  back = np.take_along_axis(np.asarray(out[1]), np.argsort(orders)[..., None], axis=2)
  np.testing.assert_allclose(back[valid[1]], of_response[valid[1]], rtol=2e-5, atol=2e-5)


def test_what_is_visible():
  """Own segment (a row may hold several), no later position, never padding, in whatever order."""
  key = Places(jnp.array([2, 1, 1, 0, 2]), jnp.array([0, 1, 0, 0, 3]))
  query = Places(jnp.array([1, 2, 2, 0]), jnp.array([0, 2, 9, 5]))
  expected = [
    [False, False, True, False, False],
    [True, False, False, False, False],
    [True, False, False, False, True],
    [False, False, False, False, False],
  ]
  np.testing.assert_array_equal(visible(query, key), expected)


def test_response_mask_selects_tokens():
  batch = make_batch(8)
  mask = batch.response_mask & (np.random.default_rng(0).random(batch.response_mask.shape) < 0.5)
  masked, grads = exact_step(batch.replace(response_mask=mask))
  every = reference.token_logp(TINY, reference.exact(parameters(TINY)), batch)
  np.testing.assert_allclose(masked, np.where(mask, every, 0).sum(-1), rtol=1e-11, atol=1e-11)
  assert masked[0, 2] == 0  # no such response
  masked, grads = exact_step(batch.replace(response_mask=np.zeros_like(mask)))
  assert (masked == 0).all()
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_features_are_the_states_at_the_last_token():
  params, batch = parameters(TINY), make_batch(9)
  expected = np.zeros((3, 3, TINY.width))  # zero where there is no response
  for where, row, _ in reference.each_response(batch):
    expected[where] = reference.hidden(TINY, reference.exact(params), row)[-1]
  features = jax.jit(TINY.features)
  np.testing.assert_allclose(features(params, batch), expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(features(params, batch), features(params, garbage(batch, 0)))


@pytest.mark.parametrize("chunk", [9, pytest.param(4096, marks=pytest.mark.slow)])
def test_token_kl_is_the_sum_over_the_vocabulary(chunk):
  decoder = variant(logit_chunk=chunk)
  params = parameters(TINY)
  other = vary(params)
  batch = make_batch(10)
  batch = batch.replace(
    response_mask=batch.response_mask & (np.arange(5) != 1)[None, None]  # also: mask honoured
  )
  expected = np.zeros((3, 3))
  for (i, j), row, start in reference.each_response(batch):
    ref, pol = (reference.log_probs(TINY, reference.exact(p), row) for p in (other, params))
    kl = (np.exp(ref) * (ref - pol)).sum(-1)[start - 1 : -1]
    expected[i, j] = np.where(batch.response_mask[i, j, : len(kl)], kl, 0).sum()

  token_kl = jax.jit(decoder.token_kl)
  np.testing.assert_allclose(token_kl(params, other, batch), expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(token_kl(params, params, batch), 0, atol=1e-5)


@pytest.mark.slow
def test_gradient_of_token_kl():
  params = reference.exact(parameters(TINY))
  batch = make_batch(10)

  def loss(policy):
    total = 0
    for _, row, start in reference.each_response(batch):
      ref = reference.log_probs(TINY, params, row)[start - 1 : -1]
      pol = reference.log_probs(TINY, policy, row)[start - 1 : -1]
      total += (np.exp(ref) * (ref - pol)).sum()
    return total

  policy = reference.exact(vary(params))
  with jax.enable_x64(True):
    decoder = variant(dtype="float64", param_dtype="float64", logit_chunk=9)
    grads, reference_grads = jax.jit(
      jax.grad(lambda p, q, batch: decoder.token_kl(p, q, batch).sum(), argnums=(0, 1))
    )(policy, params, batch)
  assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(reference_grads))
  for name, direction, slope in reference.slopes(loss, policy):
    np.testing.assert_allclose(reference.dot(grads, direction), slope, rtol=1e-7, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [{"remat": "none"}, {"remat": "dots"}, {"scan_layers": False}, {"logit_chunk": 4}],
  ids=str,
)
def test_speed_settings_do_not_change_the_numbers(changes):
  params, batch = parameters(TINY), make_batch(11)
  expected = step(TINY, params, batch, WEIGHTS)
  got = step(variant(**changes), params, batch, WEIGHTS)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), got, expected)


def test_bfloat16_computes_in_bfloat16_and_reduces_in_float32():
  params, batch = parameters(TINY), make_batch(12)
  decoder = variant(dtype="bfloat16")
  values = logp(decoder, params, batch)
  assert values.dtype == jnp.float32
  expected = reference.logp(TINY, reference.exact(params), batch)
  error = np.abs(values - expected).max()
  assert 1e-4 < error < 0.02 * np.abs(expected).max()
  assert jax.eval_shape(decoder.features, params, batch).dtype == jnp.bfloat16
  stored = jax.eval_shape(variant(param_dtype="bfloat16").init, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("tied", [True, False])
def test_axes_name_every_dimension(tied):
  decoder = variant(tie_embeddings=tied)
  shapes = jax.eval_shape(decoder.init, jax.random.key(0))
  axes = decoder.axes()
  is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  assert jax.tree.structure(axes, is_leaf=is_names) == jax.tree.structure(shapes)
  for names, shape in zip(
    jax.tree.leaves(axes, is_leaf=is_names), jax.tree.leaves(shapes), strict=True
  ):
    assert tuple(getattr(decoder, AXES[name]) for name in names) == shape.shape
  assert ("unembedding" in axes) is not tied


@pytest.mark.slow
def test_initial_states_neither_vanish_nor_explode():
  decoder = variant(width=64, layers=12, head_dim=16, mlp_width=192)
  params = jax.jit(decoder.init)(jax.random.key(0))
  batch = make_batch(13)
  values = reference.token_logp(decoder, reference.exact(params), batch)[batch.response_mask]
  assert np.log(37) - 0.5 < -values.mean() < np.log(37) + 1.0


def test_flops_count_what_xla_counts():
  decoder = Decoder(
    vocab_size=512, layers=1, width=64, heads=4, kv_heads=2, head_dim=16, mlp_width=192
  )
  batch = make_batch(14, b=4, p=24, n=3, r=16, vocab=512)
  shapes = jax.eval_shape(decoder.init, jax.random.key(0))
  leaves, tree = jax.tree.flatten(batch)
  program = jax.jit(lambda params, *leaves: decoder.logp(params, tree.unflatten(leaves)))
  cost = program.lower(shapes, *leaves).compile().cost_analysis()
  assert 1.0 < cost["flops"] / decoder.flops(4, 24, 3, 16) < 1.2


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"kv_heads": 3}, "no multiple of kv_heads"),
    ({"head_dim": 5}, "odd"),
    ({"layers": 0}, "layers is 0"),
    ({"remat": "some"}, "remat = 'some'"),
    ({"dtype": "float8"}, "dtype = 'float8'"),
    ({"activation": "relu"}, "activation = 'relu'"),
  ],
)
def test_impossible_shapes_are_refused(changes, words):
  with pytest.raises(UserError, match=words):
    variant(**changes)


def test_parameters_need_a_vocabulary():
  with pytest.raises(UserError, match="vocab_size is 0"):
    variant(vocab_size=0).init(jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", [(8, 1), (2, 4), (1, 8)], ids=str)
def test_sharded_by_logical_names_equals_one_device(mesh_shape):
  """Loss and gradient under plain GSPMD, heads split finer than there are key heads included."""
  decoder = variant(width=16, heads=8, kv_heads=2, head_dim=4, mlp_width=24, vocab_size=40)
  params = parameters(decoder)
  batch = make_batch(15, b=8, n=2, vocab=40)
  weights = np.ones((8, 2), np.float32)
  expected = step(decoder, params, batch, weights)
  mesh = jax.sharding.Mesh(np.reshape(jax.devices(), mesh_shape), ("data", "tensor"))
  rules = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "data"}

  def place(names, leaf):
    spec = [rules.get(name) for name in names]
    return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))

  is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  sharded = jax.tree.map(place, decoder.axes(), params, is_leaf=is_names)
  by_example = jax.NamedSharding(mesh, jax.P("data"))
  batch = jax.tree.map(lambda leaf: jax.device_put(leaf, by_example), batch)
  got = step(decoder, sharded, batch, weights)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), got, expected)


@pytest.mark.slow
def test_placed_activations_stay_split_by_examples():
  """With parameters split over the devices of the batch, weights travel and activations do not."""
  decoder = variant(width=16, heads=8, kv_heads=2, head_dim=4, mlp_width=24, vocab_size=40)
  shapes = jax.eval_shape(decoder.init, jax.random.key(0))
  mesh = jax.sharding.Mesh(jax.devices(), ("fsdp",))
  rules = {"batch": "fsdp", "embed": "fsdp"}

  def sharding(*names):
    return jax.NamedSharding(mesh, jax.P(*map(rules.get, names)))

  batch = make_batch(16, b=8, p=7, n=2, r=5, vocab=40)
  leaves, tree = jax.tree.flatten(batch)

  def gradient(params, *leaves):
    with placement.activations(
      lambda x, names: jax.lax.with_sharding_constraint(x, sharding(*names))
    ):
      return jax.grad(lambda p: decoder.logp(p, tree.unflatten(leaves)).sum())(params)

  is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  placed = jax.tree.map(lambda names: sharding(*names), decoder.axes(), is_leaf=is_names)
  rows = [sharding("batch")] * len(leaves)
  program = jax.jit(gradient, in_shardings=(placed, *rows), out_shardings=placed)
  text = program.lower(shapes, *leaves).compile().as_text()
  gathered = re.findall(r"= (\w+\[[\d,]*\])\S* all-gather\(", text)
  assert gathered  # the weights
  tokens = 8 * (7 + 2 * 5)
  sizes = [int(size) for shape in gathered for size in re.findall(r"\d+", shape.split("[")[1])]
  assert not {tokens, 17} & set(sizes), gathered  # [B * T, ...] or [B, T, ...]
