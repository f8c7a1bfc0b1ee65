"""Preference data as seqio tasks and mixtures, for those whose pipelines speak seqio.

  register("hh_harmless", FileSource(("hh.jsonl.gz",)), vocabulary=ByteVocabulary())
  register("mine", lambda split: my_records(split), vocabulary=..., splits=("train", "validation"))
  register_mixture("both", {"hh_harmless": 1.0, "mine": 0.5})

A task's records go through the same checks and splits as a run's own. Its features are `prompt`
(rank 1, BOS in front) and `responses` (rank 2, EOS on each row, padded to the longest), with
`response_length`, `weight` and the label that the records have: `preference` for pairs (1 where
none is stated), `ranks` or `ratings`. `PreferenceFeatureConverter` makes the shared-prompt batch.

TensorFlow and seqio are imported when a task is built, never with this module.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from rmd_jax.data import readers
from rmd_jax.data.schema import Record
from rmd_jax.data.splits import PARTS, Splits
from rmd_jax.data.validate import read
from rmd_jax.data.vocabulary import (
  ByteVocabulary,
  SentencePieceVocabulary,
  SeqioVocabulary,
  Vocabulary,
)
from rmd_jax.errors import UserError

FIELDS = ("id", "prompt", "chosen", "rejected", "responses", "response")
NUMBERS = ("preference", "ranks", "ratings", "scores", "weight")


def seqio_vocabulary(vocabulary: Vocabulary) -> Any:
  """The seqio object with the same ids.

  Raises:
    UserError: seqio has no such vocabulary.
  """
  import seqio

  if isinstance(vocabulary, SeqioVocabulary):
    return vocabulary.vocabulary
  if isinstance(vocabulary, ByteVocabulary):
    return seqio.ByteVocabulary()
  if isinstance(vocabulary, SentencePieceVocabulary):
    return seqio.SentencePieceVocabulary(vocabulary.path)
  raise UserError(
    f"seqio has no {type(vocabulary).__name__}; register the task with ByteVocabulary, "
    "SentencePieceVocabulary or SeqioVocabulary"
  )


def register(
  name: str,
  source: Any,
  *,
  vocabulary: Vocabulary,
  splits: Splits | Sequence[str] = Splits(),
  max_bad_fraction: float = 0.0,
  shuffle_buffer_size: int | None = 10_000,
) -> Any:
  """Registers a preference task.

  Args:
    name: seqio's name of it.
    source: FileSource, TfdsSource or another source of records; or a function split -> records.
    vocabulary: bytes or SentencePiece.
    splits: of a source, the fractions by the hash of the prompt; of a function, the names that it
      answers to.
    max_bad_fraction: as in `PreferenceData`.
    shuffle_buffer_size: seqio's.

  Returns:
    The seqio task.
  """
  import seqio
  import tensorflow as tf

  if callable(source) and not hasattr(source, "records"):
    if isinstance(splits, Splits):
      raise UserError(f"task {name}: name the splits that the function gives, as ('train',)")
    names = tuple(splits)
    by_split = functools.partial(_of_function, source, max_bad_fraction, name)
  else:
    if not isinstance(splits, Splits):
      raise UserError(f"task {name}: a source is split by fractions; give Splits(...)")
    names = tuple(part for part in PARTS if part == "train" or getattr(splits, part) > 0)
    by_split = functools.partial(_of_source, source, max_bad_fraction, splits)

  inner = seqio_vocabulary(vocabulary)
  plain = functools.partial(seqio.Feature, seqio.PassThroughVocabulary(1), add_eos=False)
  features = {
    "prompt": seqio.Feature(inner, add_eos=False),
    "responses": seqio.Feature(inner, add_eos=True, rank=2),
    "response_length": plain(),
    # Mixtures keep declared features alone, so the labels are declared too.
    "weight": plain(dtype=tf.float32, rank=0),
    "preference": plain(dtype=tf.float32, rank=0, required=False),
    "ranks": plain(required=False),
    "ratings": plain(dtype=tf.float32, required=False),
  }
  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: _dataset(tf, by_split(split)), splits=names
    ),
    preprocessors=[functools.partial(_tokenise, bos=SeqioVocabulary(inner).bos_id)],
    output_features=features,
    metric_fns=[],
    shuffle_buffer_size=shuffle_buffer_size,
  )


def register_mixture(name: str, tasks: Mapping[str, float]) -> Any:
  """Registers a mixture of registered preference tasks, by rate.

  Tasks of one mixture carry the same labels (all of them pairs, say), as seqio interleaves them.
  """
  import seqio

  return seqio.MixtureRegistry.add(name, list(tasks.items()))


@functools.lru_cache(maxsize=4)
def _records(source: Any, max_bad_fraction: float) -> tuple[Record, ...]:
  """A source's records; kept, as seqio asks for each split anew."""
  return tuple(read(source.records(), max_bad_fraction=max_bad_fraction)[0])


def _of_source(source: Any, max_bad_fraction: float, splits: Splits, split: str) -> list[Record]:
  records = _records(source, max_bad_fraction)
  rows = splits.rows([record.prompt for record in records])[split]
  return [records[row] for row in rows]


def _of_function(
  function: Callable[[str], Iterable[Any]], max_bad_fraction: float, name: str, split: str
) -> list[Record]:
  return read(function(split), max_bad_fraction=max_bad_fraction, name=f"{name}/{split}")[0]


def _dataset(tf: Any, records: Sequence[Record]) -> Any:
  """Records as texts, with the label that they have."""
  text = tf.TensorSpec([], tf.string)
  number = tf.TensorSpec([], tf.float32)
  signature = {
    "id": text,
    "prompt": text,
    "responses": tf.TensorSpec([None], tf.string),
    "weight": number,
  }
  first = records[0]
  if first.ranks is not None:
    signature["ranks"] = tf.TensorSpec([None], tf.int32)
  elif first.ratings is not None:
    signature["ratings"] = tf.TensorSpec([None], tf.float32)
  else:
    signature["preference"] = number

  def examples() -> Iterator[dict[str, Any]]:
    for record in records:
      values = {
        "id": record.id.encode(),
        "prompt": record.prompt.encode(),
        "responses": [response.encode() for response in record.responses],
        "weight": record.weight,
        "preference": 1.0 if record.preference is None else record.preference,
        "ranks": record.ranks,
        "ratings": record.ratings,
      }
      yield {key: values[key] for key in signature}

  return tf.data.Dataset.from_generator(examples, output_signature=signature)


def _tokenise(
  dataset: Any, sequence_length: Mapping[str, Any] | None, output_features: Any, *, bos: int
) -> Any:
  """Texts to tokens; the truncation of `tokenise.tokenise`, which seqio's own trimming is not.

  seqio cuts the tail of every feature: a prompt would lose its question, a response its EOS. So the
  cut is made here, to the lengths that seqio then finds nothing to cut from.
  """
  import tensorflow as tf

  lengths = sequence_length or {}
  prompt_length = lengths.get("prompt")
  shape = lengths.get("responses")
  response_length = shape if shape is None or isinstance(shape, int) else shape[-1]
  most = None if shape is None or isinstance(shape, int) else shape[0]
  vocabulary = output_features["prompt"].vocabulary
  eos = tf.constant([vocabulary.eos_id], tf.int32)

  def prompt_ids(text: Any) -> Any:
    ids = vocabulary.encode_tf(text)
    if prompt_length is not None:
      ids = ids[tf.maximum(0, tf.size(ids) - (prompt_length - 1)) :]
    return tf.concat([tf.constant([bos], tf.int32), ids], 0)

  def response_ids(text: Any) -> Any:
    ids = vocabulary.encode_tf(text)
    if response_length is not None:
      ids = ids[: response_length - 1]
    return tf.concat([ids, eos], 0)

  def convert(example: Mapping[str, Any]) -> dict[str, Any]:
    if most is not None:  # seqio would drop the last ones without a word
      message = f"a record has more than the {most} responses of task_feature_lengths"
      tf.debugging.assert_less_equal(tf.shape(example["responses"])[0], most, message)
    ragged = tf.map_fn(
      response_ids,
      example["responses"],
      fn_output_signature=tf.RaggedTensorSpec([None], tf.int32),
    )
    return {
      **example,
      "prompt": prompt_ids(example["prompt"]),
      "prompt_pretokenized": example["prompt"],
      "responses": ragged.to_tensor(default_value=vocabulary.pad_id),
      "responses_pretokenized": example["responses"],
      "response_length": tf.cast(ragged.row_lengths(), tf.int32),
    }

  return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


@functools.cache
def feature_converter() -> type:
  """`PreferenceFeatureConverter`, a seqio.FeatureConverter; a function as it subclasses seqio's.

  It takes task_feature_lengths {"prompt": P, "responses": (N, R)} and gives the fields of `Batch`:
  prompt [P], prompt_length [], responses [N, R], response_length [N], response_mask [N, R],
  weight [], and the labels named in `labels`. Responses a record lacks have length 0; a record of
  more than N is an error.
  """
  import seqio
  import tensorflow as tf

  spec = seqio.FeatureConverter.FeatureSpec

  class PreferenceFeatureConverter(seqio.FeatureConverter):
    """Task features to the shared-prompt batch."""

    TASK_FEATURES: ClassVar[dict[str, Any]] = {
      "prompt": spec(dtype=tf.int32),
      "responses": spec(dtype=tf.int32, rank=2, sequence_dim=1),
      "response_length": spec(dtype=tf.int32),
      "weight": spec(dtype=tf.float32, rank=0),
    }
    MODEL_FEATURES: ClassVar[dict[str, Any]] = {
      "prompt": spec(dtype=tf.int32),
      "prompt_length": spec(dtype=tf.int32, rank=0),
      "responses": spec(dtype=tf.int32, rank=2, sequence_dim=1),
      "response_length": spec(dtype=tf.int32),
      "response_mask": spec(dtype=tf.bool, rank=2, sequence_dim=1),
      "weight": spec(dtype=tf.float32, rank=0),
    }
    PACKING_FEATURE_DTYPES: ClassVar[dict[str, Any]] = {}
    LABELS: ClassVar[dict[str, Any]] = {
      "preference": spec(dtype=tf.float32, rank=0),
      "ranks": spec(dtype=tf.int32),
      "ratings": spec(dtype=tf.float32),
    }

    def __init__(self, labels: Sequence[str] = ()) -> None:
      unknown = set(labels) - set(self.LABELS)
      if unknown:
        raise UserError(f"unknown labels {sorted(unknown)}; give some of {', '.join(self.LABELS)}")
      self.labels = tuple(labels)
      labelled = {name: self.LABELS[name] for name in self.labels}
      self.MODEL_FEATURES = {**self.MODEL_FEATURES, **labelled}  # type: ignore[misc]
      super().__init__(pack=False)

    def __call__(self, ds: Any, task_feature_lengths: Mapping[str, Any]) -> Any:
      # seqio wants a length for every feature and checks one dimension of each, so N goes beside.
      shape = task_feature_lengths["responses"]
      if isinstance(shape, int) or len(shape) != 2:
        raise UserError(f'task_feature_lengths["responses"] is {shape!r}; give (N, R)')
      self.responses, tokens = shape
      lengths = {**task_feature_lengths, "responses": tokens}
      return super().__call__(ds, {"response_length": shape[0], "weight": 1, **lengths})

    def _convert_features(self, ds: Any, task_feature_lengths: Mapping[str, int]) -> Any:
      p, r = task_feature_lengths["prompt"], task_feature_lengths["responses"]
      n = self.responses

      def pad(values: Any, shape: Sequence[int]) -> Any:
        missing = [[0, size - tf.shape(values)[axis]] for axis, size in enumerate(shape)]
        padded = tf.pad(values, missing)
        padded.set_shape(shape)
        return padded

      def convert(example: Mapping[str, Any]) -> dict[str, Any]:
        lengths = pad(example["response_length"], [n])
        features = {
          "prompt": pad(example["prompt"], [p]),
          "prompt_length": tf.size(example["prompt"]),
          "responses": pad(example["responses"], [n, r]),
          "response_length": lengths,
          "response_mask": tf.range(r)[None] < lengths[:, None],
          "weight": example["weight"],
        }
        for name in self.labels:
          value = example[name]
          features[name] = value if name == "preference" else pad(value, [n])
        return features

      return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
      p, r = task_feature_lengths["prompt"], task_feature_lengths["responses"]
      lengths = {"prompt": p, "responses": r, "response_mask": r, "prompt_length": 1, "weight": 1}
      lengths["response_length"] = self.responses
      return {**lengths, **dict.fromkeys(self.labels, self.responses)}

  return PreferenceFeatureConverter


def raw_examples(name: str, split: str) -> Iterator[dict[str, Any]]:
  """The records of a registered task or mixture, as text, in a fixed order.

  Text is taken from FIELD_pretokenized, or from FIELD where it is text, or by decoding its tokens.

  Raises:
    UserError: unknown task or split, or no field that is known.
  """
  import seqio

  known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if name not in known:
    raise UserError(
      f"seqio has no task or mixture {name!r}; load the module that registers it with "
      "--module=package.module, or mend the name"
    )
  provider = seqio.get_mixture_or_task(name)
  if split not in provider.splits:
    raise UserError(f"{name} has no split {split!r}; it has {', '.join(provider.splits)}")
  kept = {"copy_pretokenized": True, "passthrough_features": ["id"]}
  dataset = provider.get_dataset(
    sequence_length=None,
    split=split,
    shuffle=False,
    num_epochs=1,
    **(kept if isinstance(provider, seqio.Mixture) else {}),
  )
  for example in dataset.as_numpy_iterator():
    raw = {field: value for field in NUMBERS if (value := example.get(field)) is not None}
    for field in FIELDS:
      text = _text(example, field, provider.output_features)
      if text is not None:
        raw[field] = text
    if not raw.keys() & {"chosen", "responses", "response"}:
      raise UserError(
        f"{name} has the features {', '.join(sorted(example))}; a preference task has prompt and "
        "chosen, rejected or responses"
      )
    yield raw


def _text(example: Mapping[str, Any], field: str, features: Mapping[str, Any]) -> Any:
  kept = example.get(f"{field}_pretokenized", example.get(field))
  if kept is None:
    return None
  value = readers.plain_value(kept)
  first = value[0] if isinstance(value, list) and value else value
  if isinstance(first, str):
    return value
  if field not in features:
    return None
  decode = SeqioVocabulary(features[field].vocabulary).decode
  return [decode(row) for row in value] if isinstance(first, list) else decode(value)
