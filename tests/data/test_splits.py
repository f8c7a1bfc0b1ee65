"""Parts by the hash of the prompt."""

import subprocess
import sys

import numpy as np
import pytest

from rmd_jax.data.splits import PARTS, Splits, hash_uniform
from rmd_jax.errors import UserError

GOLDEN = [1, 0, 1, 2, 0, 0, 3, 1, 2, 3, 0, 0]
UNIFORM_A = 0.19675114429340357
PROMPTS = [f"prompt {i}" for i in range(20_000)]


def test_fractions_are_kept_to_within_chance():
  splits = Splits(validation=0.1, test=0.2, judge=0.3, seed=1)
  rows = splits.rows(PROMPTS)
  for name, fraction in (("validation", 0.1), ("test", 0.2), ("judge", 0.3), ("train", 0.4)):
    spread = (fraction * (1 - fraction) / len(PROMPTS)) ** 0.5
    assert abs(len(rows[name]) / len(PROMPTS) - fraction) < 4 * spread


def test_every_row_is_in_one_part():
  rows = Splits(judge=0.2).rows(PROMPTS)
  np.testing.assert_array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(20_000))


def test_the_part_is_a_function_of_the_prompt_alone():
  splits = Splits(0.2, 0.2, 0.2)
  part = splits.assign(PROMPTS)
  np.testing.assert_array_equal(splits.assign(PROMPTS[::-1]), part[::-1])
  np.testing.assert_array_equal(splits.assign(PROMPTS[5:9]), part[5:9])
  twice = splits.assign(["same", "other", "same"])
  assert twice[0] == twice[2]


def test_another_process_gives_the_same_parts():
  code = (
    "from rmd_jax.data.splits import Splits;"
    "print(Splits(0.2, 0.2, 0.2).assign([f'prompt {i}' for i in range(50)]).tolist())"
  )
  ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert ran.stdout.strip() == str(Splits(0.2, 0.2, 0.2).assign(PROMPTS[:50]).tolist())


def test_the_parts_do_not_move_with_a_new_version():
  # Change these only with a new FORMAT in preference_data: a run that goes on keeps its parts.
  assert Splits(0.2, 0.2, 0.2).assign(PROMPTS[:12]).tolist() == GOLDEN
  np.testing.assert_allclose(hash_uniform(0, ["a"]), [UNIFORM_A], rtol=0, atol=1e-15)


def test_other_seeds_give_other_parts():
  a, b = (Splits(0.25, 0.25, 0.25, seed=seed).assign(PROMPTS) for seed in (0, 1))
  assert abs((a == b).mean() - 0.25) < 0.02


def test_the_judges_prompts_stay_its_own_when_other_fractions_change():
  judge = PARTS.index("judge")
  before = Splits(0.1, 0.1, 0.3).assign(PROMPTS) == judge
  after = Splits(0.3, 0.2, 0.3).assign(PROMPTS) == judge
  np.testing.assert_array_equal(before, after)


def test_parts_not_asked_for_are_empty():
  rows = Splits(validation=0.0, test=0.0).rows(PROMPTS[:10])
  assert [len(rows[name]) for name in PARTS] == [10, 0, 0, 0]


@pytest.mark.parametrize(
  "fractions", [{"test": -0.1}, {"judge": 1.0}, {"validation": 0.5, "test": 0.5}]
)
def test_fractions_that_leave_nothing_are_refused(fractions):
  with pytest.raises(UserError, match="Splits"):
    Splits(**fractions)


def test_a_part_that_stays_empty_is_an_error():
  with pytest.raises(UserError, match="no example falls into the test part"):
    Splits(validation=0.0, test=0.05).rows(["one prompt"])
  with pytest.raises(UserError, match="no example falls into the train part"):
    Splits().rows([])


def test_the_hash_is_uniform():
  u = hash_uniform(3, PROMPTS)
  counts, _ = np.histogram(u, 20, (0, 1))
  assert ((counts - 1000) ** 2 / 1000).sum() < 44  # chi-square, 19 degrees, p = 0.001
