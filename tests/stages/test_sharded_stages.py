"""The stages' own programs on meshes of eight devices: the numbers of one device."""

import functools
import shutil

import jax
import numpy as np
import pytest
from tiny_runs import assert_trees_equal, configure, contents, digests, history, made, pipeline

from rmd_jax.stages import inference
from rmd_jax.stages.align import Alignment
from rmd_jax.stages.inference import Sampling
from rmd_jax.stages.run import Pipeline
from rmd_jax.training.loop import Training, fit, load_params
from rmd_jax.training.optimisers import AdamW
from rmd_jax.training.partitioning import MeshConfig

pytestmark = pytest.mark.slow

ONE = MeshConfig()
MESHES = {
  "data": MeshConfig(data=8),
  "all": MeshConfig(data=2, fsdp=2, tensor=2),
  "member": MeshConfig(data=2, member=4),
}
TRAINING = Training(
  steps=3, batch_size=8, learning_rate=3e-3, optimizer=AdamW(eps=1e-3), log_every=1
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run up to the scores, on one device."""
  directory = tmp_path_factory.mktemp("single")
  loaded = configure(objectives=["ensemble"])
  for stage in ("sft", "reward", "score"):
    pipeline(loaded, directory, only=stage)
  return directory


@pytest.fixture(scope="module")
def scored(finished):
  """The run's context and its scored splits."""
  loaded = configure(objectives=["ensemble", "dpo"])
  context = Pipeline(loaded, finished, 0, None).context
  return loaded, context, loaded.root.score.attach(context, loaded.root.reward, ("train", "test"))


@pytest.fixture(scope="module")
def trained(scored, tmp_path_factory):
  """`trained(stage's name, mesh)`: parameters, what was logged, and where the parameters lay."""
  loaded, context, splits = scored
  policy = load_params(context.directory / "sft")[0]["shared"]
  axes = context.policy.axes()

  @functools.cache
  def trained(name, mesh):
    directory = tmp_path_factory.mktemp("fit")
    hyper, carry = {}, ()
    train = splits["train"]
    if name == "reward":
      stage = loaded.root.reward.stage(context)
      params, named = jax.jit(stage.ensemble.init)(jax.random.key(0)), stage.ensemble.axes()
      train = loaded.root.reward.weighted(train, context)
    else:
      params = {"frozen": {}, "shared": policy, "members": {}}
      named = {"frozen": {}, "shared": axes, "members": {}}
      align = loaded.with_objective(name).root.align
      stage, hyper = Alignment(context.policy, align.objective), align.numbers()
      carry = align.objective.init_carry()
    fitted = fit(
      stage,
      TRAINING,
      params=params,
      axes=named,
      carry=carry,
      train=train,
      validation=None,
      hyper=hyper,
      directory=directory,
      seed=0,
      mesh=mesh,
      label=name,
    )
    specs = {
      axis
      for leaf in jax.tree.leaves(fitted.params)
      for part in leaf.sharding.spec
      for axis in (part if isinstance(part, tuple) else (part,))
    } - {None}
    return jax.device_get(fitted.params), history(directory), specs

  return trained


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["reward", "dpo", "ensemble"])
def test_a_step_on_a_mesh_is_that_of_one_device(trained, name, mesh):
  wanted, logged, _ = trained(name, ONE)
  got, rows, specs = trained(name, MESHES[mesh])
  assert_trees_equal(got, wanted, rtol=2e-4, atol=2e-6)
  assert [row["step"] for row in rows] == [1, 2, 3]
  for mine, theirs in zip(rows, logged, strict=True):
    assert mine.keys() == theirs.keys()
    for metric in mine:
      if not metric.endswith(("accuracy", "correlation")):  # of margins near 0
        assert mine[metric] == pytest.approx(theirs[metric], rel=2e-4, abs=2e-5), metric
  if mesh == "all":
    assert specs == {"fsdp", "tensor"}
  elif mesh == "member":
    assert specs == ({"member"} if name == "reward" else set())


@pytest.mark.parametrize("mesh", MESHES)
def test_scoring_and_sampling_on_a_mesh(scored, mesh):
  """Samples are the very tokens: a row's random numbers are its own."""
  loaded, context, splits = scored
  test, decoder = splits["test"], context.policy
  policy = load_params(context.directory / "sft")[0]["shared"]
  models = load_params(context.directory / "reward")[0]
  ensemble = loaded.root.reward.stage(context).ensemble
  logp = inference.log_probabilities(decoder, policy, test, 8, MESHES[mesh])
  np.testing.assert_allclose(logp, test.reference_logp, rtol=1e-5, atol=1e-4)
  rewards = inference.rewards(ensemble, models, test, 8, MESHES[mesh])
  np.testing.assert_allclose(rewards, test.rewards, rtol=1e-4, atol=1e-5)
  sampling = Sampling(decoder, samples=2, max_tokens=24, eos_id=context.data.vocabulary.eos_id)
  drawn, wanted = (
    inference.generate(sampling, policy, test, seed=0, batch_size=8, mesh=MESHES[name])
    if name
    else inference.generate(sampling, policy, test, seed=0, batch_size=4, mesh=ONE)
    for name in (mesh, None)
  )
  np.testing.assert_array_equal(drawn.tokens, wanted.tokens)
  np.testing.assert_array_equal(drawn.length, wanted.length)
  np.testing.assert_allclose(drawn.logp, wanted.logp, rtol=1e-5, atol=1e-4)


def test_a_run_goes_on_on_a_mesh(finished, tmp_path):
  """What one device began, eight end: the same keys, and evaluation's numbers of one device."""
  runs = {}
  for name, bindings in {
    "one": (),
    "eight": ("MeshConfig.data=2", "MeshConfig.fsdp=2", "MeshConfig.tensor=2"),
  }.items():
    directory = tmp_path / name
    shutil.copytree(finished, directory)
    if name == "eight":  # scored on the mesh, too
      shutil.rmtree(directory / "seed_0/scores")
    loaded = configure(*bindings, objectives=["ensemble"])
    skipped = pipeline(loaded, directory)
    assert made(skipped) == (["seed_0/scores"] if name == "eight" else []) + [
      "seed_0/align/ensemble",
      "seed_0/evaluate/reference",
      "seed_0/evaluate/ensemble",
    ]
    runs[name] = directory / "seed_0"
  for file in ("margins", "scores"):
    ours, theirs = (np.load(runs[name] / f"evaluate/ensemble/{file}.npz") for name in runs)
    for column in theirs.files:
      np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-3, atol=1e-4)
  assert digests(runs["eight"])["sft"] == digests(runs["one"])["sft"]
  before = contents(tmp_path / "eight")
  assert all(pipeline(configure(objectives=["ensemble"]), tmp_path / "eight").values())
  assert contents(tmp_path / "eight") == before
