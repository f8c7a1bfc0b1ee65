"""Records: the accepted shapes, where prompts end, and every field that cannot be used."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmd_jax.data import text
from rmd_jax.data.schema import Location, Problem, content_hash, parse
from rmd_jax.data.text import FieldError, render, split_dialogues

HERE = Location("pairs.jsonl", 7)
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
GROUP = {"prompt": "p", "responses": ["a", "b", "c"]}


def record(raw, **keywords):
  return parse(raw, HERE, **keywords)[0]


def warnings(raw):
  return [problem.code for problem in parse(raw, HERE)[1]]


def user(content):
  return {"role": "user", "content": content}


def assistant(content):
  return {"role": "assistant", "content": content}


def test_a_pair_keeps_its_texts_and_its_order():
  parsed = record({**PAIR, "id": "x", "weight": 2, "preference": 0.25})
  assert (parsed.prompt, parsed.responses) == ("p", ("good", "bad"))
  assert (parsed.id, parsed.weight, parsed.preference) == ("x", 2.0, 0.25)
  assert (parsed.file, parsed.line, parsed.shape) == ("pairs.jsonl", 7, "pair")
  assert parsed.ranks is None
  assert parsed.ratings is None


def test_ranks_put_the_best_first():
  parsed = record({**GROUP, "ranks": [5, 1, 3]})
  assert parsed.responses == ("b", "c", "a")
  assert parsed.ranks == (0, 1, 2)


@pytest.mark.parametrize("name", ["ratings", "scores"])
def test_ratings_put_the_highest_first_and_keep_ties_in_order(name):
  parsed = record({**GROUP, name: [0.5, 2, 0.5]})
  assert parsed.responses == ("b", "a", "c")
  assert parsed.ratings == (2.0, 0.5, 0.5)
  assert parsed.shape == "ratings"


def test_a_preference_below_one_half_turns_the_pair_round():
  raw = {"prompt": "p", "responses": ["a", "b"], "preference": 0.25}
  parsed = record(raw)
  assert (parsed.responses, parsed.preference) == (("b", "a"), 0.75)
  assert record({**raw, "preference": 0.75}).responses == ("a", "b")


def test_numpy_numbers_are_numbers():
  parsed = record({**GROUP, "ratings": [np.float32(1), np.int64(3), 2], "id": np.int64(4)})
  assert (parsed.ratings, parsed.id) == ((3.0, 2.0, 1.0), "4")


def test_ids_default_to_a_hash_of_the_texts():
  assert record(PAIR).id == record(dict(reversed(PAIR.items()))).id
  assert record(PAIR).id != record({**PAIR, "prompt": "q"}).id


def test_no_two_different_records_hash_alike():
  assert content_hash("a", ("b", "c")) != content_hash("a", ("bc",))
  assert content_hash("ab", ("c",)) != content_hash("a", ("bc",))


def test_a_demonstration_is_a_prompt_and_a_response():
  parsed = record({"prompt": "p", "response": "r"}, demonstration=True)
  assert (parsed.prompt, parsed.responses, parsed.shape) == ("p", ("r",), "demonstration")
  with pytest.raises(FieldError, match="response: is missing"):
    record(PAIR, demonstration=True)


NAN, INF = float("nan"), float("inf")
UNUSABLE = [
  ({"text": "?"}, "record", "no known shape"),
  ({}, "record", "no known shape"),
  ({"prompt": "p", "chosen": "a"}, "rejected", "missing beside chosen"),
  ({"prompt": "p", "rejected": "a"}, "chosen", "missing beside rejected"),
  ({**PAIR, "responses": ["a", "b"]}, "responses", "stands beside chosen"),
  ({**PAIR, "ranks": [0, 1]}, "ranks", "stands beside chosen"),
  ({**PAIR, "prompt": None}, "prompt", "is null"),
  ({**PAIR, "prompt": 3}, "prompt", "is int 3"),
  ({**PAIR, "chosen": None}, "chosen", "is null"),
  ({**PAIR, "rejected": ""}, "rejected", "is empty"),
  ({**PAIR, "rejected": ["x"]}, "rejected", "same type"),
  ({**PAIR, "chosen": {"role": "user"}}, "chosen", "is dict"),
  ({**PAIR, "chosen": "\ud800"}, "chosen", "lone surrogate"),
  ({**PAIR, "prompt": "a\udfff"}, "prompt", "lone surrogate at character 1"),
  ({**PAIR, "id": "\ud800"}, "id", "lone surrogate"),
  ({**PAIR, "preference": 1.5}, "preference", r"in \[0, 1\]"),
  ({**PAIR, "preference": -0.1}, "preference", r"in \[0, 1\]"),
  ({**PAIR, "preference": NAN}, "preference", "finite"),
  ({**PAIR, "preference": None}, "preference", "is null"),
  ({**PAIR, "preference": "0.7"}, "preference", "without quotes"),
  ({**PAIR, "preference": True}, "preference", "bool True"),
  ({**PAIR, "weight": -1}, "weight", "at least 0"),
  ({**PAIR, "weight": "2"}, "weight", "without quotes"),
  ({**PAIR, "weight": INF}, "weight", "finite"),
  ({**PAIR, "weight": 10**400}, "weight", "finite"),
  ({**PAIR, "id": None}, "id", "text or a whole number"),
  ({**PAIR, "id": ""}, "id", "text or a whole number"),
  ({**PAIR, "id": 1.5}, "id", "text or a whole number"),
  (GROUP, "ranks", "is missing"),
  ({**GROUP, "preference": 0.5}, "preference", "two responses, not 3"),
  ({**GROUP, "ranks": [0, 1, 2], "ratings": [1, 2, 3]}, "ratings", "stands beside ranks"),
  ({**GROUP, "ranks": [0, 1]}, "ranks", "2 numbers for 3 responses"),
  ({**GROUP, "ranks": [0, 1, 1]}, "ranks", "ties"),
  ({**GROUP, "ranks": [0, 1, 0.5]}, r"ranks\[2\]", "whole numbers"),
  ({**GROUP, "ranks": ["0", "1", "2"]}, r"ranks\[0\]", "without quotes"),
  ({**GROUP, "ranks": 3}, "ranks", "a list of 3"),
  ({**GROUP, "ratings": [1, NAN, 2]}, r"ratings\[1\]", "finite"),
  ({**GROUP, "ratings": [1, None, 2]}, r"ratings\[1\]", "is null"),
  ({**GROUP, "responses": ["a"], "ranks": [0]}, "responses", "at least two"),
  ({**GROUP, "responses": [], "ranks": []}, "responses", "at least two"),
  ({**GROUP, "responses": None, "ranks": []}, "responses", "is null"),
  ({**GROUP, "responses": "ab", "ranks": [0, 1]}, "responses", "is str"),
  ({**GROUP, "responses": ["a", None, "c"], "ranks": [0, 1, 2]}, r"responses\[1\]", "is null"),
  ({**GROUP, "responses": ["a", "", "c"], "ranks": [0, 1, 2]}, r"responses\[1\]", "is empty"),
  ({"responses": ["a", "b"], "ranks": [0, 1]}, "prompt", "is missing beside responses"),
  ({"chosen": "good", "rejected": "bad"}, "chosen", "add a prompt field"),
]


@pytest.mark.parametrize(("raw", "field", "what"), UNUSABLE)
def test_an_unusable_record_names_its_field_and_the_way_out(raw, field, what):
  with pytest.raises(FieldError) as caught:
    record(raw)
  assert re.fullmatch(field, caught.value.field)
  assert re.search(what, caught.value.what)
  assert re.search("give|write|add|remove|mend|make", caught.value.what), "no advice"


def test_warnings_leave_the_record_in():
  assert warnings(PAIR) == []
  assert warnings({**PAIR, "rejected": "good"}) == ["identical responses"]
  assert warnings({**PAIR, "rejected": " \n"}) == ["blank response"]
  assert warnings({**PAIR, "prompt": " "}) == ["blank prompt"]
  assert warnings({**PAIR, "prompt": "goo"}) == ["prompt repeated"]
  assert warnings({**GROUP, "ratings": [1, 1, 1]}) == ["equal ratings"]
  assert warnings({**GROUP, "responses": ["a", "b", "a"], "ranks": [0, 1, 2]}) == [
    "identical responses"
  ]


# Where a prompt ends.


def dialogue(*turns):
  roles = ("Human", "Assistant")
  return "".join(f"\n\n{roles[i % 2]}: {turn}" for i, turn in enumerate(turns))


def test_implicit_prompts_end_at_a_turn_not_at_the_common_prefix():
  chosen, rejected = dialogue("Hi", "I think yes"), dialogue("Hi", "I think no")
  parsed = record({"chosen": chosen, "rejected": rejected})
  assert parsed.prompt == "\n\nHuman: Hi\n\nAssistant:"
  assert parsed.responses == (" I think yes", " I think no")


def test_implicit_prompts_end_at_the_last_shared_turn():
  chosen, rejected = dialogue("a", "b", "c", "d"), dialogue("a", "b", "c", "e")
  assert record({"chosen": chosen, "rejected": rejected}).prompt == (
    dialogue("a", "b", "c") + "\n\nAssistant:"
  )


def test_dialogues_that_part_early_share_the_turn_before():
  chosen, rejected = dialogue("a", "b", "c", "d"), dialogue("a", "x", "c", "d")
  raw = {"chosen": chosen, "rejected": rejected}
  parsed = record(raw)
  assert warnings(raw) == ["further turn", "further turn"]
  assert parsed.prompt == "\n\nHuman: a\n\nAssistant:"
  assert parsed.responses[0] == " b\n\nHuman: c\n\nAssistant: d"


def test_one_dialogue_that_goes_on_where_the_other_ends():
  parsed = record({"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "b")})
  assert parsed.responses == (" b\n\nHuman: c\n\nAssistant: d", " b")


def test_identical_dialogues_end_at_their_last_turn():
  raw = {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "b", "c", "d")}
  assert record(raw).responses == (" d", " d")
  assert warnings(raw) == ["identical responses"]


@pytest.mark.parametrize("empty", ["\n\nAssistant:", "\n\nAssistant: "])
def test_an_implicit_response_of_nothing_is_empty(empty):
  with pytest.raises(FieldError, match="chosen: is empty"):
    record({"chosen": "\n\nHuman: a" + empty, "rejected": dialogue("a", "b")})


def test_an_implicit_response_of_more_white_space_is_blank():
  raw = {"chosen": "\n\nHuman: a\n\nAssistant:  ", "rejected": dialogue("a", "b")}
  assert warnings(raw) == ["blank response"]


@settings(deadline=None)
@given(st.lists(st.text(), min_size=2, max_size=6), st.text(), st.text())
def test_prompt_and_response_are_the_dialogue(turns, a, b):
  turns = turns[: len(turns) // 2 * 2]
  chosen, rejected = dialogue(*turns[:-1], a), dialogue(*turns[:-1], b)
  prompt, first, second = split_dialogues(chosen, rejected)
  assert (prompt + first, prompt + second) == (chosen, rejected)
  assert prompt.endswith(text.ASSISTANT_TURN)
  # No later turn is shared, by the definition.
  marks = [m.end() for m in re.finditer(re.escape(text.ASSISTANT_TURN), chosen)]
  assert len(prompt) == max(end for end in marks if rejected[:end] == chosen[:end])


# Messages.


def test_messages_and_hh_text_of_one_dialogue_are_the_same_record():
  messages = {
    "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
    "rejected": [user("a"), assistant("b"), user("c"), assistant("e")],
  }
  texts = {
    "chosen": dialogue("a", "b", "c", "d"),
    "rejected": dialogue("a", "b", "c", "e"),
  }
  one, other = record(messages), record(texts)
  assert (one.prompt, one.responses, one.id) == (other.prompt, other.responses, other.id)


def test_message_lists_of_which_one_goes_on_or_that_are_equal():
  short, long = [user("a"), assistant("b")], [user("a"), assistant("b"), user("c"), assistant("d")]
  parsed = record({"chosen": long, "rejected": short})
  assert parsed.responses == (" b\n\nHuman: c\n\nAssistant: d", " b")
  parsed = record({"chosen": long, "rejected": long})
  assert parsed.prompt.endswith("Human: c\n\nAssistant:")
  assert parsed.responses == (" d", " d")


def test_the_template_has_all_four_roles():
  turns = [("system", "s"), ("user", "u"), ("tool", "t"), ("assistant", "a")]
  assert render(turns) == "\n\nSystem: s\n\nHuman: u\n\nTool: t\n\nAssistant: a"


@pytest.mark.parametrize(
  "prompt",
  ["q", [user("q")]],
  ids=["text", "messages"],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "answers"])
def test_a_prompt_beside_message_lists(prompt, whole):
  lead = [user("q")] if whole else []
  parsed = record(
    {"prompt": prompt, "chosen": [*lead, assistant("a")], "rejected": [*lead, assistant("b")]}
  )
  assert (parsed.prompt, parsed.responses) == ("\n\nHuman: q\n\nAssistant:", (" a", " b"))


def test_a_text_prompt_stands_after_the_system_message():
  system = {"role": "system", "content": "s"}
  answers = {"chosen": [system, assistant("a")], "rejected": [system, assistant("b")]}
  assert record({"prompt": "q", **answers}).prompt == "\n\nSystem: s\n\nHuman: q\n\nAssistant:"


def test_a_message_prompt_before_texts():
  parsed = record({**PAIR, "prompt": [user("q")]})
  assert parsed.prompt + parsed.responses[0] == dialogue("q", "good")


def test_message_lists_in_groups():
  lists = [[assistant("a")], [assistant("b")]]
  parsed = record({"prompt": "q", "responses": lists, "ranks": [1, 0]})
  assert parsed.responses == (" b", " a")


def test_a_dialogue_beside_its_prompt_is_not_read_twice():
  raw = {"chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")}
  assert record({**raw, "prompt": "\n\nHuman: q\n\nAssistant:"}).responses == (" a", " b")
  parsed = record({**raw, "prompt": "\n\nHuman: q"})
  assert (parsed.prompt, parsed.responses) == ("\n\nHuman: q\n\nAssistant:", (" a", " b"))


MESSAGES = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
BAD_MESSAGES = [
  ({**MESSAGES, "prompt": "other"}, "prompt", "not the first turn of chosen"),
  ({**MESSAGES, "prompt": [user("other")]}, "prompt", "is no prefix of chosen"),
  ({**MESSAGES, "prompt": [user("q"), assistant("a")]}, "prompt", "ends with the assistant's"),
  ({**MESSAGES, "prompt": []}, "prompt", "empty list"),
  ({**MESSAGES, "chosen": "text"}, "rejected", "is list, but chosen is str"),
  ({**MESSAGES, "chosen": []}, "chosen", "empty list"),
  ({**MESSAGES, "chosen": [user("q")]}, "chosen", "ends with the turn of user"),
  ({**MESSAGES, "chosen": [user("x"), assistant("a")]}, "chosen", "shares no turn"),
  ({**MESSAGES, "chosen": [user("q"), assistant("")]}, "chosen", "is empty"),
  ({**MESSAGES, "chosen": [user("q"), assistant(None)]}, r"chosen\[1\].content", "is null"),
  (
    {**MESSAGES, "chosen": [user("q"), {"role": "bot", "content": "a"}]},
    r"chosen\[1\].role",
    "bot",
  ),
  ({**MESSAGES, "chosen": [user("q"), {"role": "assistant"}]}, r"chosen\[1\]", "has no content"),
  ({**MESSAGES, "chosen": [user("q"), "a"]}, r"chosen\[1\]", "a message"),
  ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "chosen", "add a prompt field"),
  (
    {"prompt": "x", "chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")},
    "prompt",
    "no prefix",
  ),
  (
    {"prompt": "\n\nHuman: q", "chosen": dialogue("q", "a"), "rejected": "b"},
    "rejected",
    "no dialogue",
  ),
]


@pytest.mark.parametrize(("raw", "field", "what"), BAD_MESSAGES)
def test_unusable_messages(raw, field, what):
  with pytest.raises(FieldError) as caught:
    record(raw)
  assert re.fullmatch(field, caught.value.field)
  assert re.search(what, caught.value.what)


def test_a_problem_is_one_line_whatever_it_quotes():
  problem = Problem("a\nb.jsonl", 3, "chosen", "is 'x\n\u2028y\ud800'; mend it", "warning")
  line = str(problem)
  assert line.startswith("a\\nb.jsonl:3: chosen: warning: is 'x\\n")
  assert len(line.splitlines()) == 1
  line.encode("utf-8")


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
  max_leaves=6,
)
FIELDS = st.sampled_from(
  ["prompt", "chosen", "rejected", "responses", "ranks", "ratings", "preference", "id", "weight"]
)


@settings(deadline=None)
@given(st.dictionaries(FIELDS, JSON, max_size=6))
def test_any_record_is_used_or_refused_and_never_crashes(raw):
  try:
    parsed, problems = parse(raw, HERE)
  except FieldError as error:
    line = str(Problem.at(HERE, error.field, error.what))
    if not line.isprintable():
      pytest.fail(f"{line!r} is no line")
    return
  assert len(parsed.responses) >= 2
  assert all(parsed.responses)
  assert all(problem.severity == "warning" for problem in problems)
  json.dumps(parsed.responses).encode()
