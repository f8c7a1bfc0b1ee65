"""Token columns against a plain, slow tokeniser of one record."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmd_jax.data.schema import Record
from rmd_jax.data.tokenise import tokenise, tokenise_prompts
from rmd_jax.data.vocabulary import ByteVocabulary, WordVocabulary
from rmd_jax.errors import UserError

BYTES = ByteVocabulary()
PAIR = Record("x", "abc", ("wxyz", "v"), "pair", False, None, None, None, 1.0, "f", 1)


def record(prompt, *responses, **fields):
  return dataclasses.replace(PAIR, prompt=prompt, responses=responses, **fields)


def plain(record, p, r, n):
  """One record by the definition: BOS and the prompt's tail; each response's head and EOS."""
  body = [b + 3 for b in record.prompt.encode()]
  prompt = [0, *(body[max(0, len(body) - (p - 1)) :] if p > 1 else [])]
  rows = [[*(b + 3 for b in text.encode()[: r - 1]), 1] for text in record.responses]
  rows += [[]] * (n - len(rows))
  lengths = [len(row) for row in rows]
  mask = [[j < length for j in range(r)] for length in lengths]
  return (
    prompt + [0] * (p - len(prompt)),
    len(prompt),
    [row + [0] * (r - len(row)) for row in rows],
    lengths,
    mask,
  )


TEXTS = st.lists(
  st.tuples(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8)),
  min_size=1,
  max_size=5,
)


@settings(deadline=None, max_examples=50)
@given(TEXTS, st.integers(1, 12), st.integers(2, 12))
def test_columns_are_those_of_the_plain_tokeniser(texts, p, r):
  records = [record(*three) for three in texts]
  data = tokenise(records, BYTES, prompt_length=p, response_length=r).dataset
  for row, one in enumerate(records):
    prompt, length, responses, lengths, mask = plain(one, p, r, 2)
    assert data.prompt[row].tolist() == prompt
    assert data.prompt_length[row] == length
    assert data.responses[row].tolist() == responses
    assert data.response_length[row].tolist() == lengths
    assert data.response_mask[row].tolist() == mask


def test_types_are_those_of_a_batch():
  data = tokenise([PAIR], BYTES, prompt_length=5, response_length=6).dataset
  assert data.prompt.dtype == data.responses.dtype == np.int32
  assert data.prompt_length.dtype == data.response_length.dtype == np.int32
  assert data.response_mask.dtype == bool
  assert data.weight.dtype == np.float32
  assert (data.preference, data.ranks, data.ratings) == (None, None, None)
  assert data.ids.tolist() == ["x"]


def test_groups_of_unequal_number_are_padded():
  records = [
    record("p", "a", "b", "c", ranks=(0, 1, 2), shape="ranks"),
    record("p", "a", "b", ranks=(0, 1), shape="ranks"),
  ]
  done = tokenise(records, BYTES, prompt_length=4, response_length=4)
  assert done.dataset.response_length.tolist() == [[2, 2, 2], [2, 2, 0]]
  assert done.dataset.ranks[0].tolist() == [0, 1, 2]
  assert not done.dataset.response_mask[1, 2].any()
  assert done.response_tokens.tolist() == [[2, 2, 2], [2, 2, 0]]
  wider = tokenise(records, BYTES, prompt_length=4, response_length=4, responses=5)
  assert wider.dataset.responses.shape == (2, 5, 4)
  assert wider.dataset.keys[0] != wider.dataset.keys[1]


def test_labels_become_columns():
  records = [record("p", "a", "b", preference=0.75), PAIR]
  data = tokenise(records, BYTES, prompt_length=4, response_length=4).dataset
  assert data.preference.tolist() == [0.75, 1.0]  # a pair that states none is certain
  rated = record("p", "a", "b", ratings=(2.5, -1.0), shape="ratings", weight=3.0)
  data = tokenise([rated], BYTES, prompt_length=4, response_length=4).dataset
  assert data.ratings.tolist() == [[2.5, -1.0]]
  assert data.weight.tolist() == [3.0]


def test_everything_cut_is_counted():
  records = [
    record("abcd", "same start, one end", "same start, other end"),
    record("ab", "x", "a long one, alone"),
    record("ab", "x", "y"),
  ]
  done = tokenise(records, BYTES, prompt_length=4, response_length=6)
  assert done.counts == {
    "prompts_truncated": 1,
    "responses_truncated": 3,
    "examples_truncated": 2,
    "examples_left_out": 0,
    "identical_after_truncation": 1,
  }
  assert done.prompt_tokens.tolist() == [5, 3, 3]
  assert (done.dataset.responses[0, :, 5] == BYTES.eos_id).all()


def test_a_response_that_just_fits_is_not_cut():
  done = tokenise([record("abc", "wxyz", "v")], BYTES, prompt_length=4, response_length=5)
  assert done.counts["responses_truncated"] == done.counts["prompts_truncated"] == 0
  assert BYTES.decode(done.dataset.responses[0, 0]) == "wxyz"
  assert done.dataset.response_length[0, 0] == 5


def test_examples_left_out_are_counted_and_named():
  records = [record("a", "wxyz", "x", line=4), record("abcdefg", "bcd", "c", line=5)]
  done = tokenise(records, BYTES, prompt_length=4, response_length=4, truncation="leave_out")
  assert done.rows.tolist() == [1]
  assert len(done.dataset) == 1
  assert done.counts["examples_left_out"] == 1
  assert done.counts["responses_truncated"] == 0
  assert done.counts["prompts_truncated"] == 1
  assert [(problem.line, problem.severity) for problem in done.left_out] == [(4, "warning")]
  assert "5 tokens, more than 4" in done.left_out[0].what


def test_texts_that_the_vocabulary_cannot_write_are_unusable_not_dropped():
  words = WordVocabulary(("yes", "no"))
  records = [record("yes", "no", "yes"), record("yes", "maybe", "no", line=2)]
  done = tokenise(records, words, prompt_length=4, response_length=4)
  assert done.rows.tolist() == [0]
  assert [(problem.line, problem.severity) for problem in done.left_out] == [(2, "error")]
  assert done.dataset.prompt[0].tolist() == [1, 3, 0, 0]
  assert done.dataset.responses[0, 0].tolist() == [4, 2, 0, 0]


def test_prompts_alone_are_the_columns_of_the_records():
  records = [record("abcdef", "x", "y"), record("é", "x", "y")]
  data = tokenise(records, BYTES, prompt_length=4, response_length=4).dataset
  ids, lengths = tokenise_prompts(["abcdef", "é"], BYTES, 4)
  np.testing.assert_array_equal(ids, data.prompt)
  np.testing.assert_array_equal(lengths, data.prompt_length)


def test_prompt_and_response_share_no_token():
  a = tokenise([record("ab", "c", "d")], BYTES, prompt_length=8, response_length=8).dataset
  b = tokenise([record("a", "bc", "d")], BYTES, prompt_length=8, response_length=8).dataset
  assert (a.prompt_length[0], b.prompt_length[0]) == (3, 2)
  assert (a.keys != b.keys).all()


@pytest.mark.parametrize(
  "lengths",
  [
    {"prompt_length": 0, "response_length": 4},
    {"prompt_length": 4, "response_length": 1},
    {"prompt_length": 4, "response_length": 4, "truncation": "middle"},
  ],
)
def test_lengths_that_hold_nothing_are_refused(lengths):
  with pytest.raises(UserError, match=r"prompt_length|response_length|truncation"):
    tokenise([PAIR], BYTES, **lengths)


def test_no_records_give_empty_columns():
  data = tokenise([], BYTES, prompt_length=4, response_length=4).dataset
  assert len(data) == 0
  assert data.responses.shape == (0, 1, 4)


def test_many_records_take_seconds():
  import time

  records = [record("word " * 20, "word " * 20, "other " * 10) for _ in range(10_000)]
  start = time.process_time()
  tokenise(records, BYTES, prompt_length=128, response_length=64)
  assert time.process_time() - start < 3  # about 0.3 s
