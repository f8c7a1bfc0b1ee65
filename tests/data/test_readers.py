"""Files and data sets as raw records, and what is said of those that cannot be read."""

import gzip
import json

import pytest

from rmd_jax.data.readers import (
  FileSource,
  RecordsSource,
  TfdsSource,
  fingerprint_records,
  parse_line,
  plain_value,
)
from rmd_jax.data.schema import Location, Problem
from rmd_jax.errors import UserError

RAW = {"prompt": "p", "chosen": "é", "rejected": "b"}
LINE = json.dumps(RAW, ensure_ascii=False).encode()


def written(tmp_path, data, name="pairs.jsonl"):
  path = tmp_path / name
  path.write_bytes(data)
  return FileSource((str(path),))


def split(items):
  items = list(items)
  problems = [item for item in items if isinstance(item, Problem)]
  return [item for item in items if not isinstance(item, Problem)], problems


def test_lines_have_their_numbers(tmp_path):
  source = written(tmp_path, LINE + b"\n\n  \n" + LINE)
  records, problems = split(source.records())
  assert [(location.line, raw) for location, raw in records] == [(1, RAW), (4, RAW)]
  assert problems == []


@pytest.mark.parametrize(
  "data",
  [LINE + b"\n", LINE + b"\r\n", b"\xef\xbb\xbf" + LINE, gzip.compress(LINE)],
  ids=["plain", "crlf", "bom", "gzip"],
)
def test_what_is_only_dressed_differently_reads_the_same(tmp_path, data):
  # The name says nothing: the format is told from the first bytes.
  records, problems = split(written(tmp_path, data).records())
  assert [raw for _, raw in records] == [RAW]
  assert problems == []


def test_a_megabyte_on_a_line(tmp_path):
  long = json.dumps({**RAW, "chosen": "x" * (1 << 20)}).encode()
  records, _ = split(written(tmp_path, LINE + b"\n" + long + b"\n").records())
  assert len(records[1][1]["chosen"]) == 1 << 20


@pytest.mark.parametrize(
  ("line", "what"),
  [
    (b'{"prompt": "\xff"}', "byte 13 of the line is not UTF-8"),
    (b"{'prompt': 1}", "not JSON"),
    (b'{"prompt": "p"', "not JSON"),
    (b'{"a": 1} {"b": 2}', "not JSON"),
    (b"[1, 2]", "not an object"),
    (b"null", "not an object"),
    (b'{"a": 1, "a": 2}', "key 'a' twice"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "mend the line"),
    (b"\x00", "not JSON"),
  ],
)
def test_a_bad_line_is_a_problem_of_its_own(tmp_path, line, what):
  records, problems = split(written(tmp_path, LINE + b"\n" + line + b"\n" + LINE).records())
  assert len(records) == 2
  assert [(problem.line, problem.whole) for problem in problems] == [(2, False)]
  assert what in problems[0].what


@pytest.mark.parametrize(
  ("data", "line", "what"),
  [
    (b"", 1, "holds no record"),
    (b"\n \n", 1, "holds no record"),
    (gzip.compress(b""), 1, "holds no record"),
    (b"[\n" + LINE + b"\n]\n", 1, "one JSON object a line"),
    (b"[" + LINE + b"]", 1, "one JSON object a line"),
    (b"{\n" + LINE[1:], 1, "one JSON object a line"),
    (LINE.decode().encode("utf-16"), 1, "UTF-16"),
    (b"PK\x03\x04", 1, "zip"),
    (b"BZh9", 1, "bzip2"),
    (b"PAR1" + b"\x00" * 64 + b"PAR1", 1, "cannot be read as Parquet"),
    (b"PAR1", 1, "cannot be read as Parquet"),
    (b"\x1f\x8b\x00rubbish", 1, "cannot be read beyond"),
  ],
)
def test_a_spoilt_file_is_told_by_what_it_is(tmp_path, data, line, what):
  _, problems = split(written(tmp_path, data).records())
  assert [(problem.line, problem.whole) for problem in problems] == [(line, True)]
  assert what in problems[0].what


def test_a_truncated_gzip_gives_what_it_holds_and_says_where_it_ends(tmp_path):
  import random

  noise = random.Random(0)  # so that gzip has something to write for every line
  lines = [json.dumps({**RAW, "id": noise.random()}).encode() for _ in range(1000)]
  whole = gzip.compress(b"\n".join(lines))
  records, problems = split(written(tmp_path, whole[: len(whole) // 2]).records())
  assert 0 < len(records) < 1000
  assert len(problems) == 1
  assert problems[0].whole
  assert len(records) < problems[0].line <= len(records) + 2
  assert "cannot be read beyond" in problems[0].what


def test_a_gzip_with_a_bad_checksum(tmp_path):
  data = bytearray(gzip.compress(LINE))
  data[-6] ^= 255
  _, problems = split(written(tmp_path, bytes(data)).records())
  assert len(problems) == 1
  assert problems[0].whole


def test_files_that_are_not_there(tmp_path):
  with pytest.raises(UserError, match=r"no file .*absent"):
    list(FileSource((str(tmp_path / "absent.jsonl"),)).records())
  with pytest.raises(UserError, match="directory"):
    FileSource(str(tmp_path)).fingerprint()
  with pytest.raises(UserError, match="no file given"):
    list(FileSource(()).records())


def test_wildcards_and_the_order_of_files(tmp_path):
  for name in ("b", "a", "c"):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({**RAW, "id": name}))
  records, _ = split(FileSource(f"{tmp_path}/[ab].jsonl").records())
  assert [raw["id"] for _, raw in records] == ["a", "b"]
  records, _ = split(FileSource([f"{tmp_path}/c.jsonl", f"{tmp_path}/a.jsonl"]).records())
  assert [raw["id"] for _, raw in records] == ["c", "a"]


def test_the_fingerprint_is_of_the_content(tmp_path):
  one = written(tmp_path, LINE, "one.jsonl")
  other = written(tmp_path, LINE, "other.jsonl")
  changed = written(tmp_path, LINE + b" ", "changed.jsonl")
  assert one.fingerprint() == other.fingerprint() != changed.fingerprint()
  twice = FileSource(one.files + other.files)
  assert twice.fingerprint() != one.fingerprint()


def test_sources_compare_and_hash_as_configuration():
  assert FileSource("a.jsonl") == FileSource(["a.jsonl"])
  assert hash(TfdsSource("x", "train", {"prompt": "q"})) == hash(
    TfdsSource("x", "train", (("prompt", "q"),))
  )


def test_parquet_rows_are_records(tmp_path):
  import pyarrow
  import pyarrow.parquet

  path = tmp_path / "pairs.bin"
  messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]] * 2
  table = pyarrow.table({"prompt": ["p", None], "chosen": messages, "rating": [1.0, float("nan")]})
  pyarrow.parquet.write_table(table, path)
  records, problems = split(FileSource(str(path)).records())
  assert problems == []
  assert [location.line for location, _ in records] == [1, 2]
  assert records[0][1]["chosen"] == messages[0]
  assert records[1][1]["prompt"] is None
  data = path.read_bytes()
  _, problems = split(written(tmp_path, data[: len(data) // 2]).records())
  assert [problem.whole for problem in problems] == [True]


def test_parquet_text_that_is_no_utf8_spoils_its_row_only(tmp_path):
  import pyarrow
  import pyarrow.parquet

  column = pyarrow.array([b"good", b"\xff"]).view(pyarrow.string())
  path = tmp_path / "bad.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), path)
  records, problems = split(FileSource(str(path)).records())
  assert len(records) == 1
  assert [(problem.line, problem.field, problem.whole) for problem in problems] == [
    (2, "prompt", False)
  ]


def test_values_of_tfds_become_plain():
  import numpy as np

  assert plain_value(np.array([b"a", b"b"], object)) == ["a", "b"]
  assert plain_value(np.float32(0.5)) == 0.5
  columns = {"role": np.array([b"user"], object), "content": np.array([b"q"], object)}
  assert plain_value(columns) == [{"role": "user", "content": "q"}]


def test_records_in_memory_have_a_fingerprint():
  one, other = RecordsSource((RAW,)), RecordsSource(({**RAW, "prompt": "q"},), name="x")
  assert one.fingerprint() == RecordsSource((dict(reversed(RAW.items())),), name="y").fingerprint()
  assert one.fingerprint() != other.fingerprint()
  assert fingerprint_records([RAW]) == one.fingerprint()
  assert parse_line(Location("f", 1), LINE) == (Location("f", 1), RAW)


@pytest.mark.slow
def test_a_tfds_split_with_a_mapping(tmp_path):
  import numpy as np
  import tensorflow_datasets as tfds

  class Pairs(tfds.core.GeneratorBasedBuilder):
    """Three pairs, one of them no UTF-8."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {"question": tfds.features.Text(), "answers": {"a": tfds.features.Text()}}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i, answer in enumerate([b"x", b"\xff", b"z"]):
        yield i, {"question": f"q{i}", "answers": {"a": answer}}

  Pairs(data_dir=str(tmp_path)).download_and_prepare()
  source = TfdsSource(
    "pairs", "train", {"prompt": "question", "chosen": "answers/a"}, str(tmp_path)
  )
  records, problems = split(source.records())
  assert sorted(raw["prompt"] for _, raw in records) == ["q0", "q2"]
  assert all(set(raw) == {"prompt", "chosen"} for _, raw in records)
  assert [problem.field for problem in problems] == ["chosen"]
  assert source.fingerprint() == source.fingerprint()
  with pytest.raises(UserError, match="no feature 'answer'"):
    list(TfdsSource("pairs", "train", {"chosen": "answer"}, str(tmp_path)).records())
  with pytest.raises(UserError, match="cannot open"):
    list(TfdsSource("no_such_data", "train", data_dir=str(tmp_path)).records())
  with pytest.raises(UserError, match="cannot open"):
    list(TfdsSource("pairs", "nothing", data_dir=str(tmp_path)).records())
  assert np.isscalar(records[0][0].line)
