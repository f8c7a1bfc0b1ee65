"""The synthetic world: the oracle against hand-made sums, and data with the shares asked for."""

import dataclasses
import hashlib
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmd_jax.data import world_words
from rmd_jax.data.world import Oracle, WorldSource, Writer
from rmd_jax.errors import UserError

REPORT = (
  "report : vital bridge closed ; minor sky grey ; useful road icy ; "
  "vital dam leaking ; useful train late ; minor team losing ; summary :"
)
GOLDEN = "ad91245c21069c14"
# Numbers whose sums cannot be mistaken for each other, whatever the defaults are.
ORACLE = Oracle(1.0, 0.5, 0.2, -1.0, -0.5, -0.25, 0.02)
# The grammars, written once more as regular expressions.
FACT = rf"({'|'.join(world_words.SUBJECTS)}) ({'|'.join(world_words.ALL_STATES)})"
CLAUSE = rf"({'|'.join(world_words.IMPORTANCES)}) {FACT} ;"
PROMPT = re.compile(rf"report :( {CLAUSE}){{6}} summary :")
RESPONSE = re.compile(rf"(note that )?{FACT} \.( (also )?{FACT} \.){{0,4}}")


def naive_score(prompt, response):
  """A grammatical summary's score by string matching; no code of ours."""
  worth = {"vital": 1.0, "useful": 0.5, "minor": 0.2}
  stated = {" ".join(c.split()[1:]): c.split()[0] for c in re.findall(CLAUSE_TEXT, prompt)}
  total, seen = 0.02 * len(response.split()), set()
  for sentence in response.rstrip(" .").split(" . "):
    fact = " ".join(sentence.split()[-2:])
    total += -0.5 if fact in seen else worth[stated[fact]] if fact in stated else -1.0
    seen.add(fact)
  return total


CLAUSE_TEXT = rf"(?:{'|'.join(world_words.IMPORTANCES)}) \w+ \w+ (?=;)"


def longer_share(pairs):
  """(fraction in which the longer wins, fraction that has a longer response), in tokens."""
  chosen, rejected = (
    np.array([len(pair[side].split()) + 1 for pair in pairs]) for side in ("chosen", "rejected")
  )
  won = (chosen / rejected >= 1.0999999).sum()
  lost = (rejected / chosen >= 1.0999999).sum()
  return won / (won + lost), (won + lost) / len(pairs)


@pytest.mark.parametrize(
  ("response", "parts"),
  [
    ("bridge closed .", [1.0, 3 * 0.02]),
    ("note that bridge closed .", [1.0, 5 * 0.02]),
    ("sky grey . also road icy .", [0.2, 0.5, 7 * 0.02]),
    ("bridge repaired .", [-1.0, 3 * 0.02]),  # contradicts
    ("river calm .", [-1.0, 3 * 0.02]),  # not in the report
    ("bridge grey .", [-1.0, 3 * 0.02]),  # true of the sky, not of the bridge
    ("dam leaking . dam leaking .", [1.0, -0.5, 6 * 0.02]),
    ("river calm . river calm . river calm .", [-1.0, -0.5, -0.5, 9 * 0.02]),
    ("bridge doomed . sky doomed .", [-1.0, -1.0, 6 * 0.02]),  # two claims, no repetition
    ("", []),
    ("bridge closed", [1.0, 2 * 0.02]),  # cut off after its last fact
    ("bridge closed . . .", [1.0, -0.25, -0.25, 5 * 0.02]),
    ("closed bridge .", [-0.25, -0.25, -0.25, 3 * 0.02]),  # only "closed" … no claim, no grammar
    ("note note that bridge closed .", [1.0, -0.25, 6 * 0.02]),
    ("vital bridge closed .", [1.0, -0.25, -0.25, 4 * 0.02]),  # "vital", then what follows it
    ("bridge closed . <unk>", [1.0, -0.25, 4 * 0.02]),
  ],
)
def test_oracle_is_the_sum_that_it_says(response, parts):
  assert ORACLE.score(REPORT, response) == pytest.approx(sum(parts), abs=1e-12)


def test_oracle_weights_are_its_fields():
  oracle = Oracle(8.0, 4.0, 2.0, -16.0, -32.0, -64.0, 0.5)
  response = "bridge closed . road icy . sky grey . team winning . sky grey . ."
  assert oracle.score(REPORT, response) == 8 + 4 + 2 - 16 - 32 - 64 + 0.5 * 16


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_oracle_agrees_with_string_matching(seed):
  records = WorldSource(demonstration_count=3, seed=seed).demonstrations()
  prompts, responses = ([r[side] for r in records] for side in ("prompt", "response"))
  scores = ORACLE.scores(prompts, responses)
  assert scores == pytest.approx(
    [naive_score(p, r) for p, r in zip(prompts, responses, strict=True)]
  )


def test_scores_do_not_depend_on_their_neighbours():
  prompts = [REPORT] * 3
  responses = ["bridge closed .", "", "dam leaking . dam leaking . also river calm ."]
  together = Oracle().scores(prompts, responses)
  assert together.tolist() == [Oracle().score(REPORT, response) for response in responses]
  with pytest.raises(ValueError, match="1 prompts for 2 responses"):
    Oracle().scores([REPORT], ["a", "b"])
  assert Oracle().scores([], []).shape == (0,)


def test_explain_names_the_reasons():
  response = "note that bridge closed . sky clear . also dam leaking . bridge closed . road"
  assert ORACLE.explain(REPORT, response) == {
    "score": pytest.approx(1.0 - 1.0 + 1.0 - 0.5 + 16 * 0.02),
    "covered": ["vital bridge closed", "vital dam leaking"],
    "missed": ["useful road icy", "useful train late", "minor sky grey", "minor team losing"],
    "false": ["sky clear"],
    "repeated": ["bridge closed"],
    "misplaced": [],
    "words": 16,
  }
  assert WorldSource().explain(REPORT, "closed .")["misplaced"] == ["closed"]


def test_texts_keep_to_the_grammar_and_the_lengths():
  source = WorldSource(pairs=1500, demonstration_count=1500, seed=3)
  texts = [(r["prompt"], r[side]) for r in source.records() for side in ("chosen", "rejected")]
  texts += [(r["prompt"], r["response"]) for r in source.demonstrations()]
  for prompt, response in texts:
    assert PROMPT.fullmatch(prompt), prompt
    assert RESPONSE.fullmatch(response), response
  assert {len(prompt.split()) for prompt, _ in texts} == {28}
  lengths = [len(response.split()) for _, response in texts]
  assert (min(lengths), max(lengths)) == (3, 19)
  assert (source.oracle.count(*zip(*texts, strict=True))["misplaced"] == 0).all()


def test_every_report_has_two_facts_of_each_importance_about_six_subjects():
  for record in WorldSource(pairs=300).records():
    clauses = re.findall(CLAUSE, record["prompt"])
    assert len({subject for _, subject, _ in clauses}) == 6
    assert sorted(rank for rank, _, _ in clauses) == ["minor"] * 2 + ["useful"] * 2 + ["vital"] * 2
    for _, subject, state in clauses:
      assert state in (*world_words.STATES[subject], *world_words.SENSATIONS)


def test_vocabulary_is_small_and_reads_every_text():
  words = world_words.WORDS
  assert 100 <= len(words) == len(set(words)) <= 200
  assert all(len(states) == 3 for states in world_words.STATES.values())
  source = WorldSource(pairs=50)
  vocabulary = source.vocabulary
  for record in source.records():
    assert vocabulary.decode(vocabulary.encode(record["prompt"])) == record["prompt"]
    assert vocabulary.decode(vocabulary.encode(record["chosen"])) == record["chosen"]


def test_the_writer_varies_in_all_that_the_oracle_judges():
  records = WorldSource(demonstration_count=4000).demonstrations()
  counts = Oracle().count(*([r[side] for r in records] for side in ("prompt", "response")))
  assert counts["vital"].mean() > 1.15 * counts["useful"].mean() > 1.15 * counts["minor"].mean()
  assert 0.4 < counts["false"].mean() < 0.9
  assert 0.05 < counts["repeated"].mean() < 0.3
  facts = counts["vital"] + counts["useful"] + counts["minor"]
  for name, values in (("facts", facts), ("word", counts["word"]), ("false", counts["false"])):
    assert values.std() > 0.5, name
  careful = dataclasses.replace(Writer(), sloppy=0.0, false=(0.0, 0.0))
  truthful = WorldSource(demonstration_count=500, policy=careful).demonstrations()
  counts = Oracle().count(*([r[side] for r in truthful] for side in ("prompt", "response")))
  assert (counts["false"] + counts["repeated"] == 0).all()


def test_a_writer_that_always_errs_never_tells_the_truth():
  liar = Writer(sloppy=1.0, false=(1.0, 1.0), repeat=(0.0, 0.0))
  records = WorldSource(demonstration_count=1000, policy=liar).demonstrations()
  counts = Oracle().count(*([r[side] for r in records] for side in ("prompt", "response")))
  assert all((counts[name] == 0).all() for name in world_words.IMPORTANCES)


def test_natural_pairs_are_labelled_by_the_oracle_and_the_longer_wins_six_in_ten():
  source = WorldSource(pairs=6000)
  pairs = source.records()
  share, decided = longer_share(pairs)
  assert share == pytest.approx(0.63, abs=0.04)
  assert 0.75 < decided < 0.95
  prompts = [pair["prompt"] for pair in pairs]
  won, lost = (source.oracle.scores(prompts, [p[s] for p in pairs]) for s in ("chosen", "rejected"))
  assert (won > lost).all()
  assert len({pair["id"] for pair in pairs}) == len(set(prompts)) == 6000


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_rho_is_the_share_and_no_label_moves(rho):
  source = WorldSource(pairs=1000, rho=rho)
  pairs = source.records()
  assert longer_share(pairs) == (pytest.approx(rho, abs=1e-9), 1.0)
  for beginning in (50, 400):  # every beginning has its share, so a split or an epoch's head too
    assert longer_share(pairs[:beginning])[0] == pytest.approx(rho, abs=0.6 / beginning)
  prompts = [pair["prompt"] for pair in pairs]
  won, lost = (source.oracle.scores(prompts, [p[s] for p in pairs]) for s in ("chosen", "rejected"))
  assert (won > lost).all()


@pytest.mark.parametrize("rho", [None, 0.2])
def test_more_pairs_only_add(rho):
  few, many = (WorldSource(pairs=n, rho=rho).records() for n in (300, 2500))
  assert few == many[:300]


def test_noise_reverses_that_fraction():
  source = WorldSource(pairs=4000, noise=0.2)
  pairs = source.records()
  prompts = [pair["prompt"] for pair in pairs]
  won, lost = (source.oracle.scores(prompts, [p[s] for p in pairs]) for s in ("chosen", "rejected"))
  assert (won < lost).mean() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_bradley_terry_labels_have_its_probabilities(temperature):
  source = WorldSource(pairs=6000, label="bradley_terry", temperature=temperature)
  pairs = source.records()
  prompts = [pair["prompt"] for pair in pairs]
  won, lost = (source.oracle.scores(prompts, [p[s] for p in pairs]) for s in ("chosen", "rejected"))
  gap, right = np.abs(won - lost), won > lost
  decided = gap > 1e-6
  for low, high in ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 9.0)):
    some = decided & (gap >= low) & (gap < high)
    expected = (1 / (1 + np.exp(-gap[some] / temperature))).mean()
    assert right[some].mean() == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(some.sum()))


@pytest.mark.parametrize("label", ["deterministic", "bradley_terry"])
def test_groups_have_ranks(label):
  source = WorldSource(pairs=400, responses=5, label=label)
  groups = source.records()
  assert len(groups) == 400
  agree = []
  for group in groups:
    assert set(group) == {"id", "prompt", "responses", "ranks"}
    assert sorted(group["ranks"]) == list(range(5))
    assert len(set(group["responses"])) == 5
    scores = source.oracle.scores([group["prompt"]] * 5, group["responses"])
    ordered = scores[np.argsort(group["ranks"])]
    agree.append((np.diff(ordered) <= 1e-8).all())
  assert np.mean(agree) == 1.0 if label == "deterministic" else np.mean(agree) < 0.5


def test_the_seed_decides_everything_and_streams_differ():
  one, again, other = (WorldSource(pairs=200, seed=seed) for seed in (1, 1, 2))
  assert one.records() == again.records()
  assert one.demonstrations() == again.demonstrations()
  prompts = {
    name: {r["prompt"] for r in found}
    for name, found in (
      ("pairs", one.records()), ("other", other.records()), ("sft", one.demonstrations())
    )
  }  # fmt: skip
  assert not prompts["pairs"] & prompts["other"]
  assert not prompts["pairs"] & prompts["sft"]


def test_examples_are_these_forever():
  """Run directories rest on it: if you mean to change them, raise world.VERSION with the hash."""
  source = WorldSource(pairs=20, rho=0.3, label="bradley_terry", noise=0.1, demonstration_count=20)
  text = json.dumps([source.records(), source.demonstrations()])
  assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN


def test_fingerprint_follows_the_settings():
  base = WorldSource()
  assert base.fingerprint() == WorldSource().fingerprint()
  changes = [
    {"pairs": 1}, {"responses": 3}, {"rho": 0.5}, {"noise": 0.1}, {"seed": 1}, {"temperature": 2.0},
    {"label": "bradley_terry"}, {"oracle": Oracle(word=0.0)}, {"policy": Writer(sloppy=0.1)},
    {"policy": copy_first_fact}, {"demonstration_count": 2},
  ]  # fmt: skip
  prints = {dataclasses.replace(base, **change).fingerprint() for change in changes}
  assert len(prints | {base.fingerprint()}) == len(changes) + 1


def copy_first_fact(prompts, samples, seed):
  """A policy: the report's first facts, one sentence, then two, …"""
  facts = [[" ".join(c.split()[1:]) for c in re.findall(CLAUSE_TEXT, p)] for p in prompts]
  return [
    [" ".join(f"{fact} ." for fact in own[: 1 + (i + seed) % 5]) for i in range(samples)]
    for own in facts
  ]


def test_any_policy_can_write():
  source = WorldSource(pairs=30, policy=copy_first_fact, demonstration_count=5)
  for pair in source.records():
    assert pair["chosen"].startswith(pair["rejected"][:-2]) or pair["rejected"].startswith(
      pair["chosen"][:-2]
    )
    assert pair["prompt"].split()[3:5] == pair["chosen"].split()[:2]
  with pytest.raises(UserError, match="2 responses for each of 256 prompts"):
    WorldSource(pairs=3, policy=lambda prompts, samples, seed: [["one ."]]).records()


def test_a_share_that_a_policy_cannot_give_is_refused():
  # It tells the truth alone, so that more sentences are always better.
  with pytest.raises(UserError, match=r"rho = 0\.2"):
    WorldSource(pairs=5, rho=0.2, policy=copy_first_fact).records()


@pytest.mark.parametrize(
  ("settings_", "message"),
  [
    ({"label": "coin"}, "label"),
    ({"rho": 1.5}, "rho"),
    ({"rho": 0.5, "responses": 3}, "needs pairs"),
    ({"responses": 1}, "responses"),
    ({"noise": -0.1}, "noise"),
    ({"temperature": 0.0}, "temperature"),
    ({"pairs": -1}, "pairs"),
  ],
)
def test_settings_that_make_no_sense_are_refused(settings_, message):
  with pytest.raises(UserError, match=message):
    WorldSource(**settings_)
  with pytest.raises(UserError, match="sum 1"):
    Writer(sentences=(0.5, 0.4))


def test_drawing_is_fast():
  start = time.process_time()
  assert len(WorldSource(pairs=8000, rho=0.2).records()) == 8000
  assert time.process_time() - start < 4  # 1 s where nothing else runs


def test_a_sensational_fact_can_be_true():
  report = REPORT.replace("sky grey", "sky doomed")
  assert ORACLE.score(report, "sky doomed . bridge doomed .") == pytest.approx(0.2 - 1.0 + 6 * 0.02)
