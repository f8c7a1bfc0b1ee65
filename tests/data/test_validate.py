"""The one rule about unusable records, and `rmd validate`."""

import contextlib
import gzip
import io
import itertools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmd_jax.data import validate
from rmd_jax.data.readers import FileSource
from rmd_jax.data.schema import Problem
from rmd_jax.data.validate import check, longer_wins, read, refuse_unusable
from rmd_jax.errors import UserError

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_1500.jsonl.gz"
needs_hh = pytest.mark.skipif(not HH.exists(), reason="the HH sample is not here")


def pair(i=0, **fields):
  return {"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}", **fields}


def write(tmp_path, *lines, name="pairs.jsonl"):
  path = tmp_path / name
  path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
  return str(path)


def error(line=1, **rest):
  return Problem("f", line, "chosen", "is empty; give a response", **rest)


# The rule.


def test_the_fraction_counts_the_unusable_records_too():
  bad = [error(line) for line in range(10)]
  refuse_unusable(bad, usable=90, max_bad_fraction=0.1)
  with pytest.raises(UserError, match=r"10 of 99 records .*more than 0.1"):
    refuse_unusable(bad, usable=89, max_bad_fraction=0.1)


def test_a_refusal_lists_the_first_problems_and_gives_a_fraction_that_works():
  bad = [error(line) for line in range(1, 34)]
  with pytest.raises(UserError) as caught:
    refuse_unusable(bad, usable=67, max_bad_fraction=0.0)
  message = str(caught.value)
  assert "  f:1: chosen: is empty" in message
  assert "f:10:" in message
  assert "f:11:" not in message
  assert "... and 23 more" in message
  fraction = float(message.rpartition("max_bad_fraction = ")[2].rstrip("."))
  refuse_unusable(bad, usable=67, max_bad_fraction=fraction)


def test_no_fraction_tolerates_a_spoilt_file_or_nothing_usable():
  with pytest.raises(UserError, match="no fraction"):
    refuse_unusable([error(whole=True)], usable=1000, max_bad_fraction=1.0)
  with pytest.raises(UserError, match="none of 1"):
    refuse_unusable([error()], usable=0, max_bad_fraction=1.0)
  with pytest.raises(UserError, match="no record"):
    refuse_unusable([], usable=0, max_bad_fraction=1.0)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_is_a_fraction(fraction):
  with pytest.raises(UserError, match="max_bad_fraction"):
    refuse_unusable([], usable=1, max_bad_fraction=fraction)


def test_warnings_are_no_bad_records():
  refuse_unusable([error(severity="warning")] * 9, usable=1, max_bad_fraction=0.0)


def test_nothing_is_dropped_in_silence(tmp_path):
  lines = [pair(0), "rubbish", pair(2, chosen=None), pair(3, rejected=""), pair(4)]
  source = FileSource(write(tmp_path, *lines))
  records, problems = read(source.records(), max_bad_fraction=0.6)
  assert [record.line for record in records] == [1, 5]
  assert [problem.line for problem in problems] == [2, 3, 4]
  with pytest.raises(UserError, match="3 of 5"):
    read(source.records(), max_bad_fraction=0.5)


# Across records.


def test_mixed_shapes_are_refused_with_the_line(tmp_path):
  ranked = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
  source = FileSource(write(tmp_path, pair(0), pair(1), ranked, pair(3)))
  with pytest.raises(
    UserError, match=r"pairs.jsonl:3: record: is of another shape \(ranks, text\)"
  ):
    read(source.records(), max_bad_fraction=1.0)


def test_texts_and_messages_do_not_mix(tmp_path):
  lists = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
  source = FileSource(write(tmp_path, pair(0), {"prompt": "p", **lists}))
  with pytest.raises(UserError, match=r"pairs.jsonl:2: record: is of another shape"):
    read(source.records(), max_bad_fraction=1.0)


def test_two_files_of_different_shapes_do_not_mix(tmp_path):
  ranked = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
  files = (write(tmp_path, pair(0)), write(tmp_path, ranked, name="ranked.jsonl"))
  with pytest.raises(UserError, match=r"ranked.jsonl:1: record: .*pairs.jsonl:1 \(pair, text\)"):
    read(FileSource(files).records(), max_bad_fraction=1.0)


def test_duplicate_ids_are_warned_of_with_both_lines():
  _, problems = read([pair(0, id="x"), pair(1, id="y"), pair(2, id="x")], max_bad_fraction=0.0)
  assert [str(problem) for problem in problems] == [
    "records:3: id: warning: 'x' is that of records:1 too; give each its own"
  ]


def test_equal_records_without_ids_get_different_ones_whatever_their_order():
  rows = [pair(0), pair(1), pair(0)]
  ids = [record.id for record in read(rows, max_bad_fraction=0.0)[0]]
  assert len(set(ids)) == 3
  turned = [record.id for record in read(rows[::-1], max_bad_fraction=0.0)[0]]
  assert set(turned) == set(ids)


def test_unknown_fields_are_warned_of_once():
  rows = [pair(0, note=1), pair(1, note=2, extra=3)]
  _, problems = read(rows, max_bad_fraction=0.0)
  assert [(problem.line, problem.field) for problem in problems] == [(1, "'note'"), (2, "'extra'")]


def test_a_location_is_the_sources_own():
  [record] = check([(("world", 12), pair(0))])
  assert (record.file, record.line) == ("world", 12)


# The command.


def run(capsys, *files, **options):
  status = validate.main(list(files), **options)
  return status, capsys.readouterr().out


def test_a_clean_file(tmp_path, capsys):
  path = write(tmp_path, pair(0), pair(1), pair(0))
  status, out = run(capsys, path)
  assert status == 0
  assert "records: 3; usable 3, unusable 0; shape pair; 2 prompts" in out
  assert "duplicates: 1 records" in out
  assert "the longer response wins in 100.0%" in out


DIRTY = [
  pair(0),
  "{not json",
  pair(2, chosen=None),
  pair(3, rejected=""),
  pair(4, preference="0.5"),
  pair(5, weight=float("nan")),
  '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
  pair(7, rejected="good 7"),
  pair(8, id=1, chosen=" "),
  pair(9, id=1),
]


def test_every_problem_is_a_line_with_file_line_field_and_advice(tmp_path, capsys):
  path = write(tmp_path, *DIRTY)
  status, out = run(capsys, path)
  assert status == 2
  found = [line.removeprefix(f"{path}:") for line in out.splitlines() if line.startswith(path)]
  heads = [line.split(": ")[:2] for line in found]
  assert heads == [
    ["2", "record"],
    ["3", "chosen"],
    ["4", "rejected"],
    ["5", "preference"],
    ["6", "weight"],
    ["7", "prompt"],
    ["8", "rejected"],
    ["9", "chosen"],
    ["10", "id"],
  ]
  assert [": warning: " in line for line in found] == [False] * 6 + [True] * 3
  assert "usable 4, unusable 6" in out
  assert "refused: 6 of 10 records are unusable" in out


def test_tolerated_records_are_counted(tmp_path, capsys):
  status, out = run(capsys, write(tmp_path, *DIRTY), max_bad_fraction=0.6)
  assert status == 0
  assert "usable without 6 records" in out


@pytest.mark.parametrize("tolerated", [0.0, 1.0])
def test_files_that_cannot_be_read_end_with_2(tmp_path, capsys, tolerated):
  empty = write(tmp_path, name="empty.jsonl")
  cut = tmp_path / "cut.jsonl.gz"
  noise = "".join(random.Random(0).choices("abcdefgh", k=50_000))
  cut.write_bytes(gzip.compress(json.dumps(pair(0, chosen=noise)).encode())[:-2000])
  good = write(tmp_path, pair(0))
  for files in ([empty], [str(cut)], [good, empty], [good, str(cut)], [str(tmp_path / "absent")]):
    assert run(capsys, *files, max_bad_fraction=tolerated)[0] == 2


def test_truncations_are_counted_at_the_given_lengths(tmp_path, capsys):
  rows = [pair(0, chosen="x" * n, rejected="y", prompt="z" * n) for n in (5, 6, 7)]
  _, out = run(capsys, write(tmp_path, *rows), prompt_length=7, response_length=7)
  # BOS and EOS take one each: 7 tokens hold 6 bytes.
  assert "truncated: 1 of 3 prompts are longer than 7 tokens" in out
  assert "truncated: 1 of 6 responses are longer than 7 tokens" in out
  assert run(capsys, write(tmp_path, *rows), response_length=1)[0] == 2


def test_show_prints_records_as_the_model_sees_them(tmp_path, capsys):
  path = write(tmp_path, pair(0, prompt="abcd", chosen="xyz", rejected="w"), pair(1))
  _, out = run(capsys, path, show=1, prompt_length=3, response_length=3)
  assert out.count("---") == 1
  assert "prompt      'abcd'" in out
  assert "seen      'cd'" in out
  assert "tokens    3 of 5: 0 102 103" in out
  assert "seen      'xy'" in out
  assert "tokens    3 of 4: 123 124 1" in out
  assert "mask      111" in out
  assert "mask      110" in out


def test_ratings_and_ranks_are_shown(tmp_path, capsys):
  group = {"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2.5]}
  _, out = run(capsys, write(tmp_path, group), show=2)
  assert "response 0  'b'  rating 2.5" in out


def test_ties_in_length_count_one_half():
  import numpy as np

  assert longer_wins(np.array([3, 2, 1, 4]), np.array([1, 2, 3, 1])) == 0.625
  assert longer_wins(np.array([]), np.array([])) is None


def unchecked(*arguments):
  """`validate.main` in a process of its own; in this one every call has its types checked."""
  code = (
    "import sys, time; from rmd_jax.data import validate; start = time.process_time();"
    "status = validate.main(sys.argv[2:], max_bad_fraction=float(sys.argv[1]));"
    "print(time.process_time() - start); sys.exit(status)"
  )
  return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_a_big_file_takes_seconds(tmp_path):
  rows = [pair(i, chosen="word " * 40) for i in range(20_000)]
  ran = unchecked("0", write(tmp_path, *rows))
  assert ran.returncode == 0, ran.stderr
  assert float(ran.stdout.splitlines()[-1]) < 5  # about 0.8 s


@settings(deadline=None, max_examples=25)
@given(
  st.binary(max_size=200)
  | st.lists(
    st.binary(max_size=30) | st.sampled_from([json.dumps(pair(i)).encode() for i in range(3)])
  ).map(b"\n".join)
)
def test_no_bytes_crash_it(data):
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "f"
    for content in (data, gzip.compress(data), gzip.compress(data)[:-9]):
      path.write_bytes(content)
      with contextlib.redirect_stdout(io.StringIO()):
        assert validate.main([str(path)], max_bad_fraction=0.5, show=1) in (0, 2)


@needs_hh
def test_hh_has_its_four_empty_responses():
  ran = unchecked("0.01", str(HH))
  assert ran.returncode == 0, ran.stderr
  lines = [line for line in ran.stdout.splitlines() if line.startswith(str(HH))]
  assert [line.removeprefix(f"{HH}:").split(":")[0] for line in lines] == [
    "87",
    "517",
    "926",
    "1104",
  ]
  assert all("is empty" in line for line in lines)
  assert "records: 1500; usable 1496, unusable 4; shape pair" in ran.stdout


@needs_hh
def test_hh_prompts_end_where_the_assistant_begins():
  items = list(itertools.islice(FileSource(str(HH)).records(), 150))
  records, _ = read(items, max_bad_fraction=0.01)
  assert len(records) == 149
  for record in records:
    raw = items[record.line - 1][1]
    assert record.prompt.endswith("\n\nAssistant:")
    assert record.prompt + record.responses[0] == raw["chosen"]
    assert record.prompt + record.responses[1] == raw["rejected"]
    assert "\n\nHuman:" not in record.responses[0]
