"""Parts of the stages: who wins a record, whose weight counts, what a sample's text is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import configure

from rmd_jax.data.batch import Dataset
from rmd_jax.errors import UserError
from rmd_jax.models.ensemble import RewardEnsemble
from rmd_jax.stages.evaluate import Evaluate, certainty, ends
from rmd_jax.stages.inference import Generated, answered, texts
from rmd_jax.stages.reward import Reward, RewardModels, agreement
from rmd_jax.stages.run import Pipeline, for_seed, objectives_of, shorten
from rmd_jax.stages.score import Score
from rmd_jax.stages.sft import NextToken
from rmd_jax.training.loop import Training


def records(count=3, responses=2, **columns):
  """Examples whose tokens do not matter."""
  lengths = np.full((count, responses), 2, np.int32)
  columns = {name: np.asarray(value) for name, value in columns.items()}
  lengths = columns.pop("response_length", lengths)
  return Dataset(
    ids=np.array([f"id-{i}" for i in range(count)]),
    prompt=np.ones((count, 4), np.int32),
    prompt_length=np.full(count, 3, np.int32),
    responses=np.ones((count, responses, 5), np.int32),
    response_length=lengths,
    response_mask=np.arange(5) < lengths[..., None],
    weight=columns.pop("weight", np.ones(count, np.float32)),
    **columns,
  )


def batch_of(dataset, size=None):
  """Of all the examples, on the device, filled to `size` rows."""
  return jax.tree.map(jnp.asarray, dataset.batch(np.arange(len(dataset)), size))


# --- who wins -------------------------------------------------------------------------------------


def test_pairs_are_won_by_the_first_and_ties_count_one_half():
  rewards = jnp.array([[2.0, 1.0], [1.0, 2.0], [3.0, 3.0]])
  np.testing.assert_array_equal(agreement(rewards, batch_of(records())), [1.0, 0.0, 0.5])


def test_a_soft_label_says_who_wins():
  data = records(preference=np.array([0.9, 0.1, 0.5], np.float32))
  rewards = jnp.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
  np.testing.assert_array_equal(agreement(rewards, batch_of(data)), [1.0, 0.0, 0.5])


@pytest.mark.parametrize(
  "labels",
  [
    {"ranks": np.array([[0, 1, 2, 9]], np.int32)},
    {"ratings": np.array([[3.0, 2.0, 1.0, 99.0]], np.float32)},
  ],
  ids=["ranks", "ratings"],
)
def test_groups_are_compared_in_pairs_of_responses_that_exist(labels):
  data = records(1, 4, response_length=np.array([[2, 2, 2, 0]], np.int32), **labels)
  rewards = jnp.array([[1.0, 5.0, 0.0, -9.0]])  # wrong about the first two, right about the rest
  np.testing.assert_allclose(agreement(rewards, batch_of(data)), [2 / 3], rtol=1e-6)
  best, worst = ends(data)
  assert (best.tolist(), worst.tolist()) == ([0], [2])
  assert certainty(data).tolist() == [1.0]


def test_ties_of_ratings_are_not_compared():
  data = records(1, 3, ratings=np.array([[1.0, 1.0, 0.0]], np.float32))
  np.testing.assert_allclose(agreement(jnp.array([[9.0, 0.0, 0.5]]), batch_of(data)), [0.5])
  data = records(1, 2, ratings=np.array([[1.0, 1.0]], np.float32))
  np.testing.assert_allclose(agreement(jnp.array([[9.0, 0.0]]), batch_of(data)), [0.5])


def test_the_ends_of_a_pair():
  best, worst = ends(records())
  assert (best.tolist(), worst.tolist()) == ([0, 0, 0], [1, 1, 1])
  data = records(preference=np.array([0.8, 0.2, 0.5], np.float32))
  best, worst = ends(data)
  assert (best.tolist(), worst.tolist()) == ([0, 1, 0], [1, 0, 1])
  np.testing.assert_allclose(certainty(data), [0.8, 0.8, 0.5], rtol=1e-6)


# --- whose weight ---------------------------------------------------------------------------------


def models(members, **options):
  return RewardModels(RewardEnsemble(configure().root.policy, members, "full"), **options)


def test_a_members_loss_is_the_mean_of_its_own_examples():
  weights = np.array([[1, 1, 1], [2, 0, 1], [0, 0, 0]], np.float32)
  data = records(weight=np.array([1.0, 1.0, 0.5], np.float32), member_weight=weights)
  batch = batch_of(data, 4)  # with a row that fills the batch
  rewards = jnp.array([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [9.0, -9.0]]] * 3)
  stage = models(3)
  loss = stage.objective({"rewards": rewards}, batch, step=jnp.zeros(()), hyper={}, carry=())
  each = np.log1p(np.exp(-np.array([1.0, -2.0, 3.0])))
  effective = weights * [1, 1, 0.5]
  np.testing.assert_allclose(loss.sum, effective @ each, rtol=1e-5)
  np.testing.assert_allclose(loss.weight, effective.sum(1))
  np.testing.assert_allclose(stage.denominator(batch), loss.weight)
  assert float(loss.aux["accuracy/member_0"]) == pytest.approx(1.5 / 2.5)
  assert float(loss.aux["accuracy/member_1"]) == pytest.approx(1.0)
  assert float(loss.aux["loss/member_2"]) == 0.0
  plain = batch_of(records(weight=data.weight), 4)
  np.testing.assert_allclose(stage.denominator(plain), [2.5] * 3)


def test_the_options_of_the_pairs_loss_reach_it():
  rewards, batch = jnp.array([[1.0, 0.5]]), batch_of(records(1))
  plain = models(1).losses(rewards, batch)
  np.testing.assert_allclose(plain, np.log1p(np.exp(-0.5)), rtol=1e-5)
  centred = models(1, centre=0.1).losses(rewards, batch)
  np.testing.assert_allclose(centred - plain, 0.1 * 1.5**2, rtol=1e-4)
  margin = models(1, margin=0.2).losses(rewards, batch)
  np.testing.assert_allclose(margin, np.log1p(np.exp(-0.3)), rtol=1e-5)
  smooth = models(1, label_smoothing=0.25).losses(rewards, batch)
  np.testing.assert_allclose(smooth, plain + 0.25 * 0.5, rtol=1e-4)


def test_the_model_of_all_data_sees_all_data(tmp_path):
  loaded = configure("Reward.family=3", objectives=["dpo"])
  context = Pipeline(loaded, tmp_path, 0, None).context
  data = context.data.splits["train"]
  weights = loaded.root.reward.weighted(data, context).member_weight
  assert weights.shape == (4, len(data))
  assert (weights[0] == 1).all()
  assert len({row.tobytes() for row in weights}) == 4
  again = loaded.root.reward.weighted(data, Pipeline(loaded, tmp_path, 1, None).context)
  assert not np.array_equal(again.member_weight[1:], weights[1:])
  lonely = dataclasses.replace(loaded.root.reward, family=0)
  assert lonely.weighted(data, context).member_weight.shape == (1, len(data))


def test_next_token_loss_is_a_tokens():
  stage = NextToken(configure().root.policy)
  data = records(2, 1, weight=np.array([1.0, 0.5], np.float32))
  batch, logp = batch_of(data, 3), jnp.array([[-4.0], [-6.0], [-99.0]])
  loss = stage.objective({"logp": logp}, batch, step=jnp.zeros(()), hyper={}, carry=())
  assert (float(loss.sum), float(loss.weight)) == (7.0, 3.0)
  assert float(stage.denominator(batch)) == 3.0
  assert float(loss.aux["perplexity"]) == pytest.approx(np.exp(7 / 3))


# --- samples --------------------------------------------------------------------------------------


def test_samples_become_responses_and_texts(tmp_path):
  data = Pipeline(configure(objectives=["dpo"]), tmp_path, 0, None).context.data
  vocabulary = data.vocabulary
  prompts = data.splits["test"].take(np.array([0]))
  word = vocabulary.encode("bridge")[0]
  tokens = np.array([[[word, word, vocabulary.eos_id, 0], [word] * 4]], np.int32)
  generated = Generated(
    tokens, np.array([[3, 4]], np.int32), np.zeros((1, 2)), np.array([[True, False]])
  )
  written = texts(data, prompts, generated)
  assert written.responses == [["bridge bridge", "bridge bridge bridge bridge"]]
  assert written.prompts[0].startswith("report : ")
  assert written.prompts[0].endswith("summary :")
  dataset = answered(prompts, generated)
  assert dataset.response_mask.tolist() == [[[True] * 3 + [False], [True] * 4]]
  assert (dataset.ranks, dataset.preference, dataset.rewards) == (None, None, None)
  np.testing.assert_array_equal(dataset.prompt, prompts.prompt)
  generated.save(tmp_path / "samples.npz", scores=np.array([[1.0, 2.0]]))
  loaded, scores = Generated.load(tmp_path / "samples.npz")
  np.testing.assert_array_equal(loaded.tokens, tokens)
  assert scores.tolist() == [[1.0, 2.0]]


# --- the run --------------------------------------------------------------------------------------


def test_each_seed_draws_a_world_of_its_own():
  data = configure(objectives=["dpo"]).root.data
  assert for_seed(data, 0) == data
  assert for_seed(data, 3).source.seed == data.source.seed + 3
  assert for_seed(data, 3).key() != data.key()


def test_objectives_are_named_after_their_files(tmp_path):
  path = tmp_path / "mine.gin"
  path.write_text("Align.objective = @DPO()\nDPO.beta = 0.7\n")
  loaded = configure(objectives=["dpo", str(path)])
  found = {objective.name: objective.align.beta for objective in objectives_of(loaded)}
  assert found == {"dpo": 0.5, "mine": 0.7}


def test_a_long_text_loses_its_head():
  assert shorten("a\n b", 9) == "a b"
  assert shorten("x" * 5 + "end", 4) == "… xend"


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: Evaluate(samples=0), "Evaluate.samples must be at least 1, not 0"),
    (lambda: Evaluate(prompts=-1), "Evaluate.prompts must be at least 1, not -1"),
    (lambda: Score(samples=-1), "Score.samples must be 0 or more"),
    (lambda: Reward(Training(1, 1, 1e-3), family=-1), "Reward.family must be 0 or more, not -1"),
  ],
)
def test_numbers_that_make_no_sense_are_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


@pytest.mark.parametrize(
  "binding, message",
  [
    ("Run.seeds=[]", "Run.seeds is empty"),
    ("Run.seeds=[1, 1]", r"Run.seeds names one twice: \[1, 1\]"),
    ("Run.objectives=['dpo', 'dpo']", "Run.objectives names one twice"),
  ],
)
def test_a_run_that_makes_no_sense_is_refused(binding, message):
  with pytest.raises(UserError, match=message):
    configure(binding)
