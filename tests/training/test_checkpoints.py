"""A checkpoint comes back bit for bit, or the next good one does and says so, or the run stops."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmd_jax.errors import RunError, UserError
from rmd_jax.training import checkpoints as module
from rmd_jax.training import files
from rmd_jax.training.checkpoints import Checkpoints, load_params
from rmd_jax.training.manifests import params_hash


class Carry(NamedTuple):
  average: jax.Array
  nothing: tuple
  none: None


def small(value: float = 0.0) -> dict:
  return {"params": {"w": np.full(3, value, np.float32)}, "step": np.int32(value)}


def full_state() -> dict:
  params = {
    "frozen": {},
    "shared": {"w": jnp.arange(12.0).reshape(3, 4) / 7, "b": jnp.bfloat16([0.1, -3.0])},
    "members": {"head": jnp.linspace(0, 1, 10).reshape(5, 2)},
  }
  optimiser = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
  return {
    "params": params,
    "optimiser": optimiser.init(params),
    "carry": Carry(jnp.float32(np.pi), (), None),
    "step": jnp.int32(7),
    "key": jax.random.key(3),
    "other_key": jax.random.key(4, impl="rbg"),
    "epoch": 4,
    "best": 0.25,
    "flag": True,
    "empty": {},
    "byte": np.uint8([255, 0]),
  }


def data(leaf):
  is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_same(tree, wanted, same_types: bool = True) -> None:
  assert jax.tree.structure(tree) == jax.tree.structure(wanted)
  for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
    if same_types:
      assert isinstance(got, jax.Array) == isinstance(want, jax.Array)
      assert getattr(got, "dtype", type(got)) == getattr(want, "dtype", type(want))
    got, want = data(got), data(want)
    assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


def damage(path: Path, offset: int = -1) -> None:
  """Flips one bit of a file."""
  content = bytearray(path.read_bytes())
  content[offset if offset >= 0 else len(content) // 2] ^= 4
  path.write_bytes(bytes(content))


def largest_file(checkpoint: Path) -> Path:
  return max((p for p in (checkpoint / "state").rglob("*") if p.is_file()), key=os.path.getsize)


def test_everything_in_a_state_comes_back_bit_for_bit(tmp_path):
  state = full_state()
  checkpoints = Checkpoints(tmp_path)
  digest = checkpoints.save(7, state, {"note": ["ü", 1]}, metric=0.5)
  restored = Checkpoints(tmp_path).restore(state)
  assert_same(restored.state, state)
  assert restored[1:] == (7, {"note": ["ü", 1]}, 0.5, digest)
  assert digest == params_hash(restored.state["params"])
  draw = jax.random.normal(restored.state["other_key"], (2,))
  np.testing.assert_array_equal(draw, jax.random.normal(state["other_key"], (2,)))


def test_without_an_abstract_state_everything_is_numpy_in_dictionaries(tmp_path):
  state = full_state()
  Checkpoints(tmp_path).save(7, state)
  restored = Checkpoints(tmp_path).restore().state
  assert_same(restored["params"], jax.tree.map(np.asarray, state["params"]))
  assert restored["params"]["frozen"] == restored["empty"] == {}
  assert restored["params"]["shared"]["b"].dtype == jnp.bfloat16
  assert restored["carry"] == {"average": np.float32(np.pi), "nothing": {}, "none": {}}
  np.testing.assert_array_equal(
    restored["optimiser"]["1"]["0"]["mu"]["members"]["head"], np.zeros((5, 2), np.float32)
  )


def mesh(*shape: int) -> Mesh:
  return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "member"))


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
  values = np.arange(64, dtype=np.float32).reshape(8, 8) / 3
  key = jax.random.split(jax.random.key(0), 4)
  old = mesh(2, 4)
  state = {
    "params": {"w": jax.device_put(values, NamedSharding(old, PartitionSpec("member", "data")))},
    "keys": jax.device_put(key, NamedSharding(old, PartitionSpec("member"))),
  }
  digest = Checkpoints(tmp_path).save(1, state)
  assert digest == params_hash({"w": values})
  for new in (mesh(4, 2), mesh(1, 1)):
    sharding = NamedSharding(new, PartitionSpec("data", None))
    abstract = {
      "params": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)},
      "keys": jax.ShapeDtypeStruct((4,), key.dtype, sharding=NamedSharding(new, PartitionSpec())),
    }
    restored = Checkpoints(tmp_path).restore(abstract).state
    assert restored["params"]["w"].sharding == sharding
    np.testing.assert_array_equal(restored["params"]["w"], values)
    np.testing.assert_array_equal(data(restored["keys"]), data(key))
    assert len(restored["keys"].sharding.device_set) == new.size


def test_abstract_leaves_without_a_sharding_become_numpy(tmp_path):
  Checkpoints(tmp_path).save(1, small(2.0))
  abstract = jax.eval_shape(lambda: small(2.0))
  restored = Checkpoints(tmp_path).restore(abstract).state
  assert isinstance(restored["params"]["w"], np.ndarray)
  assert_same(restored, small(2.0))


def test_a_state_that_does_not_fit_is_refused_with_what_differs(tmp_path):
  Checkpoints(tmp_path).save(1, small())
  wrong = {"params": {"w": np.zeros(4, np.float32), "v": np.zeros(1)}, "step": np.int64(0)}
  with pytest.raises(UserError) as caught:
    Checkpoints(tmp_path).restore(wrong)
  message = str(caught.value)
  assert "params/w  checkpoint float32[3], run float32[4]   <- differs" in message
  assert "params/v  checkpoint nothing, run float64[1]" in message
  assert "step  checkpoint int32[], run int64[]" in message


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
  assert Checkpoints(tmp_path / "new").restore(small()) is None
  (tmp_path / ".tmp-5" / "state").mkdir(parents=True)  # killed in its first save
  assert Checkpoints(tmp_path).restore(small()) is None
  assert list(tmp_path.glob(".tmp*")) == []


@pytest.mark.parametrize("where", ["array", "manifest", "edited", "metadata", "truncated", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, where, capfd):
  checkpoints = Checkpoints(tmp_path)
  for step in (1, 2):
    checkpoints.save(step, small(step))
  latest = tmp_path / "2"
  if where == "array":
    damage(largest_file(latest))
  elif where == "manifest":
    damage(latest / "manifest.json")
  elif where == "edited":  # a flip that leaves it valid JSON, with files that agree with it
    text = (latest / "manifest.json").read_text()
    (latest / "manifest.json").write_text(text.replace('"step": 2', '"step": 6'))
  elif where == "metadata":
    damage(latest / "state" / "_METADATA", 3)
  elif where == "truncated":
    os.truncate(largest_file(latest), 5)
  else:
    largest_file(latest).unlink()
  restored = Checkpoints(tmp_path).restore(small())
  assert restored.step == 1
  np.testing.assert_array_equal(restored.state["params"]["w"], np.float32([1, 1, 1]))
  said = capfd.readouterr().err
  assert f"checkpoint {latest} is not good" in said
  assert f"falling back to checkpoint {tmp_path / '1'}" in said


def test_every_byte_that_flips_is_noticed(tmp_path):
  Checkpoints(tmp_path).save(1, small())
  rng = np.random.default_rng(0)
  for path in sorted(p for p in (tmp_path / "1").rglob("*") if p.is_file()):
    whole = path.read_bytes()
    for offset in rng.integers(len(whole), size=3) if whole else ():
      damage(path, int(offset))
      with pytest.raises(RunError, match="none of its checkpoints is good"):
        Checkpoints(tmp_path).restore(small())
      path.write_bytes(whole)
  assert Checkpoints(tmp_path).restore(small()).step == 1


def test_when_none_is_good_the_run_stops(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step in (1, 2):
    checkpoints.save(step, small(step))
    damage(largest_file(tmp_path / str(step)))
  with pytest.raises(RunError) as caught:
    Checkpoints(tmp_path).restore(small())
  message = str(caught.value)
  assert str(tmp_path / "1") in message
  assert str(tmp_path / "2") in message
  assert "start afresh" in message
  assert checkpoints.steps() == [1, 2]  # nothing was removed


def test_a_damaged_one_takes_no_place_of_a_good_one_and_is_set_aside(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=0)
  for step in (10, 20):
    checkpoints.save(step, small(step))
  damage(largest_file(tmp_path / "20"))
  checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=0)
  assert checkpoints.restore(small()).step == 10
  checkpoints.save(15, small(15))
  assert checkpoints.steps() == [10, 15]
  assert (tmp_path / "bad-20").is_dir()
  for step in (10, 15):
    damage(largest_file(tmp_path / str(step)))
    files.remove_tree(tmp_path / str(step))
  with pytest.raises(RunError, match="none of its checkpoints is good"):  # not a fresh start
    Checkpoints(tmp_path).restore(small())


def test_a_damaged_step_can_be_saved_again(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step in (1, 2):
    checkpoints.save(step, small(step))
  damage(largest_file(tmp_path / "2"))
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.restore(small()).step == 1
  checkpoints.save(2, small(2))
  assert checkpoints.steps() == [1, 2]
  assert Checkpoints(tmp_path).restore(small()).step == 2
  assert [p.name for p in tmp_path.iterdir() if not p.name.isdecimal()] == []


@pytest.mark.parametrize(
  "mode, metrics, kept, best",
  [
    ("min", [3.0, 1.0, 2.0, 5.0, 4.0], [2, 4, 5], 2),
    ("max", [3.0, 1.0, 2.0, 5.0, 4.0], [4, 5], 4),
    ("min", [1.0, 1.0, 1.0, float("nan"), None], [1, 4, 5], 1),  # of equals the earliest
  ],
)
def test_the_last_and_the_best_are_kept(tmp_path, mode, metrics, kept, best):
  for step, metric in enumerate(metrics, 1):  # a new object each time: nothing lives in memory only
    Checkpoints(tmp_path, keep_last=2, keep_best=1, mode=mode).save(step, small(step), {}, metric)
  checkpoints = Checkpoints(tmp_path, mode=mode)
  assert checkpoints.steps() == kept
  assert checkpoints.restore(small(), "best").step == best
  assert checkpoints.restore(small(), "last").step == 5


def test_best_passes_to_the_next_best(tmp_path, capfd):
  checkpoints = Checkpoints(tmp_path, keep_last=5)
  for step, metric in enumerate([3.0, 1.0, 2.0, None], 1):
    checkpoints.save(step, small(step), {}, metric)
  damage(largest_file(tmp_path / "2"))
  assert Checkpoints(tmp_path).restore(small(), "best").step == 3
  assert "is not good" in capfd.readouterr().err


def test_best_without_any_metric_and_steps_that_are_not_there_are_refused(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, small(1))
  checkpoints.save(2, small(2))
  with pytest.raises(UserError, match="has a metric"):
    checkpoints.restore(small(), "best")
  with pytest.raises(UserError, match="no checkpoint of step 3; there are: 1, 2"):
    checkpoints.restore(small(), 3)
  assert checkpoints.restore(small(), 1).step == 1
  damage(largest_file(tmp_path / "1"))
  with pytest.raises(RunError, match="it is damaged"):  # no other step was asked for
    checkpoints.restore(small(), 1)


def test_parameters_alone_for_other_stages(tmp_path):
  state = full_state()
  digest = Checkpoints(tmp_path / "checkpoints").save(7, state, {}, 1.0)
  before = sorted(tmp_path.rglob("*"))
  params, found, step = load_params(tmp_path)
  assert (found, step) == (digest, 7)
  assert_same(params, jax.tree.map(np.asarray, state["params"]))
  params, _, _ = load_params(tmp_path, which="last", abstract=state["params"])
  assert_same(params, state["params"])
  assert sorted(tmp_path.rglob("*")) == before
  with pytest.raises(UserError, match="Train that stage first"):
    load_params(tmp_path / "nowhere")
  assert not (tmp_path / "nowhere").exists()


def test_the_parameters_hash_is_their_content(tmp_path):
  params = full_state()["params"]
  digest = params_hash(params)
  assert digest == params_hash(jax.tree.map(np.asarray, params))
  assert digest == params_hash({"shared": params["shared"], "members": params["members"]})
  assert digest != params_hash({**params, "members": {"tail": params["members"]["head"]}})
  one = {"w": np.zeros((2, 3), np.float32)}
  others = [np.zeros((3, 2), np.float32), np.zeros((2, 3), np.int32), -np.zeros((2, 3), np.float32)]
  assert len({params_hash(one), *(params_hash({"w": other}) for other in others)}) == 4
  checkpoints = Checkpoints(tmp_path)
  moved = {**full_state(), "step": jnp.int32(8)}
  assert checkpoints.save(1, full_state()) == checkpoints.save(2, moved) == digest


def test_the_manifest_says_what_is_there(tmp_path):
  Checkpoints(tmp_path).save(3, full_state(), {"a": 1}, 0.5)
  manifest = json.loads((tmp_path / "3" / "manifest.json").read_text())
  assert (manifest["step"], manifest["metric"], manifest["meta"]) == (3, 0.5, {"a": 1})
  assert manifest["leaves"]["params/shared/b"] == ["bfloat16", [2]]
  here = {str(p.relative_to(tmp_path / "3")) for p in (tmp_path / "3").rglob("*") if p.is_file()}
  assert here == {*manifest["files"], "manifest.json"}
  for name, (size, digest) in manifest["files"].items():
    assert (tmp_path / "3" / name).stat().st_size == size
    assert files.sha256_of(tmp_path / "3" / name) == digest


def test_meta_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for meta in ({"x": float("nan")}, {"x": np.float32(1)}):
    with pytest.raises((ValueError, TypeError)):
      checkpoints.save(1, small(), meta)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["_write", "_fsync", "_rename"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, fault):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, small(1))

  def fail(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(files, fault, fail)
    with pytest.raises(RunError, match="No space left on device"):
      checkpoints.save(2, small(2))
  assert [p.name for p in tmp_path.iterdir()] == ["1"]
  assert checkpoints.restore(small()).step == 1
  checkpoints.save(2, small(2))
  assert checkpoints.restore(small()).step == 2


def test_a_full_disk_under_orbax_is_named(tmp_path):
  """A limit on the size of files makes the real writes of Orbax fail, in a process of its own."""
  code = (
    "import resource, signal, sys, pathlib, numpy as np\n"
    "from rmd_jax.training.checkpoints import Checkpoints\n"
    "from rmd_jax.errors import RunError\n"
    "big = {'params': {'w': np.random.default_rng(0).normal(size=10**5)}}\n"
    "d = pathlib.Path(sys.argv[1]); c = Checkpoints(d); c.save(1, big)\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    "try: c.save(2, big)\n"
    "except RunError as e: print(e)\n"
    "print(sorted(p.name for p in d.iterdir()), c.restore().step)\n"
  )
  child = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
  )
  assert f"cannot write {tmp_path}/.tmp-2: File too large" in child.stdout
  assert "['1'] 1" in child.stdout


@pytest.mark.parametrize("killed_at", ["seal", "first rename", "second rename", "removal"])
def test_a_kill_inside_save_loses_at_most_that_save(tmp_path, monkeypatch, killed_at):
  """The process vanishes at given points of replacing step 2; nothing after the point happens."""

  class Killed(BaseException):
    pass

  def vanish(*_, **__):
    raise Killed

  checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
  checkpoints.save(2, small(2))
  with monkeypatch.context() as patch:
    renames = [0]
    rename = files.rename

    def count(source, target, **options):
      renames[0] += 1
      if renames[0] == {"first rename": 1, "second rename": 2}.get(killed_at):
        raise Killed
      rename(source, target, **options)

    patch.setattr(files, "rename", count)
    if killed_at == "seal":
      patch.setattr(module.manifests, "seal", vanish)
    if killed_at == "removal":
      remove = files.remove_tree
      old = tmp_path / ".old-2"
      patch.setattr(files, "remove_tree", lambda p: vanish() if old.exists() else remove(p))
    with pytest.raises(Killed):
      checkpoints.save(2, small(22))
  checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
  restored = checkpoints.restore(small())
  assert restored.step == 2
  assert restored.state["params"]["w"][0] == (22 if killed_at == "removal" else 2)
  assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_what_cannot_be_told_apart_or_makes_no_sense_is_refused(tmp_path):
  with pytest.raises(ValueError, match="cannot be told apart"):
    Checkpoints(tmp_path).save(1, {"params": {"a/b": np.zeros(1), "a": {"b": np.ones(1)}}})
  with pytest.raises(UserError, match="keep_last"):
    Checkpoints(tmp_path, keep_last=0)
  with pytest.raises(UserError, match="'min' or 'max'"):
    Checkpoints(tmp_path, mode="least")
  with pytest.raises(ValueError, match="read only"):
    Checkpoints(tmp_path, read_only=True).save(1, small())


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_checkpoint_that_can_be_restored(tmp_path):
  """A child saves steps in a loop, restoring at its start; it is killed at random and restarted."""
  code = (
    "import sys, pathlib, numpy as np\n"
    "from rmd_jax.training.checkpoints import Checkpoints\n"
    "c = Checkpoints(pathlib.Path(sys.argv[1]), keep_last=2)\n"
    "r = c.restore()\n"
    "step = r.step if r else 0\n"
    "if r: assert (r.state['params']['w'] == step).all() and r.meta == {'step': step}, step\n"
    "print(step, flush=True)\n"
    "while True:\n"
    "  step += 1\n"
    "  c.save(step, {'params': {'w': np.full(50_000, step)}}, {'step': step}, 1 / step)\n"
    "  print(step, flush=True)\n"
  )
  rng = np.random.default_rng(0)
  begun, committed = [], 0
  for _ in range(8):
    child = subprocess.Popen(
      [sys.executable, "-c", code, str(tmp_path)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    begun.append(int(child.stdout.readline()))
    assert begun[-1] >= committed
    for _ in range(rng.integers(1, 4)):
      committed = int(child.stdout.readline())
    time.sleep(rng.uniform(0, 0.2))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert "not good" not in child.stderr.read()  # a kill damages nothing that was committed
    child.stdout.close()
    child.stderr.close()
  restored = Checkpoints(tmp_path).restore()
  assert restored.step >= committed
  assert (restored.state["params"]["w"] == restored.step).all()
  assert len(list(tmp_path.iterdir())) <= 3
