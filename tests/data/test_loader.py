"""The loader: every example as often as any, wherever a run stops, on however many hosts."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmd_jax.data.batch import Dataset
from rmd_jax.data.loader import Loader, eval_batches, permutation
from rmd_jax.errors import UserError

GOLDEN_ROWS = [5, 8, 0, 2, 6, 4, 3, 9, 7, 1, 1, 5]


def numbered(count):
  """A data set whose prompts are the rows' numbers."""
  return Dataset(
    ids=np.array([str(i) for i in range(count)]),
    prompt=np.arange(count, dtype=np.int32)[:, None],
    prompt_length=np.ones(count, np.int32),
    responses=np.ones((count, 2, 1), np.int32),
    response_length=np.ones((count, 2), np.int32),
    response_mask=np.ones((count, 2, 1), bool),
    weight=np.ones(count, np.float32),
    member_weight=np.ones((3, count), np.float32),
  )


def stream(loader, first, last):
  return np.concatenate([np.zeros(0, int), *(loader.rows(step) for step in range(first, last))])


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_epoch_has_every_example_once(size, batch_size, seed):
  loader = Loader(numbered(size), batch_size, seed)
  steps = -(-3 * size // batch_size)
  rows = stream(loader, 0, steps)
  for epoch in range(3):
    assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_order_changes_with_the_epoch_and_the_seed():
  orders = [permutation(seed, epoch, 100).tolist() for seed in (0, 1) for epoch in (0, 1)]
  assert len({tuple(order) for order in orders}) == 4
  assert list(range(100)) not in orders


def test_order_is_this_forever():
  """A resumed run reads on in the order that it began with: change it and runs break."""
  assert Loader(numbered(10), 12, 3).rows(0).tolist() == GOLDEN_ROWS


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 30), start=st.integers(0, 9), hosts=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_resuming_on_other_hosts_replays_and_skips_nothing(size, start, hosts):
  """Batches 0 … start - 1 on one host, the rest on `hosts`: together the uninterrupted stream."""
  dataset = numbered(size)
  whole = stream(Loader(dataset, 12, 5), 0, 12)
  before = stream(Loader(dataset, 12, 5), 0, start)
  loaders = [Loader(dataset, 12, 5, host, hosts) for host in range(hosts)]
  after = [loader.batch(step).prompt[:, 0] for step in range(start, 12) for loader in loaders]
  assert all(len(part) == 12 // hosts for part in after)
  np.testing.assert_array_equal(np.concatenate([before, *after]), whole)


def test_a_batch_holds_its_rows():
  loader = Loader(numbered(5), 8, 0, host=1, hosts=2)
  batch = loader.batch(3)
  np.testing.assert_array_equal(batch.index, loader.rows(3)[4:])
  np.testing.assert_array_equal(batch.prompt[:, 0], batch.index)
  np.testing.assert_array_equal(batch.weight, 1)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_prefetch_gives_the_batches_in_order(ahead):
  loader = Loader(numbered(7), 3, 0)
  found = [batch.index.tolist() for batch in loader.prefetch(4, 9, ahead)]
  assert found == [loader.rows(step).tolist() for step in range(4, 9)]
  endless = loader.prefetch(2, ahead=ahead)
  assert [next(endless).index.tolist() for _ in range(20)][19] == loader.rows(21).tolist()
  endless.close()


def test_an_exception_on_the_thread_reaches_the_consumer_at_its_step(monkeypatch):
  make = Loader.batch

  def break_at_six(self, step):
    if step == 6:
      raise OSError("the disk is gone")
    return make(self, step)

  monkeypatch.setattr(Loader, "batch", break_at_six)
  loader, seen = Loader(numbered(7), 3, 0), []
  with pytest.raises(OSError, match="the disk is gone"):
    seen.extend(loader.prefetch(4))
  assert len(seen) == 2  # steps 4 and 5 arrive although 6 had failed before they were used


def test_an_abandoned_prefetch_leaves_no_thread():
  before = threading.active_count()
  batches = Loader(numbered(7), 3, 0).prefetch(0)
  next(batches)
  assert threading.active_count() == before + 1
  batches.close()
  assert threading.active_count() == before


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("size", [0, 1, 8, 11])
def test_evaluation_sees_every_example_once_in_order(size, hosts):
  dataset = numbered(size)
  hosted = [list(eval_batches(dataset, 4, host, hosts)) for host in range(hosts)]
  assert {len(batches) for batches in hosted} == {-(-size // 4)}
  index = [batch.index for step in zip(*hosted, strict=True) for batch in step]
  weight = [batch.weight for step in zip(*hosted, strict=True) for batch in step]
  assert all(len(part) == 4 // hosts for part in index)
  flat = np.concatenate(index) if index else np.zeros(0, int)
  assert flat[flat >= 0].tolist() == list(range(size))
  if index:
    np.testing.assert_array_equal(np.concatenate(weight), flat >= 0)
    assert all((b.member_weight[:, b.index < 0] == 0).all() for bs in hosted for b in bs)


def test_what_cannot_be_is_refused():
  with pytest.raises(UserError, match="no examples"):
    Loader(numbered(0), 4, 0)
  with pytest.raises(UserError, match="multiple of 3"):
    Loader(numbered(5), 4, 0, host=0, hosts=3)
  with pytest.raises(UserError, match="multiple of 3"):
    next(eval_batches(numbered(5), 4, 0, 3))
  with pytest.raises(ValueError, match="host 2 of 2"):
    Loader(numbered(5), 4, 0, host=2, hosts=2)
  with pytest.raises(ValueError, match="negative"):
    Loader(numbered(5), 4, 0).rows(-1)
