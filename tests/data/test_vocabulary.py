"""Vocabularies: ids, texts given back, and hashes of what decides them."""

import dataclasses
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmd_jax.data.vocabulary import (
  ByteVocabulary,
  SentencePieceVocabulary,
  SeqioVocabulary,
  TrainedSentencePiece,
  Vocabulary,
  WordVocabulary,
  encode_batch,
  train_sentencepiece,
)
from rmd_jax.errors import UserError


@pytest.fixture(scope="module")
def texts():
  draw = random.Random(0)
  syllables = ["ba", "cor", "da", "fe", "gim", "ho", "ka", "lu", "mon", "ni", "po", "res", "tu"]
  words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(200)]
  return [f"\n\nHuman: {' '.join(draw.choices(words, k=12))}?\n\nAssistant:" for _ in range(300)]


@pytest.fixture(scope="module")
def pieces(texts, tmp_path_factory):
  return train_sentencepiece(texts, 320, tmp_path_factory.mktemp("sp") / "test.model")


def test_bytes_have_the_ids_of_seqio_and_byt5():
  vocabulary = ByteVocabulary()
  assert vocabulary.encode("aé") == [100, 198, 172]
  assert (vocabulary.size, vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id) == (
    259,
    0,
    0,
    1,
  )
  assert vocabulary.decode([0, 100, 198, 172, 1, 0]) == "aé"
  assert vocabulary.decode([100, 198]) == "a\ufffd"
  assert vocabulary.decode([100, 9999]) == "a"


@settings(deadline=None)
@given(st.text())
def test_bytes_give_every_text_back(text):
  vocabulary = ByteVocabulary()
  ids = vocabulary.encode(text)
  assert vocabulary.decode(ids) == text
  assert vocabulary.encode_batch([text])[0].tolist() == ids


def test_words():
  vocabulary = WordVocabulary(("yes", "no"))
  assert vocabulary.size == 5
  assert vocabulary.encode(" no  yes ") == [4, 3]
  assert vocabulary.decode([1, 4, 3, 2, 0, 99]) == "no yes"
  assert len({vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id}) == 3
  with pytest.raises(UserError, match="'maybe' is not in the vocabulary"):
    vocabulary.encode("yes maybe")
  with pytest.raises(UserError, match="twice"):
    WordVocabulary(("a", "a"))
  with pytest.raises(UserError, match="no word"):
    WordVocabulary(("a b",))


def test_pieces_give_texts_back_with_their_white_space(pieces):
  for text in ["the cat", " the  cat ", "a\n\nb\n", "naïve 漢字 🙂", "Human: x"]:
    assert pieces.decode(pieces.encode(text)) == text


def test_pieces_of_two_texts_are_the_two_texts(pieces):
  # No space comes in at the boundary of prompt and response, which are tokenised apart.
  assert pieces.decode(pieces.encode("Human: ba") + pieces.encode("cor")) == "Human: bacor"
  assert len(pieces.encode("a\nb")) == len(pieces.encode("a")) + 1 + len(pieces.encode("b"))


def test_pieces_have_their_special_ids(pieces, texts):
  assert (pieces.size, pieces.pad_id, pieces.eos_id, pieces.bos_id) == (320, 0, 1, 3)
  ids = pieces.encode(texts[0])
  assert max(ids) < 320
  assert len(ids) < len(texts[0].encode())
  assert pieces.decode([3, *ids, 1, 0, 5000]) == texts[0]


def test_a_batch_is_one_text_after_the_other(pieces, texts):
  for vocabulary in (pieces, ByteVocabulary()):
    for ids, text in zip(encode_batch(vocabulary, texts[:5]), texts[:5], strict=True):
      assert ids.tolist() == vocabulary.encode(text)
      assert ids.dtype == np.int32


def test_training_twice_gives_the_same_pieces(texts, pieces, tmp_path):
  again = train_sentencepiece(texts, 320, tmp_path / "again.model")
  assert again.fingerprint() == pieces.fingerprint()
  other = train_sentencepiece(texts[:150], 300, tmp_path / "other.model")
  assert other.fingerprint() != pieces.fingerprint()


def test_pieces_that_cannot_be_learnt(texts, tmp_path):
  with pytest.raises(UserError, match="cannot learn 50000 pieces"):
    train_sentencepiece(texts[:2], 50_000, tmp_path / "x.model")
  with pytest.raises(UserError, match="no text"):
    train_sentencepiece(["\n"], 300, tmp_path / "x.model")
  assert not (tmp_path / "x.model").exists()


def test_models_that_are_none(tmp_path):
  with pytest.raises(UserError, match="cannot read"):
    SentencePieceVocabulary(str(tmp_path / "absent.model")).encode("a")
  (tmp_path / "bad.model").write_bytes(b"rubbish")
  with pytest.raises(UserError, match="no SentencePiece model"):
    SentencePieceVocabulary(str(tmp_path / "bad.model")).encode("a")


def test_a_model_without_bos_or_padding_still_begins_and_pads(texts, tmp_path):
  import sentencepiece

  prefix = str(tmp_path / "llama")
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter("".join(texts).split("\n")),
    model_prefix=prefix,
    vocab_size=60,
    pad_id=-1,
    bos_id=-1,
    eos_id=1,
    unk_id=0,
    minloglevel=2,
  )
  vocabulary = SentencePieceVocabulary(prefix + ".model")
  assert (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id) == (1, 1, 1)


def test_a_kept_model_is_used_again_and_another_text_is_not_taken_for_it(texts, tmp_path):
  config = TrainedSentencePiece(320)
  first = config.train(texts, tmp_path)
  stamp = (tmp_path / "sentencepiece.model").stat().st_mtime_ns
  assert config.train(texts, tmp_path) == first
  assert (tmp_path / "sentencepiece.model").stat().st_mtime_ns == stamp
  fingerprint = first.fingerprint()
  changed = config.train(texts[:200], tmp_path)
  assert changed.fingerprint() != fingerprint


def test_a_kept_model_that_was_damaged_is_trained_anew(texts, tmp_path):
  config = TrainedSentencePiece(320)
  fingerprint = config.train(texts, tmp_path).fingerprint()
  model = tmp_path / "sentencepiece.model"
  model.write_bytes(model.read_bytes()[:-10])
  assert config.train(texts, tmp_path).fingerprint() == fingerprint
  assert json.loads((tmp_path / "sentencepiece.json").read_text())["size"] == 320


def test_fingerprints_tell_vocabularies_apart(pieces):
  found = {
    ByteVocabulary().fingerprint(),
    WordVocabulary(("a", "b")).fingerprint(),
    WordVocabulary(("b", "a")).fingerprint(),
    pieces.fingerprint(),
    TrainedSentencePiece(300).fingerprint(),
    TrainedSentencePiece(301).fingerprint(),
  }
  assert len(found) == 6
  moved = dataclasses.replace(pieces)
  assert moved.fingerprint() == pieces.fingerprint()


def test_all_of_them_are_vocabularies(pieces):
  for vocabulary in (ByteVocabulary(), WordVocabulary(("a",)), pieces):
    assert isinstance(vocabulary, Vocabulary)
    hash(vocabulary)


@pytest.mark.slow
def test_ids_are_those_of_seqio(pieces):
  import seqio

  texts = ["", "abc", "naïve 漢字 🙂\n\nHuman:", " x  y "]
  for ours, theirs in (
    (ByteVocabulary(), seqio.ByteVocabulary()),
    (pieces, seqio.SentencePieceVocabulary(pieces.path)),
  ):
    wrapped = SeqioVocabulary(theirs)
    for text in texts:
      assert ours.encode(text) == list(theirs.encode(text))
      assert ours.encode(text) == theirs.encode_tf(text).numpy().tolist()
      assert wrapped.decode([wrapped.bos_id, *wrapped.encode(text), wrapped.eos_id]) == text
    assert ours.size == theirs.vocab_size == wrapped.size
    assert (ours.pad_id, ours.eos_id, ours.bos_id) == (
      wrapped.pad_id,
      wrapped.eos_id,
      wrapped.bos_id,
    )
    assert isinstance(wrapped, Vocabulary)
    again = SeqioVocabulary(type(theirs)(*([pieces.path] if ours is pieces else [])))
    assert wrapped.fingerprint() == again.fingerprint()
  with pytest.raises(UserError, match="has no EOS"):
    _ = SeqioVocabulary(seqio.PassThroughVocabulary(10)).eos_id
