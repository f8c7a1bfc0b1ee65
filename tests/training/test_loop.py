"""The loop around the step: what it logs, evaluates, selects, keeps, and refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_toys import COUPLED, DEFAULT, Ensemble, Pairs, assert_trees_equal, data, run

from rmd_jax.errors import RunError, UserError
from rmd_jax.training import loop
from rmd_jax.training.loop import Training, compilations, evaluate, load_params, map_batches
from rmd_jax.training.metrics import read_metrics
from rmd_jax.training.partitioning import MeshConfig


def lines(fitted, prefix):
  return [row for row in read_metrics(fitted.history) if any(k.startswith(prefix) for k in row)]


def test_a_fit_learns_and_writes_what_it_did(tmp_path):
  fitted = run(tmp_path, Pairs(), data(), validation=data(20, seed=1), eval_every=8, log_every=5)
  training, evaluation = lines(fitted, "loss/"), lines(fitted, "eval/")
  assert [row["step"] for row in training] == [1, 5, 10, 15, 20]
  assert [row["step"] for row in evaluation] == [8, 16, 20]
  losses = [
    evaluate(
      Pairs(),
      params,
      data(),
      batch_size=8,
      hyper={"beta": 1.0},
      mesh=MeshConfig(),
      carry=Pairs().carry,
    )["loss"]
    for params in (Pairs().params(), load_params(tmp_path, which="last")[0])
  ]
  assert losses[1] < 0.8 * losses[0]
  assert training[0]["perf/compile_seconds"] >= 0
  assert all(row["perf/tokens_per_second"] > 0 for row in training[1:])
  assert all(row["perf/step_seconds"] > 0 for row in training[1:])
  assert {row["margin/training"] for row in training} == {1.0}
  assert {row["eval/margin/training"] for row in evaluation} == {0.0}
  assert list((tmp_path / "tensorboard").iterdir())
  best = min(evaluation, key=lambda row: row["eval/loss"])
  assert fitted.step == best["step"]
  assert fitted.metrics["eval/loss"] == best["eval/loss"]
  assert (fitted.last_step, fitted.stopped_early) == (20, False)


def test_the_result_is_what_load_params_finds(tmp_path):
  fitted = run(tmp_path, Pairs(), data(), validation=data(20, seed=1), eval_every=4, steps=40)
  assert fitted.step < fitted.last_step  # it overfits: else this would show nothing
  for which, step in (("best", fitted.step), ("last", 40)):
    params, digest, found = load_params(tmp_path, which=which)
    assert found == step
    same = digest == fitted.params_hash
    assert same == (which == "best")
    if same:
      assert_trees_equal(params, fitted.params)
  assert float(params["frozen"]["shift"]) == 0.25


def test_a_greatest_metric_selects_the_greatest(tmp_path):
  fitted = run(
    tmp_path,
    Pairs(),
    data(),
    validation=data(20, seed=1),
    eval_every=4,
    metric="eval/loss",
    mode="max",
    steps=40,
  )
  worst = max(lines(fitted, "eval/"), key=lambda row: row["eval/loss"])
  assert fitted.step == worst["step"]
  assert load_params(tmp_path, which="best")[2] == worst["step"]


def test_without_selection_the_last_step_is_the_result(tmp_path):
  fitted = run(tmp_path / "a", Pairs(), data())
  assert (fitted.step, fitted.metrics) == (20, {})
  fitted = run(
    tmp_path / "b",
    Pairs(),
    data(),
    validation=data(20, seed=1),
    eval_every=4,
    keep_best=0,
    steps=40,
  )
  assert fitted.step == 40
  assert fitted.metrics["eval/loss"] == lines(fitted, "eval/")[-1]["eval/loss"]


def test_it_stops_when_patience_runs_out(tmp_path):
  arguments = {"validation": data(20, seed=1), "eval_every": 2, "patience": 3, "steps": 60}
  fitted = run(tmp_path, Pairs(), data(), **arguments)
  assert fitted.stopped_early
  losses = [row["eval/loss"] for row in lines(fitted, "eval/")]
  best = int(np.argmin(losses))
  assert len(losses) == best + 1 + 3
  assert (fitted.step, fitted.last_step) == (2 * (best + 1), 2 * len(losses))
  again = run(tmp_path, Pairs(), data(), **arguments)
  assert again.stopped_early
  assert again.last_step == fitted.last_step  # it does not go on


def test_a_finished_fit_returns_at_once_and_touches_nothing(tmp_path):
  arguments = {"validation": data(20, seed=1), "eval_every": 8, "checkpoint_every": 5}
  fitted = run(tmp_path, Pairs(), data(), **arguments)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
  compiled = compilations()
  again = run(tmp_path, Pairs(), data(), **arguments)
  assert compilations().since(compiled).programs == 0
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
  assert_trees_equal(again.params, fitted.params)
  assert again._replace(params=None) == fitted._replace(params=None)


def test_runs_that_differ_in_numbers_share_their_programs(tmp_path):
  validation = data(20, seed=1)
  run(tmp_path / "a", Pairs(), data(), validation=validation, eval_every=8)
  compiled = compilations()
  run(
    tmp_path / "b",
    Pairs(),
    data(),
    validation=validation,
    eval_every=4,
    steps=13,
    learning_rate=0.01,
    schedule="cosine",
    warmup_steps=3,
    clip_norm=None,
    hyper={"beta": 2.0},
    seed=5,
  )
  run(tmp_path / "c", Pairs(), data(seed=3), hyper={"beta": np.linspace(1, 2, 20)})
  assert compilations().since(compiled).programs == 0


def test_hyper_may_vary_by_step(tmp_path):
  rates = np.linspace(0.5, 1.5, 20)
  one = run(tmp_path / "a", Pairs(), data(), hyper={"beta": rates})
  same = run(tmp_path / "b", Pairs(), data(), hyper={"beta": 1.0})
  a, b = (np.array([row["loss/total"] for row in lines(f, "loss/")]) for f in (one, same))
  assert a[0] != b[0]
  assert len(a) == len(b) == 20
  with pytest.raises(ValueError, match="one a step"):
    run(tmp_path / "c", Pairs(), data(), hyper={"beta": rates[:-1]})
  with pytest.raises(UserError, match="beta is not finite"):
    run(tmp_path / "d", Pairs(), data(), hyper={"beta": np.inf})
  with pytest.raises(ValueError, match="the loop sets"):
    run(tmp_path / "e", Pairs(), data(), hyper={"learning_rate": 1.0})


# --- bad batches ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fragile(Pairs):
  """Not finite as soon as a rating in the batch is not."""

  def objective(self, outputs, batch, **rest):
    loss = Pairs.objective(self, outputs, batch, **rest)
    return loss._replace(sum=loss.sum + 0.0 * batch.ratings.sum())


def rated(size=48, bad=()):
  ratings = np.zeros((size, 2), np.float32)
  ratings[list(bad)] = np.nan
  return data(size).replace(ratings=ratings)


def test_a_bad_batch_is_passed_over_and_its_examples_are_written_out(tmp_path):
  fitted = run(tmp_path, Fragile(), rated(bad=[17]), steps=12, log_every=100)
  rows = [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
  assert len(rows) == 2  # 48 examples, 8 a batch: once an epoch
  assert all("example-17" in row["ids"] and len(row["ids"]) == 8 for row in rows)
  logged = lines(fitted, "loss/")
  assert [r["step"] for r in logged] == sorted({1, 12, *(row["step"] for row in rows)})
  assert logged[-1]["guard/skipped"] == 2
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(fitted.params)))


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
  with pytest.raises(RunError, match=r"3 steps in a row, up to step 3, .*bad_batches\.jsonl"):
    run(tmp_path, Fragile(), rated(bad=range(48)), max_bad_steps=3, checkpoint_every=1)
  params, _, step = load_params(tmp_path, which="last")
  assert step <= 3
  assert_trees_equal(params, Fragile().params())  # no checkpoint has taken anything from them


def test_bad_members_are_named(tmp_path):
  @dataclasses.dataclass(frozen=True)
  class FragileMember(Ensemble):
    def objective(self, outputs, batch, **rest):
      loss = Ensemble.objective(self, outputs, batch, **rest)
      return loss._replace(sum=loss.sum.at[2].multiply(jnp.nan))

  with pytest.raises(RunError, match="2 steps in a row"):
    run(tmp_path, FragileMember(), data(members=3), max_bad_steps=2)
  row = json.loads((tmp_path / "bad_batches.jsonl").read_text().splitlines()[0])
  assert (row["step"], row["members"]) == (1, [2])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"steps": 0}, "Training.steps = 0"),
    ({"microbatches": 3}, "does not divide into"),
    ({"clip_norm": 0.0}, "positive, or None"),
    ({"mode": "least"}, "'min' or 'max'"),
    ({"eval_every": 0}, "or None"),
  ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(DEFAULT, **changes)


def test_what_cannot_be_trained_is_refused_before_a_step(tmp_path):
  with pytest.raises(UserError, match="no training examples"):
    run(tmp_path, Pairs(), data(0))
  with pytest.raises(UserError, match="validation split is empty"):
    run(tmp_path, Pairs(), data(), validation=data(0))
  with pytest.raises(UserError, match="patience = 2 needs validation"):
    run(tmp_path, Pairs(), data(), patience=2)
  with pytest.raises(UserError, match="= 8 does not divide by 3"):
    run(tmp_path, Pairs(), data(), mesh=MeshConfig(data=3))
  with pytest.raises(ValueError, match="3 members"):
    run(tmp_path, Ensemble(), data(members=3), params=Ensemble(members=2).params())
  with pytest.raises(UserError, match=r"'eval/los' is not what evaluation gives: eval/loss, "):
    run(tmp_path, Pairs(), data(), validation=data(20), metric="eval/los")


def test_a_directory_of_another_run_is_refused(tmp_path):
  run(tmp_path, Pairs(), data(), steps=3)
  with pytest.raises(UserError, match=r"belongs to another run.*\n  seed  checkpoint 0, run 1 "):
    run(tmp_path, Pairs(), data(), steps=3, seed=1)
  with pytest.raises(UserError, match="steps  checkpoint 3, run 2"):
    run(tmp_path, Pairs(), data(), steps=2)
  assert run(tmp_path, Pairs(), data(), steps=5).last_step == 5  # longer is fine


def test_after_the_first_step_nothing_moves_to_the_devices_unasked(tmp_path, monkeypatch):
  """The guard is on: a stray NumPy array given to the program is refused."""
  put_batch = loop.Layout.put_batch

  def stray(self, batch, members):
    columns = put_batch(self, batch, members)
    stray.calls += 1
    if stray.calls == 3:
      columns["weight"] = np.asarray(columns["weight"])
    return columns

  stray.calls = 0
  monkeypatch.setattr(loop.Layout, "put_batch", stray)
  with pytest.raises(Exception, match="Disallowed host-to-device"):
    run(tmp_path, Pairs(), data())


# --- without training -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Pairs(), Ensemble()])
def test_evaluation_counts_every_example_once_whatever_the_batch(stage):
  examples, params = data(21, members=stage.members), stage.params()
  arguments = {"hyper": {"beta": 1.0}, "mesh": MeshConfig(), "carry": stage.carry}
  whole = evaluate(stage, params, examples, batch_size=21, **arguments)
  parts = evaluate(stage, params, examples, batch_size=8, **arguments)
  margins = {k: v for k, v in whole.items() if k.startswith("loss") or k == "margin/accuracy"}
  assert {k: parts[k] for k in margins} == pytest.approx(margins, rel=1e-5)
  if stage.members:
    assert whole["loss"] == pytest.approx(sum(whole[f"loss_member_{k}"] for k in range(3)))


def test_evaluation_on_a_mesh_is_that_on_one_device():
  examples, params = data(20, members=4), Ensemble(members=4).params()
  stage = Ensemble(members=4)
  one, many = (
    evaluate(stage, params, examples, batch_size=8, hyper={"beta": 1.0}, mesh=mesh, axes=stage.axes)
    for mesh in (MeshConfig(), MeshConfig(data=2, tensor=2, member=2))
  )
  assert many == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("stage", [Pairs(), Ensemble()])
def test_map_batches_yields_each_row_once_without_the_fill(stage):
  examples, params = data(21, members=stage.members), stage.params()
  axis = 1 if stage.members else 0
  rows = np.arange(20, -1, -1)
  found, outputs = zip(
    *map_batches(
      Scored(stage).scores,
      params,
      examples,
      8,
      MeshConfig(data=4),
      axes=stage.axes,
      rows=rows,
      members=stage.members,
    ),
    strict=True,
  )
  assert np.concatenate(found).tolist() == rows.tolist()
  whole = jax.device_get(Scored(stage).scores(params, examples.batch(rows)))
  np.testing.assert_allclose(np.concatenate(outputs, axis), whole, rtol=1e-5, atol=1e-6)
  before = compilations()
  list(
    map_batches(
      Scored(stage).scores,
      params,
      examples,
      8,
      MeshConfig(data=4),
      axes=stage.axes,
      members=stage.members,
    )
  )
  assert compilations().since(before).programs == 0  # an equal dataclass's method: the same program


@dataclasses.dataclass(frozen=True)
class Scored:
  stage: Pairs | Ensemble

  def scores(self, params, batch):
    out = self.stage.outputs(params, batch, rng=jax.random.key(0))
    return out["rewards"] if self.stage.members else out["score"]


@pytest.mark.slow
def test_a_coupled_stage_trains_in_microbatches_as_in_one(tmp_path):
  one, parts = (
    run(tmp_path / str(m), COUPLED, data(), microbatches=m, steps=5, clip_norm=10.0) for m in (1, 2)
  )
  a, b = (np.array([row["loss/total"] for row in lines(f, "loss/")]) for f in (one, parts))
  np.testing.assert_allclose(a, b, rtol=1e-3)


def test_training_is_a_key_of_its_numbers_and_hashable():
  assert hash(DEFAULT) == hash(dataclasses.replace(DEFAULT))
  assert dataclasses.replace(DEFAULT) == DEFAULT
  left_out = {f.name for f in dataclasses.fields(Training) if f.metadata.get("key") is False}
  assert left_out == {"checkpoint_every", "keep_last", "log_every"}  # none changes the result
