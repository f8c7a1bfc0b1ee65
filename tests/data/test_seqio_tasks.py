"""Tasks and mixtures in seqio give the columns that a run's own tokeniser gives."""

import json
import subprocess
import sys

import numpy as np
import pytest

from rmd_jax.data import seqio_tasks
from rmd_jax.data.readers import FileSource, RecordsSource, SeqioSource
from rmd_jax.data.splits import Splits
from rmd_jax.data.tokenise import tokenise
from rmd_jax.data.validate import read
from rmd_jax.data.vocabulary import ByteVocabulary, WordVocabulary, train_sentencepiece
from rmd_jax.errors import UserError

ROWS = tuple(
  {
    "prompt": "question " * (i % 4) + str(i),
    "chosen": "answer " * (1 + i % 5),
    "rejected": f"no {i}",
    "preference": 0.25 + i / 100,
    "weight": 1.0 + i,
    "id": f"r{i}",
  }
  for i in range(40)
)
LENGTHS = {"prompt": 16, "responses": (3, 20)}
ALL = Splits(0.0, 0.0)


def test_the_module_loads_neither_seqio_nor_tensorflow():
  code = (
    "import sys; import rmd_jax.data.seqio_tasks, rmd_jax.data.preference_data;"
    "print({'seqio', 'tensorflow', 'pyarrow', 'sentencepiece'} & set(sys.modules))"
  )
  ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert ran.stdout.strip() == "set()"


@pytest.mark.slow
def test_words_are_no_seqio_vocabulary():
  pytest.importorskip("seqio")
  with pytest.raises(UserError, match="seqio has no WordVocabulary"):
    seqio_tasks.seqio_vocabulary(WordVocabulary(("a",)))


@pytest.fixture
def seqio():
  module = pytest.importorskip("seqio")
  yield module
  for registry in (module.TaskRegistry, module.MixtureRegistry):
    for name in [name for name in registry.names() if name.startswith("rmd_test_")]:
      registry.remove(name)


def examples(seqio, name, split="train", labels=(), lengths=LENGTHS):
  dataset = seqio.get_dataset(
    name,
    task_feature_lengths=lengths,
    dataset_split=split,
    shuffle=False,
    feature_converter=seqio_tasks.feature_converter()(labels=labels),
  )
  return list(dataset.as_numpy_iterator())


def assert_columns(converted, expected):
  assert len(converted) == len(expected)
  for row, example in enumerate(converted):
    for name, value in example.items():
      np.testing.assert_array_equal(value, getattr(expected, name)[row], err_msg=name)


def own(rows, vocabulary, n=3):
  records, _ = read(rows, max_bad_fraction=0.0)
  return tokenise(records, vocabulary, prompt_length=16, response_length=20, responses=n).dataset


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_file_as_a_task_gives_our_columns(seqio, tmp_path, kind):
  path = tmp_path / "pairs.jsonl"
  path.write_text("\n".join(json.dumps(row) for row in ROWS))
  vocabulary = ByteVocabulary()
  if kind == "pieces":
    texts = [row["prompt"] + " " + row["chosen"] for row in ROWS]
    vocabulary = train_sentencepiece(texts, 284, tmp_path / "sp.model")
  seqio_tasks.register("rmd_test_file", FileSource(str(path)), vocabulary=vocabulary, splits=ALL)
  converted = examples(seqio, "rmd_test_file", labels=("preference",))
  assert set(converted[0]) == {
    "prompt",
    "prompt_length",
    "responses",
    "response_length",
    "response_mask",
    "weight",
    "preference",
  }
  assert converted[0]["responses"].shape == (3, 20)
  expected = own(ROWS, vocabulary)
  assert expected.prompt_length.max() == 16 or kind == "pieces"  # some are truncated
  assert_columns(converted, expected)


@pytest.mark.slow
def test_splits_are_those_of_a_run(seqio):
  splits = Splits(0.2, 0.2, 0.2)
  seqio_tasks.register(
    "rmd_test_splits", RecordsSource(ROWS), vocabulary=ByteVocabulary(), splits=splits
  )
  rows = splits.rows([row["prompt"] for row in ROWS])
  for split in ("train", "validation", "test", "judge"):
    weights = [example["weight"] for example in examples(seqio, "rmd_test_splits", split)]
    assert weights == [ROWS[row]["weight"] for row in rows[split]]


@pytest.mark.slow
def test_ranked_groups_from_a_function(seqio):
  groups = [
    {"prompt": f"p{i}", "responses": list("abc"[: 2 + i % 2]), "ranks": [1, 0, 2][: 2 + i % 2]}
    for i in range(6)
  ]
  seqio_tasks.register(
    "rmd_test_function",
    lambda split: groups if split == "train" else groups[:1],
    vocabulary=ByteVocabulary(),
    splits=("train", "validation"),
  )
  converted = examples(seqio, "rmd_test_function", labels=("ranks",))
  assert_columns(converted, own(groups, ByteVocabulary()))
  assert converted[0]["response_length"].tolist() == [2, 2, 0]
  assert len(examples(seqio, "rmd_test_function", "validation")) == 1
  with pytest.raises(Exception, match="more than the 2 responses"):
    examples(seqio, "rmd_test_function", lengths={"prompt": 16, "responses": (2, 20)})
  with pytest.raises(UserError, match=r"give \(N, R\)"):
    examples(seqio, "rmd_test_function", lengths={"prompt": 16, "responses": 20})


@pytest.mark.slow
def test_a_mixture_keeps_labels_and_weights(seqio):
  for name, rows in (("rmd_test_a", ROWS[:20]), ("rmd_test_b", ROWS[20:])):
    seqio_tasks.register(name, RecordsSource(rows), vocabulary=ByteVocabulary(), splits=ALL)
  seqio_tasks.register_mixture("rmd_test_mixture", {"rmd_test_a": 1.0, "rmd_test_b": 1.0})
  converted = examples(seqio, "rmd_test_mixture", labels=("preference",))
  expected = {row["weight"]: row["preference"] for row in ROWS}
  assert len(converted) > 20
  for example in converted:
    assert example["preference"] == np.float32(expected[float(example["weight"])])


@pytest.mark.slow
@pytest.mark.parametrize("through", ["task", "mixture"])
def test_a_registered_task_is_a_source_of_the_same_records(seqio, through):
  name = f"rmd_test_{through}"
  seqio_tasks.register(
    "rmd_test_task", RecordsSource(ROWS), vocabulary=ByteVocabulary(), splits=ALL
  )
  if through == "mixture":
    seqio_tasks.register_mixture(name, {"rmd_test_task": 1.0})
  source = SeqioSource(name, "train")
  records, problems = read(source.records(), max_bad_fraction=0.0)
  direct, _ = read(ROWS, max_bad_fraction=0.0)
  assert problems == []
  assert [(r.prompt, set(r.responses), r.id) for r in records] == [
    (r.prompt, set(r.responses), r.id) for r in direct
  ]
  for record, row in zip(records, ROWS, strict=True):
    wins = record.preference if record.responses[0] == row["chosen"] else 1 - record.preference
    assert wins == pytest.approx(row["preference"], abs=1e-6)
    assert record.weight == row["weight"]
  assert records[0].file == f"seqio:{name}/train"
  assert source.fingerprint() == source.fingerprint()


@pytest.mark.slow
def test_a_task_of_somebody_else_is_read_from_its_tokens(seqio):
  import tensorflow as tf

  def dataset(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices(
      {"prompt": ["q", "r"], "chosen": ["good", "fine"], "rejected": ["bad", "poor"]}
    )

  features = {
    name: seqio.Feature(seqio.ByteVocabulary()) for name in ("prompt", "chosen", "rejected")
  }
  seqio.TaskRegistry.add(
    "rmd_test_foreign",
    source=seqio.FunctionDataSource(dataset, splits=["train"]),
    preprocessors=[
      lambda ds, output_features: seqio.preprocessors.tokenize(
        ds, output_features, copy_pretokenized=False
      ),
      seqio.preprocessors.append_eos,
    ],
    output_features=features,
    metric_fns=[],
  )
  records, _ = read(SeqioSource("rmd_test_foreign", "train").records(), max_bad_fraction=0.0)
  assert [(r.prompt, *r.responses) for r in records] == [
    ("q", "good", "bad"),
    ("r", "fine", "poor"),
  ]


@pytest.mark.slow
def test_names_that_seqio_does_not_know(seqio):
  with pytest.raises(UserError, match="no task or mixture 'absent'"):
    list(SeqioSource("absent", "train").records())
  seqio_tasks.register("rmd_test_x", RecordsSource(ROWS), vocabulary=ByteVocabulary(), splits=ALL)
  with pytest.raises(UserError, match="has no split 'test'; it has train"):
    list(SeqioSource("rmd_test_x", "test").records())
  with pytest.raises(UserError, match="name the splits"):
    seqio_tasks.register("rmd_test_y", lambda split: [], vocabulary=ByteVocabulary())
  with pytest.raises(UserError, match="unknown labels"):
    seqio_tasks.feature_converter()(labels=("rank",))
