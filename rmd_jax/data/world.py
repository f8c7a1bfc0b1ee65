"""The synthetic world: reports, summaries of them, and a judge whose taste is known in closed form.

Ground truth is what real preference data lack: here a policy's reward is exact, labels can be as
noisy or as biased towards length as an experiment needs, and a model of 0.2M parameters learns
the task in minutes on a laptop. Everything drawn is a function of the seed by our own hash, so that
neither an upgrade of NumPy nor a larger `pairs` changes an example.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rmd_jax.data import hashing, subsets, world_words
from rmd_jax.data.vocabulary import WordVocabulary
from rmd_jax.errors import UserError

Record = dict[str, Any]
Policy = Callable[[Sequence[str], int, int], list[list[str]]]
"""policy(prompts, samples, seed) -> `samples` responses for each prompt."""

FACTS = 6  # stated in each report, as many of each importance
VERSION = 1  # raise it when an example of an unchanged seed changes: run directories depend on it
_SENSATION = 0.1  # fraction of the stated facts that are sensational
_CHUNK = 256  # candidates drawn at once; part of what a seed means
_MAX_WORDS = 19  # of a summary: 20 tokens with EOS; prompt and summary have 49 together
_MAX_SENTENCES = 5


@dataclasses.dataclass(frozen=True)
class Oracle:
  """The world's judge: a sum over what a summary gets right and wrong.

  score = Σ weight of each stated fact that is covered (once)
        + false · claims that the report does not make + repeated · claims made again
        + misplaced · words that break the grammar + word · number of words.

  With the default numbers a fact is worth more than the words that it takes, and length alone is
  worth little: the preference for long summaries is mostly one for complete ones.
  """

  vital: float = 1.0
  useful: float = 0.7
  minor: float = 0.5
  false: float = -0.7
  repeated: float = -0.5
  misplaced: float = -0.25
  word: float = 0.02

  def score(self, prompt: str, response: str) -> float:
    """The score of one summary."""
    return float(self.scores([prompt], [response])[0])

  def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, " M"]:
    """The scores of M summaries, float64; any text has one."""
    counts = self.count(prompts, responses)
    weights = dataclasses.asdict(self)
    return sum(weights[name] * count for name, count in counts.items())

  def count(
    self, prompts: Sequence[str], responses: Sequence[str]
  ) -> dict[str, Int[np.ndarray, " M"]]:
    """What the score is a sum of, for M summaries, under the names of the oracle's fields."""
    if len(prompts) != len(responses):
      raise ValueError(f"oracle: {len(prompts)} prompts for {len(responses)} responses")
    rows = world_words.numbers(responses)
    importance, covered, false, repeated = _judge(world_words.numbers(prompts), rows)
    counts = {
      name: (covered & (importance == rank)).sum(1)
      for rank, name in enumerate(world_words.IMPORTANCES)
    }
    return counts | {
      "false": false.sum(1),
      "repeated": repeated.sum(1),
      "misplaced": world_words.misplaced(rows).sum(1),
      "word": (rows != world_words.NOTHING).sum(1),
    }

  def explain(self, prompt: str, response: str) -> dict[str, Any]:
    """One summary's score with its reasons, for people to read.

    Returns:
      {"score": float, "covered": ["vital bridge closed", …], "missed": [… in the same form],
      "false": ["sky clear", …], "repeated": […], "misplaced": [words], "words": int}.
    """
    reports, rows = world_words.numbers([prompt]), world_words.numbers([response])
    _, covered, false, repeated = (part[0] for part in _judge(reports, rows))
    words = response.split()
    facts = _facts(reports)[0]
    stated = {
      f"{world_words.SUBJECTS[subject]} {world_words.ALL_STATES[state]}": int(facts[fact])
      for fact in np.flatnonzero(facts != world_words.NOTHING)
      for subject, state in [(world_words.FACT_SUBJECT[fact], world_words.FACT_STATE[fact])]
    }
    claimed = [" ".join(words[max(0, i - 1) : i + 1]) for i in range(len(words))]
    seen = {claimed[i] for i in np.flatnonzero(covered)}
    ranked = sorted(stated, key=lambda fact: (stated[fact], fact))
    name = {fact: f"{world_words.IMPORTANCES[rank]} {fact}" for fact, rank in stated.items()}
    return {
      "score": self.score(prompt, response),
      "covered": [name[fact] for fact in ranked if fact in seen],
      "missed": [name[fact] for fact in ranked if fact not in seen],
      "false": [claimed[i] for i in np.flatnonzero(false)],
      "repeated": [claimed[i] for i in np.flatnonzero(repeated)],
      "misplaced": [words[i] for i in np.flatnonzero(world_words.misplaced(rows)[0])],
      "words": len(words),
    }


def _facts(prompts: np.ndarray) -> np.ndarray:
  """[M, facts]: the importance's rank of each stated fact, NOTHING where it is not stated."""
  subject, state, before = world_words.claims(prompts)
  fact = world_words.FACT[subject, state]
  rank = before - world_words.FIRST_IMPORTANCE
  stated = (state != world_words.NOTHING) & (fact != world_words.NOTHING)
  stated &= (rank >= 0) & (rank < len(world_words.IMPORTANCES))
  facts = np.full((len(prompts), len(world_words.FACT_STATE)), world_words.NOTHING)
  row, column = np.nonzero(stated)
  facts[row, fact[row, column]] = rank[row, column]
  return facts


def _judge(
  prompts: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Sorts a summary's claims: (importance rank, covered, false, repeated), each [M, L]."""
  facts = _facts(prompts)
  subject, state, _ = world_words.claims(rows)
  claim = state != world_words.NOTHING
  fact = np.where(claim, world_words.FACT[subject, state], world_words.NOTHING)
  importance = np.where(
    fact != world_words.NOTHING,
    np.take_along_axis(facts, np.maximum(fact, 0), 1),
    world_words.NOTHING,
  )
  code = subject * len(world_words.ALL_STATES) + state
  earlier = np.tri(rows.shape[1], k=-1, dtype=bool)
  again = ((code[:, :, None] == code[:, None, :]) & claim[:, None, :] & earlier).any(2)
  repeated = claim & again
  covered = claim & ~again & (importance != world_words.NOTHING)
  return importance, covered, claim & ~again & ~covered, repeated


@dataclasses.dataclass(frozen=True)
class Writer:
  """A stochastic writer of summaries, the world's built-in policy.

  Each summary has a mood: how many sentences, careful or sloppy, selective or not, terse or
  wordy. Long summaries cover more and err more often, which keeps the share of pairs that the
  longer one wins near 0.6, as in the paper's data.

  Attributes:
    sentences: probabilities of 1, 2, … sentences.
    sloppy: probability that a summary is sloppy.
    false: probability that a sentence is false, in a careful and in a sloppy summary.
    exaggerate: probability that a false sentence claims something sensational.
    repeat: probability that a sentence repeats an earlier one, likewise.
    selective: probability that a summary prefers important facts, by `focus` in log-odds a rank.
    focus: strength of that preference.
    wordy: probability that a summary is wordy; then half of its sentences get an opener.
  """

  sentences: tuple[float, ...] = (0.1, 0.2, 0.25, 0.25, 0.2)
  sloppy: float = 0.5
  false: tuple[float, float] = (0.05, 0.45)
  exaggerate: float = 0.7
  repeat: tuple[float, float] = (0.0, 0.15)
  selective: float = 0.5
  focus: float = 1.0
  wordy: float = 0.5

  def __post_init__(self) -> None:
    if not 1 <= len(self.sentences) <= _MAX_SENTENCES or abs(sum(self.sentences) - 1) > 1e-6:
      raise UserError(
        f"Writer.sentences = {self.sentences}: give at most {_MAX_SENTENCES} probabilities, sum 1"
      )

  def __call__(self, prompts: Sequence[str], samples: int, seed: int) -> list[list[str]]:
    """`samples` summaries of each prompt."""
    facts = np.repeat(_facts(world_words.numbers(prompts)), samples, axis=0)
    written = world_words.texts(self._write(facts, seed))
    return [written[i : i + samples] for i in range(0, len(written), samples)]

  def _write(self, facts: np.ndarray, seed: int) -> np.ndarray:
    """[M, words] word numbers of one summary for each row of `facts`; NOTHING fills the gaps."""
    count, most = len(facts), len(self.sentences)
    draw = functools.partial(_draw, (seed, "writer"))
    length = (
      np.searchsorted(np.cumsum(self.sentences)[:-1], draw("length", count), side="right") + 1
    )
    sloppy = (draw("sloppy", count) < self.sloppy).astype(int)
    focus = np.where(draw("selective", count) < self.selective, self.focus, 0.0)[:, None]

    # Gumbel's trick: the order of the noisy logits is a draw without replacement.
    logits = np.where(facts < 0, -np.inf, -focus * facts) + _gumbel(draw("order", facts.shape))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :most]
    # With fewer facts than sentences the summary ends early.
    length = np.minimum(length, np.maximum((facts >= 0).sum(1), 1))

    # A false sentence gives a subject a state that the report does not: half the time the subject
    # whose turn it is (a contradiction), else any (a hallucination). It tends to the sensational.
    per, own = world_words.PER_SUBJECT, world_words.OWN
    shape = (count, most)
    other = (draw("false subject", shape) * len(world_words.SUBJECTS)).astype(int)
    subject = np.where(draw("contradict", shape) < 0.5, order // per, other)
    stated = facts.reshape(count, -1, per)
    true = np.where((stated >= 0).any(2), stated.argmax(2), per)  # `per`: no state of it is true
    true = np.take_along_axis(true, subject, 1)
    first, many = np.where(
      draw("exaggerate", shape) < self.exaggerate, [[[own]], [[per - own]]], [[[0]], [[own]]]
    )
    guess = (draw("false state", shape) * many).astype(int)
    guess = np.where(first + guess == true, (guess + 1) % many, guess)
    wrong = subject * per + first + guess
    is_false = draw("false", shape) < np.take(self.false, sloppy)[:, None]
    fact = np.where(is_false, wrong, order)

    place = np.arange(most)
    earlier = (draw("earlier", shape) * place).astype(int)  # 0 … place - 1
    repeats = (draw("repeat", shape) < np.take(self.repeat, sloppy)[:, None]) & (place > 0)
    fact = np.where(repeats, np.take_along_axis(fact, earlier, 1), fact)

    wordy = (draw("wordy", count) < self.wordy)[:, None] & (draw("opener", shape) < 0.5)
    present = place < length[:, None]
    note, also = wordy & (place == 0), wordy & (place > 0)
    extra = np.cumsum(2 * note + also, axis=1)
    fits = extra <= _MAX_WORDS - 3 * length[:, None]  # openers give way to facts
    columns = (
      (note & fits, world_words.NOTE),
      (note & fits, world_words.THAT),
      (also & fits, world_words.ALSO),
      (True, world_words.FIRST_SUBJECT + world_words.FACT_SUBJECT[fact]),
      (True, world_words.FIRST_STATE + world_words.FACT_STATE[fact]),
      (True, world_words.STOP),
    )
    sentences = [np.where(present & keep, word, world_words.NOTHING) for keep, word in columns]
    return np.stack(sentences, axis=2).reshape(count, -1)


@dataclasses.dataclass(frozen=True)
class WorldSource:
  """A data set drawn from the world.

  Attributes:
    pairs: number of preference records.
    responses: responses a record; 2 gives pairs, more give ranked groups.
    demonstration_count: number of SFT demonstrations, of prompts of their own.
    rho: fraction of pairs in which the longer response wins. None leaves the natural share. With a
      number, pairs are selected, never relabelled, and all of them have a longer response (at
      least 10 % more tokens), so that the share is `rho` to within one pair.
    label: "deterministic" (the oracle's order) or "bradley_terry" (drawn from its scores over
      `temperature`; Plackett-Luce for more than two).
    temperature: of Bradley-Terry labels.
    noise: probability that a record's order is reversed.
    seed: everything drawn is a function of it.
    oracle: the judge.
    policy: who writes the summaries: `Writer`, or any policy(prompts, samples, seed) -> responses.
  """

  pairs: int = 6000
  responses: int = 2
  demonstration_count: int = 8000
  rho: float | None = None
  label: str = "deterministic"
  temperature: float = 1.0
  noise: float = 0.0
  seed: int = 0
  oracle: Oracle = Oracle()
  policy: Policy = Writer()

  def __post_init__(self) -> None:
    for name, low in (("pairs", 0), ("demonstration_count", 0), ("responses", 2)):
      if getattr(self, name) < low:
        raise UserError(f"WorldSource.{name} = {getattr(self, name)}: must be at least {low}")
    if self.label not in ("deterministic", "bradley_terry"):
      raise UserError(
        f"WorldSource.label = {self.label!r}: choose 'deterministic' or 'bradley_terry'"
      )
    if not 0 <= self.noise <= 1:
      raise UserError(f"WorldSource.noise = {self.noise}: a probability, 0 to 1")
    if not self.temperature > 0:
      raise UserError(f"WorldSource.temperature = {self.temperature}: must be above 0")
    if self.rho is not None and not 0 <= self.rho <= 1:
      raise UserError(f"WorldSource.rho = {self.rho}: a fraction, 0 to 1, or None")
    if self.rho is not None and self.responses != 2:
      raise UserError(
        f"WorldSource.rho = {self.rho} needs pairs, but responses = {self.responses}: "
        "set WorldSource.responses = 2, or rho = None"
      )

  @property
  def vocabulary(self) -> WordVocabulary:
    """The world's words."""
    return WordVocabulary(world_words.WORDS)

  def fingerprint(self) -> str:
    """A hash of all that decides the data."""
    settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    if not dataclasses.is_dataclass(self.policy):  # the repr of a function holds its address
      settings["policy"] = f"{self.policy.__module__}.{self.policy.__qualname__}"
    text = repr((VERSION, world_words.WORDS, sorted(settings.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def demonstrations(self) -> list[Record]:
    """`demonstration_count` records {id, prompt, response}, the summaries as the policy writes."""
    records: list[Record] = []
    for first in range(0, self.demonstration_count, _CHUNK):
      prompts = _prompts(_CHUNK, self.seed, "demonstrations", first)
      written = self._respond(prompts, 1, "demonstrations", first)
      records += [
        {"id": f"world-{self.seed}-demonstration-{first + i}", "prompt": prompt, "response": one}
        for i, (prompt, (one,)) in enumerate(zip(prompts, written, strict=True))
      ]
    return records[: self.demonstration_count]

  def records(self) -> list[Record]:
    """`pairs` records: {id, prompt, chosen, rejected}, or {id, prompt, responses, ranks}."""
    drawn: dict[bool, list[Record]] = {
      False: [],
      True: [],
    }  # by whether the longer response wins, if rho asks for it
    wanted = [self.rho is not None and _longer_at(self.rho, place) for place in range(self.pairs)]
    quota = {kind: wanted.count(kind) for kind in drawn}
    most = 25 * (1 + self.pairs // _CHUNK)
    for chunk in range(most):
      if all(len(drawn[kind]) >= quota[kind] for kind in drawn):
        break
      for kind, record in self._candidates(chunk * _CHUNK):
        drawn[kind].append(record)
    else:
      raise UserError(
        f"WorldSource: of {most * _CHUNK} candidates the longer response wins in "
        f"{len(drawn[True])} and loses in {len(drawn[False])}, too few for {self.pairs} pairs "
        f"at rho = {self.rho}. Move rho or change the policy."
      )
    queues = {kind: iter(found) for kind, found in drawn.items()}
    return [next(queues[kind]) for kind in wanted]

  def explain(self, prompt: str, response: str) -> dict[str, Any]:
    """`Oracle.explain` by this source's oracle."""
    return self.oracle.explain(prompt, response)

  def _respond(self, prompts: list[str], samples: int, *stream: object) -> list[list[str]]:
    seed = hashing.hash64(self.seed, *stream) % 2**31
    responses = self.policy(prompts, samples, seed)
    if len(responses) != len(prompts) or any(len(group) != samples for group in responses):
      raise UserError(
        f"WorldSource.policy must return {samples} responses for each of {len(prompts)} prompts"
      )
    return responses

  def _candidates(self, first: int) -> Iterator[tuple[bool, Record]]:
    """The usable ones of `_CHUNK` records from candidate `first` on, with their kind."""
    n = self.responses
    prompts = _prompts(_CHUNK, self.seed, "pairs", first)
    groups = self._respond(prompts, n, "pairs", first)
    flat = [response for group in groups for response in group]
    scores = self.oracle.scores([p for p in prompts for _ in range(n)], flat).reshape(-1, n)
    order = self._order(scores, first)
    lengths = np.array([len(text.split()) + 1 for text in flat]).reshape(-1, n)  # with EOS
    winner, loser = (np.take_along_axis(lengths, order[:, j, None], 1)[:, 0] for j in (0, 1))
    longer, shorter = subsets.is_longer(winner, loser), subsets.is_longer(loser, winner)
    # Equal texts, or a pair between which the oracle is indifferent, would be labelled by nothing.
    tied = (n == 2) & (self.label == "deterministic") & (abs(scores[:, 0] - scores[:, 1]) < 1e-9)
    usable = ~tied & (longer | shorter | (self.rho is None))
    for i, group in enumerate(groups):
      if not usable[i] or len(set(group)) < n:
        continue
      record: Record = {"id": f"world-{self.seed}-{first + i}", "prompt": prompts[i]}
      if n == 2:
        record |= {"chosen": group[order[i, 0]], "rejected": group[order[i, 1]]}
      else:
        record |= {"responses": group, "ranks": np.argsort(order[i]).tolist()}
      yield self.rho is not None and bool(longer[i]), record

  def _order(self, scores: np.ndarray, first: int) -> np.ndarray:
    """[M, N]: the responses from best to worst, as labelled."""
    chance = _draw((self.seed, "label"), first, scores.shape)
    if self.label == "bradley_terry":
      keys = scores / self.temperature + _gumbel(chance)
    else:
      keys = scores + 1e-9 * chance  # among equals, a coin
    order = np.argsort(-keys, axis=1, kind="stable")
    flipped = _draw((self.seed, "noise"), first, len(scores)) < self.noise
    return np.where(flipped[:, None], order[:, ::-1], order)


def _longer_at(rho: float, place: int) -> bool:
  """Spreads the pairs that the longer one wins evenly, so that every beginning has its share."""
  return math.floor(rho * (place + 1) + 0.5) > math.floor(rho * place + 0.5)


def _prompts(count: int, *stream: object) -> list[str]:
  """`count` reports of FACTS facts about different subjects."""
  draw = functools.partial(_draw, stream)
  subjects = draw("subjects", (count, len(world_words.SUBJECTS))).argsort(1, kind="stable")
  subjects = subjects[:, :FACTS]
  sensations = len(world_words.SENSATIONS)
  chance = draw("states", subjects.shape)
  states = np.where(
    draw("sensation", subjects.shape) < _SENSATION,
    world_words.OWN + (chance * sensations).astype(int),
    (chance * world_words.OWN).astype(int),
  )
  states = world_words.FACT_STATE[subjects * world_words.PER_SUBJECT + states]
  # The report decides what matters; its subjects' usual importance is a strong hint.
  usual = subjects * len(world_words.IMPORTANCES) // len(world_words.SUBJECTS)
  keys = usual + 1.5 * draw("importance", subjects.shape)
  ranks = keys.argsort(1, kind="stable").argsort(1, kind="stable")
  ranks = ranks * len(world_words.IMPORTANCES) // FACTS
  one = np.ones_like(ranks)
  clauses = (
    world_words.FIRST_IMPORTANCE + ranks,
    world_words.FIRST_SUBJECT + subjects,
    world_words.FIRST_STATE + states,
    world_words.SEMICOLON * one,
  )
  body = np.stack(clauses, axis=2).reshape(count, -1)
  head = np.tile((world_words.REPORT, world_words.COLON), (count, 1))
  tail = np.tile((world_words.SUMMARY, world_words.COLON), (count, 1))
  return world_words.texts(np.concatenate([head, body, tail], axis=1))


def _draw(stream: tuple[object, ...], name: object, shape: int | tuple[int, ...]) -> np.ndarray:
  """Uniform float64 in (0, 1) of the given shape, a function of the stream and the name."""
  places = np.arange(math.prod(shape) if isinstance(shape, tuple) else shape)
  return hashing.uniform(places, *stream, name).reshape(shape) + 2.0**-54


def _gumbel(chance: np.ndarray) -> np.ndarray:
  return -np.log(-np.log(chance))
