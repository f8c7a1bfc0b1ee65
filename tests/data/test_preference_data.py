"""What a run gets from a source: parts, demonstrations, vocabulary, and what was left out."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rmd_jax.data.preference_data import PreferenceData, histogram
from rmd_jax.data.readers import FileSource, RecordsSource
from rmd_jax.data.splits import Splits
from rmd_jax.data.vocabulary import ByteVocabulary, TrainedSentencePiece, WordVocabulary
from rmd_jax.errors import UserError

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_1500.jsonl.gz"
BYTES = ByteVocabulary()


def pair(i, **fields):
  return {"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i % 5}", **fields}


ROWS = tuple(pair(i, id=f"id{i}") for i in range(60))
SPLITS = Splits(0.2, 0.2, 0.2)


def data(rows=ROWS, **fields):
  options = {"vocabulary": BYTES, "splits": SPLITS, **fields}
  return PreferenceData(RecordsSource(tuple(rows)), 8, 12, **options)


def texts(dataset, vocabulary=BYTES):
  return [
    (
      vocabulary.decode(dataset.prompt[row]),
      *(vocabulary.decode(ids) for ids in dataset.responses[row]),
    )
    for row in range(len(dataset))
  ]


def test_every_record_is_in_one_part(tmp_path):
  prepared = data().prepare(tmp_path)
  ids = [set(part.ids.tolist()) for part in prepared.splits.values()]
  assert sum(map(len, ids)) == len(set().union(*ids)) == 60
  assert list(prepared.splits) == ["train", "validation", "test", "judge"]
  assert prepared.summary["counts"] == {n: len(part) for n, part in prepared.splits.items()}
  for part in prepared.splits.values():
    assert ("p7", "good 7", "bad 2") in texts(part) or "id7" not in part.ids


def test_all_parts_have_one_shape(tmp_path):
  rows = [
    {"prompt": f"p{i}", "responses": list("abcde"[: 2 + i % 4]), "ranks": list(range(2 + i % 4))}
    for i in range(60)
  ]
  prepared = data(rows).prepare(tmp_path)
  assert {part.responses.shape[1:] for part in prepared.splits.values()} == {(5, 12)}
  assert prepared.summary["responses"] == 5
  assert prepared.summary["shape"] == "ranks"


def test_sft_learns_the_chosen_responses_of_train_and_validation(tmp_path):
  prepared = data([pair(i, preference=0.75) for i in range(60)]).prepare(tmp_path)
  assert list(prepared.demonstrations) == ["train", "validation"]
  for name, part in prepared.demonstrations.items():
    assert texts(part) == [one[:2] for one in texts(prepared.splits[name])]
    assert part.responses.shape[1] == part.response_mask.shape[1] == 1
    assert part.preference is None
  assert prepared.splits["train"].preference is not None


def test_given_demonstrations_stay_out_of_test_and_judge(tmp_path):
  shown = RecordsSource(tuple({"prompt": f"p{i}", "response": f"shown {i}"} for i in range(60)))
  prepared = data(demonstrations=shown).prepare(tmp_path)
  held_out = {t[0] for name in ("test", "judge") for t in texts(prepared.splits[name])}
  for name, part in prepared.demonstrations.items():
    prompts = {one[0] for one in texts(part)}
    assert prompts == {one[0] for one in texts(prepared.splits[name])}
    assert not prompts & held_out
    assert all(one[1].startswith("shown") for one in texts(part))


class World:
  """A source as the synthetic world is one: raw records without locations, its own words."""

  vocabulary = WordVocabulary(("is", "it", "yes", "no"))

  def records(self):
    return [
      {"prompt": " ".join(["is", "it"] * (1 + i)), "chosen": "yes", "rejected": "no"}
      for i in range(40)
    ]

  def demonstrations(self):
    return [{"prompt": "it", "response": "yes"}, {"prompt": "is", "response": "maybe"}]

  def fingerprint(self):
    return "world"


def test_a_source_may_bring_vocabulary_and_demonstrations(tmp_path):
  world = PreferenceData(World(), 9, 4, max_bad_fraction=0.5, splits=Splits(0.2, 0.0))
  prepared = world.prepare(tmp_path)
  assert prepared.vocabulary is World.vocabulary
  assert texts(prepared.splits["train"], prepared.vocabulary)[0][1:] == ("yes", "no")
  shown = [
    one for part in prepared.demonstrations.values() for one in texts(part, World.vocabulary)
  ]
  assert shown == [("it", "yes")]
  # The word that the vocabulary lacks makes its record unusable, and it is listed.
  assert [str(problem).split(": ")[0] for problem in prepared.left_out] == [
    "World demonstrations:2"
  ]
  with pytest.raises(UserError, match="'maybe' is not in the vocabulary"):
    dataclasses.replace(world, max_bad_fraction=0.1).prepare(tmp_path)


def test_unusable_records_are_refused_or_listed(tmp_path):
  rows = [*ROWS, pair(60, chosen=None), pair(61, rejected="")]
  with pytest.raises(UserError, match="2 of 62 records are unusable"):
    data(rows).prepare(tmp_path)
  prepared = data(rows, max_bad_fraction=0.05).prepare(tmp_path)
  assert [problem.line for problem in prepared.left_out] == [61, 62]
  assert sum(prepared.summary["counts"].values()) == 60
  assert prepared.summary["left_out"] == [str(problem) for problem in prepared.left_out]
  assert prepared.summary["unusable"] == 2
  assert "left out 2 records" in prepared.text()
  assert "records:61: chosen: is null" in prepared.text()


def test_a_word_outside_the_vocabulary_falls_under_the_same_rule(tmp_path):
  words = WordVocabulary(("good", "bad", *(f"p{i}" for i in range(60))))
  rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(59)]
  rows.append({"prompt": "p59", "chosen": "unheard", "rejected": "bad"})
  with pytest.raises(UserError, match=r"1 of 60 .*\n  records:60: record: word 'unheard'"):
    data(rows, vocabulary=words).prepare(tmp_path)
  prepared = data(rows, vocabulary=words, max_bad_fraction=0.02).prepare(tmp_path)
  assert sum(prepared.summary["counts"].values()) == 59


def test_examples_too_long_are_left_out_and_listed_but_not_unusable(tmp_path):
  rows = [*ROWS, pair(60, chosen="much too long a response")]
  cut = data(rows).prepare(tmp_path)
  assert (cut.summary["truncation"]["responses_truncated"], cut.left_out) == (1, [])
  out = data(rows, truncation="leave_out").prepare(tmp_path)
  assert [problem.line for problem in out.left_out] == [61]
  assert out.summary["unusable"] == 0
  assert sum(out.summary["counts"].values()) == 60


def test_the_summary_is_json_and_counts_all(tmp_path):
  summary = data([*ROWS, pair(60, rejected="good 60")]).prepare(tmp_path).summary
  assert json.loads(json.dumps(summary)) == summary
  assert summary["warnings"] == {"identical responses": 1}
  for name in ("prompt", "chosen", "rejected"):
    bins = summary["lengths"][name]
    assert len(bins["edges"]) == len(bins["counts"]) + 1
    assert sum(bins["counts"]) == 61
  assert summary["longer_wins"] == pytest.approx(60.5 / 61)
  assert summary["vocabulary"]["size"] == 259


def test_a_histogram_holds_the_longest():
  bins = histogram(np.array([1, 2, 2, 100]))
  assert bins["edges"][-1] > 100
  assert sum(bins["counts"]) == 4
  assert len(bins["counts"]) <= 20
  assert histogram(np.zeros(0, int)) == {"edges": [0, 1], "counts": [0]}


def test_a_vocabulary_is_trained_on_the_training_part_alone(tmp_path):
  config = data(vocabulary=TrainedSentencePiece(290))
  prepared = config.prepare(tmp_path)
  assert prepared.vocabulary.size == 290
  held_out = {id_ for name in ("validation", "test", "judge") for id_ in prepared.splits[name].ids}
  # Texts of the other parts change nothing about the pieces.
  rows = [
    {**row, "chosen": row["chosen"].upper()} if row["id"] in held_out else row for row in ROWS
  ]
  changed = data(rows, vocabulary=TrainedSentencePiece(290)).prepare(tmp_path / "other")
  assert changed.vocabulary.fingerprint() == prepared.vocabulary.fingerprint()
  again = config.prepare(tmp_path)
  np.testing.assert_array_equal(again.splits["train"].prompt, prepared.splits["train"].prompt)


def test_the_key_is_of_the_content_never_of_the_path(tmp_path):
  lines = "\n".join(json.dumps(row) for row in ROWS)
  for folder in ("a", "b"):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "pairs.jsonl").write_text(lines)
  a, b = (PreferenceData(FileSource(f"{tmp_path}/{x}/pairs.jsonl"), 8, 12, BYTES) for x in "ab")
  assert a.key() == b.key()
  assert a.prepare(tmp_path).summary["key"] == a.key()


def test_the_key_tells_everything_else_apart():
  variants = [
    data(),
    data(ROWS[1:]),
    data(vocabulary=TrainedSentencePiece(290)),
    data(truncation="leave_out"),
    data(splits=Splits(0.2, 0.2, 0.2, seed=1)),
    data(demonstrations=RecordsSource(({"prompt": "p", "response": "r"},))),
    dataclasses.replace(data(), prompt_length=9),
    dataclasses.replace(data(), response_length=13),
  ]
  assert len({variant.key() for variant in variants}) == len(variants)


def test_what_is_no_source_is_refused_at_once():
  with pytest.raises(UserError, match=r"PreferenceData\.source is str"):
    PreferenceData("pairs.jsonl", 8, 12, BYTES)
  with pytest.raises(UserError, match="demonstrations is int"):
    data(demonstrations=3)
  with pytest.raises(UserError, match="prompt_length"):
    dataclasses.replace(data(), prompt_length=0)
  with pytest.raises(UserError, match="RecordsSource brings none"):
    data(vocabulary=None).key()


def test_order_and_files_do_not_move_an_example(tmp_path):
  forward, back = data().prepare(tmp_path), data(ROWS[::-1]).prepare(tmp_path)
  for name, part in forward.splits.items():
    assert set(part.ids.tolist()) == set(back.splits[name].ids.tolist())


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason="the HH sample is not here")
def test_hh_goes_through_and_says_what_it_left_out(tmp_path):
  copy = tmp_path / "pairs"
  shutil.copy(HH, copy)
  config = PreferenceData(
    FileSource(str(copy)), 128, 64, TrainedSentencePiece(1000), 0.01, splits=Splits(judge=0.2)
  )
  prepared = config.prepare(tmp_path)
  assert [problem.line for problem in prepared.left_out] == [87, 517, 926, 1104]
  assert sum(prepared.summary["counts"].values()) == 1496
  judge = {t[0] for t in texts(prepared.splits["judge"], prepared.vocabulary)}
  train = {t[0] for t in texts(prepared.splits["train"], prepared.vocabulary)}
  assert len(prepared.splits["judge"]) > 200
  assert judge
  assert train
  with pytest.raises(UserError, match="4 of 1500 records"):
    dataclasses.replace(config, max_bad_fraction=0.0).prepare(tmp_path)
