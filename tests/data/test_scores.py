"""Scores are computed once, found by content, and never taken for another run's."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rmd_jax.data.batch import Dataset
from rmd_jax.data.scores import ScoreStore
from rmd_jax.errors import RunError, UserError
from rmd_jax.training import files

FIELDS = {
  "dtype": "float32",
  "prompt_length": 8,
  "response_length": 4,
  "tokeniser": "3f2a91c07d55e0aa",
  "data": "d0d0",
}


def examples(rows: int, responses: int = 2, seed: int = 0) -> Dataset:
  rng = np.random.default_rng(seed)
  length = rng.integers(1, 5, (rows, responses)).astype(np.int32)
  if responses > 2:
    length[::2, -1] = 0
  return Dataset(
    ids=np.array([f"id-{seed}-{row}" for row in range(rows)]),
    prompt=rng.integers(3, 99, (rows, 8)).astype(np.int32),
    prompt_length=rng.integers(1, 9, rows).astype(np.int32),
    responses=rng.integers(3, 99, (rows, responses, 4)).astype(np.int32),
    response_length=length,
    response_mask=np.arange(4) < length[..., None],
    weight=np.ones(rows, np.float32),
  )


def values_of(dataset: Dataset, shift: float = 0.0) -> np.ndarray:
  """[M, N], a function of the content alone."""
  values = (dataset.responses[..., 0] / 7 + shift).astype(np.float32)
  return np.where(dataset.mask, values, 0)


def store_at(directory: Path, *, members: int = 2, fields=None, reference="aa" * 32) -> ScoreStore:
  hashes = [f"{k:02d}" * 32 for k in range(members)]
  return ScoreStore(directory, fields or FIELDS, reference=reference, members=hashes)


def score(store: ScoreStore, dataset: Dataset, batch: int = 4) -> int:
  """Scores what is missing, as the stage does; returns the number of rows scored."""
  rows = store.missing(dataset)
  scores = {name: values_of(dataset, k) for k, name in enumerate(store.columns)}
  for start in range(0, len(rows), batch):
    chosen = rows[start : start + batch]
    store.write(dataset, chosen, {name: values[chosen] for name, values in scores.items()})
  store.flush()
  return len(rows)


def test_scores_come_back_to_the_right_rows(tmp_path):
  dataset = examples(10)
  assert score(store_at(tmp_path), dataset) == 10
  shuffled = np.random.default_rng(1).permutation(10)[:7]
  attached = store_at(tmp_path).attach(dataset.take(shuffled))
  np.testing.assert_array_equal(attached.reference_logp, values_of(dataset)[shuffled])
  assert attached.rewards.shape == (2, 7, 2)
  for k in range(2):
    np.testing.assert_array_equal(attached.rewards[k], values_of(dataset, 1 + k)[shuffled])
  assert attached.reference_logp.dtype == attached.rewards.dtype == np.float32
  assert score(store_at(tmp_path), dataset) == 0


def test_padding_does_not_change_a_row(tmp_path):
  """The same examples in wider arrays have the same keys, so the scores are found."""
  dataset = examples(6)
  score(store_at(tmp_path), dataset)
  wider = dataset.replace(
    prompt=np.pad(dataset.prompt, ((0, 0), (0, 3)), constant_values=7),
    responses=np.pad(dataset.responses, ((0, 0), (0, 0), (0, 2)), constant_values=9),
    response_mask=np.pad(dataset.response_mask, ((0, 0), (0, 0), (0, 2))),
  )
  attached = store_at(tmp_path).attach(wider)
  np.testing.assert_array_equal(attached.reference_logp, values_of(dataset))


def test_groups_of_different_sizes_share_a_store(tmp_path):
  pairs, groups = examples(5), examples(6, responses=4, seed=1)
  store = store_at(tmp_path)
  score(store, pairs)
  score(store, groups)
  store = store_at(tmp_path)
  np.testing.assert_array_equal(store.attach(groups).rewards[0], values_of(groups, 1))
  np.testing.assert_array_equal(store.attach(pairs).rewards[1], values_of(pairs, 2))


def test_equal_examples_are_scored_once(tmp_path):
  dataset = examples(5).take(np.array([0, 1, 0, 2, 1]))
  store = store_at(tmp_path)
  assert store.missing(dataset).tolist() == [0, 1, 3]
  assert score(store, dataset) == 3
  np.testing.assert_array_equal(store.attach(dataset).reference_logp, values_of(dataset))


def test_scoring_goes_on_where_it_stopped(tmp_path):
  dataset = examples(10)
  store = store_at(tmp_path)
  store.write(dataset, np.arange(4), {"reference": values_of(dataset)[:4]})
  assert store.missing(dataset, ["reference"]).tolist() == [4, 5, 6, 7, 8, 9]
  assert len(store.missing(dataset)) == 10
  again = store_at(tmp_path)
  assert again.missing(dataset, ["reference"]).tolist() == [4, 5, 6, 7, 8, 9]
  with pytest.raises(UserError) as caught:
    again.attach(dataset)
  message = str(caught.value)
  assert "not complete" in message
  assert "reference  scores 4, run 10 examples   <- differs (first without: id-0-4)" in message
  assert "member_1  scores 0, run 10 examples" in message
  assert "Run `rmd score`" in message
  before = (tmp_path / "reference.bin").read_bytes()
  score(again, dataset)
  assert (tmp_path / "reference.bin").read_bytes().startswith(before)  # nothing scored twice
  np.testing.assert_array_equal(
    store_at(tmp_path).attach(dataset).reference_logp, values_of(dataset)
  )


def test_a_row_that_is_there_stays_as_it_is(tmp_path):
  dataset = examples(6)
  store = store_at(tmp_path)
  store.write(dataset, np.arange(4), {"reference": values_of(dataset)[:4]})
  before = (tmp_path / "reference.bin").read_bytes()
  store.write(dataset, np.arange(3), {"reference": values_of(dataset)[:3] + 1})
  assert (tmp_path / "reference.bin").read_bytes() == before
  store_at(tmp_path).write(dataset, np.arange(6), {"reference": values_of(dataset) + 1})
  alone = ScoreStore(tmp_path, FIELDS, reference="aa" * 32, members=[])
  stored = alone.attach(dataset).reference_logp
  np.testing.assert_array_equal(stored[:4], values_of(dataset)[:4])
  np.testing.assert_array_equal(stored[4:], values_of(dataset)[4:] + 1 * dataset.mask[4:])


def test_a_new_member_rescores_nothing(tmp_path):
  dataset = examples(8)
  score(store_at(tmp_path, members=2), dataset)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  store = store_at(tmp_path, members=3)
  assert store.missing(dataset, ["reference", "member_0", "member_1"]).tolist() == []
  assert len(store.missing(dataset)) == 8
  store.write(dataset, np.arange(8), {"member_2": values_of(dataset, 3)})
  after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  assert {name for name in after if after[name] != before.get(name)} == {
    "header.json",
    "member_2.bin",
  }
  assert store_at(tmp_path, members=3).attach(dataset).rewards.shape == (3, 8, 2)
  fewer = store_at(tmp_path, members=1, reference=None).attach(dataset)  # still good for less
  assert fewer.rewards.shape == (1, 8, 2)
  assert fewer.reference_logp is None


@pytest.mark.parametrize("name", FIELDS)
def test_scores_of_another_run_are_refused_with_what_differs(tmp_path, name):
  score(store_at(tmp_path), examples(3))
  other = {**FIELDS, name: 5 if isinstance(FIELDS[name], int) else "91cc07aaaaaaaaaa"}
  with pytest.raises(UserError) as caught:
    store_at(tmp_path, fields=other)
  lines = str(caught.value).splitlines()
  assert lines[0] == f"the scores in {tmp_path} belong to another run."
  there, here = str(FIELDS[name])[:12], str(other[name])[:12]
  assert lines[1] == f"  {name}  scores {there}, run {here}   <- differs"
  assert lines[2].endswith(": equal")
  assert name not in lines[2].replace(":", ",").split(", ")
  assert "Run `rmd score`" in lines[3]


def test_scores_of_other_models_are_refused(tmp_path):
  score(store_at(tmp_path), examples(3))
  with pytest.raises(
    UserError, match=r"model of reference  scores aaaaaaaaaaaa, run bbbbbbbbbbbb "
  ):
    store_at(tmp_path, reference="bb" * 32)
  with pytest.raises(UserError, match="model of member_1") as caught:
    ScoreStore(tmp_path, FIELDS, reference="aa" * 32, members=["00" * 32, "99" * 32])
  assert "model of member_0" in str(caught.value).splitlines()[2]  # among the equal ones


def test_neither_beta_nor_a_path_is_in_the_store(tmp_path):
  score(store_at(tmp_path / "one"), examples(3))
  (tmp_path / "one").rename(tmp_path / "two")
  store_at(tmp_path / "two").attach(examples(3))
  text = (tmp_path / "two" / "header.json").read_text()
  assert str(tmp_path) not in text
  assert "beta" not in text


def test_without_scores_the_message_says_what_to_run(tmp_path):
  with pytest.raises(UserError, match=r"there are no scores in .*Run `rmd score` first"):
    store_at(tmp_path / "none").attach(examples(2))
  assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_never_stored(tmp_path, bad):
  dataset = examples(4, responses=3)  # the third response of rows 0 and 2 does not exist
  store = store_at(tmp_path)
  values = values_of(dataset)
  values[2, 2] = bad
  store.write(dataset, np.arange(4), {"reference": values})  # padding may be anything
  assert np.isfinite(
    ScoreStore(tmp_path, FIELDS, reference="aa" * 32, members=[]).attach(dataset).reference_logp
  ).all()
  values[1, 0] = bad
  with pytest.raises(
    RunError, match=r"1 of 4 scores of member_1 are not finite \(examples id-0-1\)"
  ):
    store.write(dataset, np.arange(4), {"member_0": values_of(dataset), "member_1": values})
  assert not (tmp_path / "member_0.bin").exists()
  assert not (tmp_path / "member_1.bin").exists()


def test_a_torn_block_is_cut_and_scored_again(tmp_path, capfd):
  dataset = examples(8)
  score(store_at(tmp_path), dataset)
  path = tmp_path / "member_1.bin"
  whole = path.read_bytes()
  path.write_bytes(whole[:-5])
  store = store_at(tmp_path)
  with pytest.raises(UserError, match=r"member_1  scores 4, .*torn or damaged"):
    store.attach(dataset)
  assert path.read_bytes() == whole[:-5]  # reading repairs nothing
  assert score(store_at(tmp_path), dataset) == 4
  assert "were cut" in capfd.readouterr().err
  assert path.read_bytes() == whole


def test_every_bit_that_flips_is_noticed(tmp_path):
  dataset = examples(3)
  score(store_at(tmp_path), dataset, batch=3)
  path = tmp_path / "member_0.bin"
  whole = path.read_bytes()
  for offset in range(len(whole)):
    damaged = bytearray(whole)
    damaged[offset] ^= 1 << (offset % 8)
    path.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match="member_0"):
      store_at(tmp_path).attach(dataset)


def test_a_damaged_header_is_an_error(tmp_path):
  score(store_at(tmp_path), examples(3))
  (tmp_path / "header.json").write_text('{"format": 1, "fie')
  with pytest.raises(RunError, match=r"header\.json is damaged"):
    store_at(tmp_path)


def test_a_full_disk_loses_only_the_block_that_did_not_fit(tmp_path, monkeypatch):
  dataset = examples(8)
  store = store_at(tmp_path, members=0)
  store.write(dataset, np.arange(4), {"reference": values_of(dataset)[:4]})

  def fill(descriptor, data):
    if len(data) < 50:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return os.write(descriptor, bytes(data)[:-40])

  with monkeypatch.context() as patch:
    patch.setattr(files, "_write", fill)
    with pytest.raises(RunError, match=r"reference\.bin: No space left"):
      store.write(dataset, np.arange(4, 8), {"reference": values_of(dataset)[4:]})
  store = store_at(tmp_path, members=0)
  assert score(store, dataset) == 4
  np.testing.assert_array_equal(store.attach(dataset).reference_logp, values_of(dataset))


def test_wrong_shapes_and_names_are_refused(tmp_path):
  dataset = examples(4)
  store = store_at(tmp_path)
  with pytest.raises(ValueError, match=r"shape \(4,\), the examples \(4, 2\)"):
    store.write(dataset, np.arange(4), {"reference": np.zeros(4)})
  with pytest.raises(ValueError, match="no column 'member_7'"):
    store.write(dataset, np.arange(4), {"member_7": np.zeros((4, 2))})
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_kill_at_any_moment_and_scoring_ends_with_the_same_store(tmp_path):
  code = (
    "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
    "from test_scores import examples, score, store_at\n"
    "print('up', flush=True)\n"
    "score(store_at(pathlib.Path(sys.argv[1])), examples(1500), batch=2)\n"
    "print('done', flush=True)\n"
  )
  rng = np.random.default_rng(0)
  path, sizes = tmp_path / "member_1.bin", []
  for _ in range(6):
    child = subprocess.Popen(
      [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
      stdout=subprocess.PIPE,
      text=True,
    )
    assert child.stdout.readline() == "up\n"
    time.sleep(rng.uniform(0.05, 0.15))
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    sizes.append(path.stat().st_size if path.exists() else 0)
  assert sizes[-1] > 0
  dataset = examples(1500)
  score(store_at(tmp_path), dataset)
  attached = store_at(tmp_path).attach(dataset)
  np.testing.assert_array_equal(attached.rewards[1], values_of(dataset, 2))
  uninterrupted = tmp_path / "uninterrupted"
  score(store_at(uninterrupted), dataset, batch=2)
  for name in ("reference.bin", "member_0.bin", "member_1.bin"):  # no row was stored twice
    assert (tmp_path / name).stat().st_size <= (uninterrupted / name).stat().st_size
