"""Vocabularies: text to token ids and back.

All are frozen dataclasses with `size`, `pad_id`, `bos_id`, `eos_id`, `encode` (no BOS, no EOS),
`encode_batch`, `decode` (special ids left out) and `fingerprint`. Padding is told from tokens by
length, never by id, so pad, BOS and EOS may share ids.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int

from rmd_jax.errors import UserError


@runtime_checkable
class Vocabulary(Protocol):
  """What the pipeline asks of a vocabulary."""

  @property
  def size(self) -> int:
    """Number of ids."""

  @property
  def pad_id(self) -> int:
    """Fills columns; never read."""

  @property
  def bos_id(self) -> int:
    """Begins a prompt."""

  @property
  def eos_id(self) -> int:
    """Ends a response."""

  def encode(self, text: str) -> list[int]:
    """Token ids, without BOS and EOS."""

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Text of the ids; special ids give nothing."""

  def fingerprint(self) -> str:
    """Hash of everything that decides which ids a text gets."""


def encode_batch(vocabulary: Vocabulary, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
  """Token ids of many texts; by the vocabulary's own batch method where it has one."""
  own = getattr(vocabulary, "encode_batch", None)
  if own is not None:
    return own(texts)
  return [np.asarray(vocabulary.encode(text), np.int32) for text in texts]


def _hash(*parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
  """UTF-8 bytes, with seqio's and ByT5's ids: 0 padding, 1 EOS, 2 unknown, byte + 3.

  As T5's decoder starts with padding, so a prompt does here: BOS is id 0.
  """

  pad_id: int = dataclasses.field(default=0, init=False)
  bos_id: int = dataclasses.field(default=0, init=False)
  eos_id: int = dataclasses.field(default=1, init=False)

  @property
  def size(self) -> int:
    """Number of ids."""
    return 259

  def encode(self, text: str) -> list[int]:
    """One id a byte."""
    return [byte + 3 for byte in text.encode("utf-8")]

  def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
    """`encode` of each text."""
    return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + 3 for text in texts]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Text; bytes that are no UTF-8 (a model wrote them) show as U+FFFD."""
    kept = (int(i) - 3 for i in ids)
    return bytes(byte for byte in kept if 0 <= byte < 256).decode("utf-8", "replace")

  def fingerprint(self) -> str:
    """The same for every instance."""
    return _hash("bytes", self.size, self.bos_id, self.eos_id)


@dataclasses.dataclass(frozen=True)
class WordVocabulary:
  """Words between white space: for small worlds whose texts are to be read.

  Attributes:
    words: id 3 on; 0 is padding, 1 BOS, 2 EOS.
  """

  words: tuple[str, ...]
  pad_id: int = dataclasses.field(default=0, init=False)
  bos_id: int = dataclasses.field(default=1, init=False)
  eos_id: int = dataclasses.field(default=2, init=False)

  def __post_init__(self) -> None:
    if len(set(self.words)) < len(self.words):
      raise UserError("vocabulary: a word is there twice; remove one")
    for word in self.words:
      if word.split() != [word]:
        raise UserError(f"vocabulary: {word!r} is no word; words hold no white space")

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {word: i for i, word in enumerate(self.words, 3)}

  @property
  def size(self) -> int:
    """Number of ids."""
    return 3 + len(self.words)

  def encode(self, text: str) -> list[int]:
    """One id a word.

    Raises:
      UserError: a word that the vocabulary lacks.
    """
    try:
      return [self._ids[word] for word in text.split()]
    except KeyError as error:
      raise UserError(
        f"word {error.args[0]!r} is not in the vocabulary of {len(self.words)} words; "
        "use another vocabulary, or mend the text"
      ) from None

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Words with a space between; special ids and ids beyond the vocabulary give nothing."""
    kept = (int(i) - 3 for i in ids)
    return " ".join(self.words[i] for i in kept if 0 <= i < len(self.words))

  def fingerprint(self) -> str:
    """A hash of the words in their order."""
    return _hash("words", *self.words)


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary:
  """A SentencePiece model file.

  A model without BOS starts its prompts with the padding id, as T5 does; one without padding pads
  with its EOS (the id is never read).

  Attributes:
    path: the .model file.
  """

  path: str

  @functools.cached_property
  def _model(self) -> bytes:
    try:
      return Path(self.path).read_bytes()
    except OSError as error:
      raise UserError(f"vocabulary: cannot read {self.path}: {error.strerror}") from error

  @functools.cached_property
  def _processor(self) -> Any:
    import sentencepiece

    try:
      processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
    except RuntimeError as error:
      raise UserError(f"vocabulary: {self.path} is no SentencePiece model ({error})") from error
    if processor.eos_id() < 0:
      raise UserError(f"vocabulary: {self.path} has no EOS; train it with eos_id set")
    return processor

  @property
  def size(self) -> int:
    """Number of pieces."""
    return self._processor.vocab_size()

  @property
  def eos_id(self) -> int:
    """The model's EOS."""
    return self._processor.eos_id()

  @property
  def pad_id(self) -> int:
    """The model's padding, or EOS where it has none."""
    pad = self._processor.pad_id()
    return pad if pad >= 0 else self.eos_id

  @property
  def bos_id(self) -> int:
    """The model's BOS, or padding where it has none."""
    bos = self._processor.bos_id()
    return bos if bos >= 0 else self.pad_id

  def encode(self, text: str) -> list[int]:
    """Pieces of one text."""
    return self._processor.encode(text)

  def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
    """`encode` of each text."""
    return [np.asarray(ids, np.int32) for ids in self._processor.encode(list(texts))]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Text; special ids and ids beyond the model give nothing."""
    processor = self._processor
    kept = (int(i) for i in ids)
    return processor.decode(
      [i for i in kept if 0 <= i < processor.vocab_size() and not processor.is_control(i)]
    )

  def fingerprint(self) -> str:
    """A hash of the model's bytes."""
    return hashlib.sha256(self._model).hexdigest()[:32]


def train_sentencepiece(
  texts: Iterable[str], size: int, path: str | Path
) -> SentencePieceVocabulary:
  """Trains a unigram model that gives every text back exactly, and writes it to `path`.

  Ids 0 to 3 are padding, EOS, unknown, BOS; characters outside the model become bytes.

  Raises:
    UserError: the texts are too few for `size` pieces.
  """
  import sentencepiece

  lines = [line for text in texts for line in text.split("\n") if line]
  if not lines:
    raise UserError("vocabulary: no text to train SentencePiece on")
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      vocab_size=size,
      model_type="unigram",
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=3,
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      max_sentence_length=1 << 20,
      num_threads=1,  # the same pieces wherever it is trained
      minloglevel=2,
    )
  except (RuntimeError, OSError) as error:
    reason = str(error).splitlines()[-1]
    raise UserError(
      f"vocabulary: SentencePiece cannot learn {size} pieces from {len(lines)} lines: {reason}\n"
      "Change the size as it says (256 bytes and 4 special pieces are always in), or use bytes."
    ) from error
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  Path(path).write_bytes(model.getvalue())
  return SentencePieceVocabulary(str(path))


@dataclasses.dataclass(frozen=True)
class TrainedSentencePiece:
  """A SentencePiece model to be trained on the training split and kept in the run directory.

  Attributes:
    size: number of pieces.
  """

  size: int

  def train(self, texts: Sequence[str], directory: Path) -> SentencePieceVocabulary:
    """The model trained on `texts`; the one in `directory`, if it was trained on the same.

    A run that goes on must keep its pieces, so a kept model is never trained anew.
    """
    path = directory / "sentencepiece.model"
    note = directory / "sentencepiece.json"
    digest = hashlib.sha256()
    for text in texts:
      digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    wanted = {"size": self.size, "texts": digest.hexdigest()}
    if path.exists() and note.exists():
      kept = json.loads(note.read_text())
      model = hashlib.sha256(path.read_bytes()).hexdigest()
      if kept == {**wanted, "model": model}:
        return SentencePieceVocabulary(str(path))
    trained = train_sentencepiece(texts, self.size, path)
    model = hashlib.sha256(path.read_bytes()).hexdigest()
    note.write_text(json.dumps({**wanted, "model": model}) + "\n")
    return trained

  def fingerprint(self) -> str:
    """A hash of the settings; the texts are in the data's own fingerprint."""
    return _hash("trained sentencepiece", self.size)


@dataclasses.dataclass(frozen=True)
class SeqioVocabulary:
  """A seqio vocabulary.

  Attributes:
    vocabulary: the seqio object.
  """

  vocabulary: Any

  @property
  def size(self) -> int:
    """Number of ids, seqio's extra ids included."""
    return self.vocabulary.vocab_size

  @property
  def pad_id(self) -> int:
    """seqio's padding, 0."""
    return self.vocabulary.pad_id

  @property
  def eos_id(self) -> int:
    """seqio's EOS.

    Raises:
      UserError: it has none.
    """
    if self.vocabulary.eos_id is None or self.vocabulary.eos_id < 0:
      raise UserError(f"vocabulary: {self.vocabulary!r} has no EOS; use one that has")
    return self.vocabulary.eos_id

  @property
  def bos_id(self) -> int:
    """seqio's BOS, or padding where it has none, as T5's decoder starts."""
    try:
      bos = self.vocabulary.bos_id
    except NotImplementedError:  # seqio's base class: most vocabularies name no BOS
      bos = None
    return self.pad_id if bos is None or bos < 0 else bos

  def encode(self, text: str) -> list[int]:
    """seqio's ids, without EOS."""
    return list(self.vocabulary.encode(text))

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """seqio's text of the ids that are not special."""
    special = {self.pad_id, self.eos_id, self.bos_id}
    return self.vocabulary.decode([int(i) for i in ids if int(i) not in special])

  def fingerprint(self) -> str:
    """A hash of the kind, the size, and the SentencePiece model, or else of a text's ids."""
    model = getattr(self.vocabulary, "sp_model", None)
    probe = bytes(range(32, 127)).decode()  # a repr may hold an address, which no hash may
    content = hashlib.sha256(model).hexdigest() if model else self.encode(probe)
    return _hash("seqio", type(self.vocabulary).__name__, self.size, content)
