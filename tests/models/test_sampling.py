import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import TINY, make_batch

from rmd_jax.errors import UserError
from rmd_jax.models import sampling
from rmd_jax.models.sampling import choose

EOS = 3
R, S = 6, 4


@functools.partial(jax.jit, static_argnames=("samples", "top_k"))
def compiled(params, prompt, length, rng, samples, **how):
  return TINY.sample(params, prompt, length, rng, samples=samples, max_tokens=R, eos_id=EOS, **how)


def draw(params, batch, rng, samples=S, rows=None, temperature=1.0, **how):
  """Traces rows and temperature, so that most tests share one program."""
  rows = np.arange(len(batch.prompt), dtype=np.int32) if rows is None else rows
  return compiled(
    params,
    batch.prompt,
    batch.prompt_length,
    rng,
    samples,
    rows=rows,
    temperature=temperature,
    **how,
  )


@pytest.fixture(scope="module")
def params():
  return reference.parameters(TINY)


def as_batch(batch, samples):
  """The samples as responses to be scored; garbage past their end."""
  tokens, length = np.asarray(samples.tokens), np.asarray(samples.length)
  inside = np.arange(R)[None, None] < length[:, :, None]
  return batch.replace(
    responses=np.where(inside, tokens, 10**6).astype(np.int32), response_length=length,
    response_mask=inside,
  )  # fmt: skip


@functools.cache
def prompts():
  return make_batch(0, b=5, p=4, n=S, r=R)


def check(batch, samples, params):
  """Scores equal the scoring path; EOS ends a response, and only there is it in one."""
  expected = reference.logp(TINY, reference.exact(params), as_batch(batch, samples))
  np.testing.assert_allclose(samples.logp, expected, rtol=1e-4, atol=1e-4)
  tokens, length = np.asarray(samples.tokens), np.asarray(samples.length)
  inside = np.arange(R)[None, None] < length[:, :, None]
  assert (tokens[~inside] == 0).all()
  ends = np.take_along_axis(tokens, length[:, :, None] - 1, axis=2)[:, :, 0] == EOS
  np.testing.assert_array_equal(ends, samples.finished)
  assert ((tokens == EOS).sum(-1) == ends).all()
  assert (length[~ends] == R).all()


def test_log_probabilities_are_those_of_scoring(params):
  batch = prompts()
  samples = draw(params, batch, jax.random.key(0))
  check(batch, samples, params)
  assert set(np.unique(samples.finished)) == {False, True}, "the test needs both"
  assert len(np.unique(samples.tokens[0], axis=0)) > 1
  # The package's own scoring path, too.
  scored = jax.jit(TINY.logp)(params, as_batch(batch, samples))
  np.testing.assert_allclose(samples.logp, scored, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "how",
  [
    {"temperature": 0.5},
    {"top_k": 4},
    {"top_p": 0.7},
    {"top_k": 9, "top_p": 0.5, "temperature": 3.0},
  ],
  ids=str,
)
def test_log_probabilities_know_no_truncation(params, how):
  """They are the model's own, at temperature 1, however the tokens were drawn."""
  batch = prompts()
  samples = draw(params, batch, jax.random.key(1), **how)
  check(batch, samples, params)
  for i, j in np.ndindex(5, S):
    length = int(samples.length[i, j])
    head = batch.prompt[i, : batch.prompt_length[i]]
    row = np.concatenate([head, samples.tokens[i, j, :length]])
    scores = reference.log_probs(TINY, reference.exact(params), row)[len(head) - 1 : -1]
    for token, score in zip(row[len(head) :], scores, strict=True):
      rank = (score > score[token]).sum()
      assert rank < how.get("top_k", 37)
      if set(how) == {"top_p"}:
        assert np.exp(score[score > score[token]]).sum() < 0.7 + 1e-5


def test_greedy_takes_the_likeliest(params):
  batch = prompts()
  samples = draw(params, batch, jax.random.key(2), temperature=0.0)
  check(batch, samples, params)
  for i, j in np.ndindex(5, S):
    row = list(batch.prompt[i, : batch.prompt_length[i]])
    for token in samples.tokens[i, j, : samples.length[i, j]]:
      scores = reference.log_probs(TINY, reference.exact(params), np.array(row))[-1]
      assert scores[token] > scores.max() - 1e-5
      row.append(int(token))


def test_draws_depend_on_the_row_alone(params):
  """Not on the rows beside it."""
  batch = prompts()
  rng = jax.random.key(3)
  all_rows = draw(params, batch, rng)
  again = draw(params, batch, rng)
  jax.tree.map(np.testing.assert_array_equal, all_rows, again)
  some = np.array([3, 1, 3, 4, 0], np.int32)
  few = batch.replace(prompt=batch.prompt[some], prompt_length=batch.prompt_length[some])
  others = draw(params, few, rng, rows=some)
  np.testing.assert_array_equal(others.tokens, np.asarray(all_rows.tokens)[some])
  moved = draw(params, batch, rng, rows=np.arange(1, 6, dtype=np.int32))
  assert (np.asarray(moved.tokens) != np.asarray(all_rows.tokens)).any()


@pytest.mark.slow
def test_more_samples_begin_with_the_same(params):
  batch = prompts()
  rng = jax.random.key(3)
  some = draw(params, batch, rng)
  more = compiled(params, batch.prompt, batch.prompt_length, rng, 2 * S)  # rows by default
  np.testing.assert_array_equal(more.tokens[:, :S], some.tokens)


def test_padding_of_prompts_is_not_read(params):
  batch = prompts()
  pad = np.arange(4)[None] >= batch.prompt_length[:, None]
  assert pad.any()
  other = np.where(pad, -7, batch.prompt).astype(np.int32)
  rng = jax.random.key(4)
  jax.tree.map(
    np.testing.assert_array_equal,
    draw(params, batch.replace(prompt=other), rng),
    draw(params, batch, rng),
  )


@pytest.mark.slow
def test_the_loop_ends_with_the_last_response(params, monkeypatch):
  """With EOS certain at the start, one token is drawn, however long responses may be."""
  steps = []

  def counted(rng, log_probs, **how):
    jax.debug.callback(lambda: steps.append(1))
    return choose(rng, log_probs, **how)

  monkeypatch.setattr(sampling, "choose", counted)
  certain = jax.tree.map(np.zeros_like, params)
  certain["embedding"][:, 0] = 1.0
  certain["embedding"][EOS, 0] = 500.0
  certain["final_norm"]["scale"][:] = 1.0
  batch = make_batch(0, b=1, p=2, n=1, r=1)
  samples = jax.jit(
    functools.partial(TINY.sample, samples=1, max_tokens=7, eos_id=EOS, temperature=1.0)
  )(certain, batch.prompt, batch.prompt_length, jax.random.key(5))
  assert (samples.length == 1).all()
  assert samples.finished.all()
  np.testing.assert_allclose(samples.logp, 0, atol=1e-6)
  jax.effects_barrier()
  assert len(steps) == 1


@functools.partial(jax.jit, static_argnames="top_k")
def many(log_probs, temperature, top_k=None, top_p=None):
  """4,000 independent draws; one program for each set of options."""
  log_probs = jnp.broadcast_to(log_probs[None], (4000, 5))
  return choose(jax.random.key(0), log_probs, temperature=temperature, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize(
  "how, allowed",
  [
    ({}, 5),
    ({"top_k": 2}, 2),
    ({"top_k": 99}, 5),
    ({"top_p": 0.0}, 1),
    ({"top_p": 0.39}, 1),
    ({"top_p": 0.41}, 2),
    ({"top_p": 0.99}, 5),
    ({"temperature": 0.5, "top_p": 0.5}, 1),
    ({"top_k": 3, "top_p": 0.85}, 3),
    ({"temperature": 0.0}, 1),
  ],
  ids=str,
)
def test_truncation(how, allowed):
  """Frequencies of many draws: the likeliest `allowed` tokens in proportion, no others."""
  probs = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
  temperature = how.get("temperature", 1.0)
  ids = many(jnp.log(jnp.float32(probs)), **{"temperature": 1.0, **how})
  frequency = np.bincount(ids, minlength=5) / 4000
  expected = probs ** (1 / temperature) if temperature else probs
  expected = np.where(np.argsort(np.argsort(-probs)) < allowed, expected, 0)
  np.testing.assert_allclose(frequency, expected / expected.sum(), atol=0.03)
  assert (frequency[expected == 0] == 0).all()


@pytest.mark.parametrize(
  "how", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": -0.1}, {"samples": 0}], ids=str
)
def test_impossible_settings_are_refused(how):
  settings = {"samples": 1, "max_tokens": 2, "eos_id": EOS, **how}
  with pytest.raises(UserError, match=next(iter(how))):
    TINY.sample({}, jnp.zeros((1, 1), int), jnp.ones(1, int), jax.random.key(0), **settings)
