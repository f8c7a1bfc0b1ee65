"""Everything that a configuration must not say is refused, with the place, and nothing is built.

The toy pipeline takes two lines, so that the first line of a test's own text is line 3.
"""

import pytest

from rmd_jax.config import load
from rmd_jax.errors import UserError


def refusal(*args, **kwargs) -> str:
  with pytest.raises(UserError) as caught:
    load(*args, **kwargs)
  return str(caught.value)


@pytest.mark.parametrize(
  "text, line, expected",
  [
    # names
    ("Trainin.steps = 3", 3, "there is no Trainin; did you mean Training?"),
    ("Align.training = @Trainning()", 3, "there is no @Trainning(); did you mean Training?"),
    ("Align.trainin = @Training()", 3, "Align has no parameter trainin; did you mean training?"),
    ("Align.zzz = 3", 3, "Align has no parameter zzz; it has training, objective, hyper"),
    ("run.seeds = [1]", 3, "there is no run; did you mean Run?"),
    # bindings and macros that nothing uses
    ("\nTraining.steps = 3", 4, "Training.steps is not used: the pipeline (Run) reaches no @Train"),
    ("DPO.beta = 0.1", 3, "DPO.beta is not used"),
    ("SEED = 3", 3, "nothing reads the macro SEED"),
    ("SEEDS = [1]\nSEDS = [2]\nRun.seeds = %SEEDS", 4, "the macro SEDS; did you mean SEEDS?"),
    ("A = %B\nB = 2", 3, "nothing reads the macro A"),
    ("Align.training = @Training()\na/Training.steps = 3", 4, "a/Training.steps is not used"),
    ("Training = 3", 3, "Training is no macro; bind one of its parameters, Training.parameter"),
    # macros that are read
    ("Run.seeds = %SEEDS", 3, "nothing sets the macro %SEEDS; set it with --gin.SEEDS=VALUE"),
    ("SEEDS = [1]\nRun.seeds = %SEED", 4, "nothing sets the macro %SEED; did you mean SEEDS?"),
    ("A = %B\nB = %A\nRun.seeds = %A", 4, "%A refers to itself"),
    ("SEEDS = %gin.REQUIRED\nRun.seeds = %SEEDS", 3, "SEEDS must be set: --gin.SEEDS=VALUE"),
    ("Run.seeds = %gin.REQUIRED", 3, "Run.seeds must be set: --gin.Run.seeds=VALUE"),
    ("Align.objective = @a/IPO()", 3, "@a/IPO() needs tau, which nothing sets: --gin.a/IPO.tau="),
    (
      "Align.objective = @IPO()",
      3,
      "@IPO() needs tau, which nothing sets: --gin.IPO.tau=VALUE, or",
    ),
    # one file, one binding
    (
      "Run.seeds = [1]\n\nRun.seeds = [2]",
      5,
      "Run.seeds is bound twice in this file, first in line 3",
    ),
    ("A = 1\nA = 1\nRun.seeds = [%A]", 4, "A is bound twice in this file"),
    ("Run:\n  seeds = [1]\n  label = 'a'\n  seeds = [2]", 6, "Run.seeds is bound twice"),
    # types
    ("Run.seeds = 1", 3, "Run.seeds: expected a list of an integer, not 1"),
    ("Run.seeds = [1, 2.5]", 3, "Run.seeds: item 2: expected an integer, not 2.5"),
    ("Run.seeds = [True]", 3, "item 1: expected an integer, not True"),
    ("Run.sizes = [1, 2, 3]", 3, "expected 2 items, not 3"),
    ("Run.label = 3", 3, 'Run.label: expected a string, not 3; text needs quotes: "3"'),
    ("Run.label = None", 3, "expected a string, not None"),
    ("Align.training = None", 3, "expected @Training(), not None"),
    ("Align.training = @World()", 3, "expected @Training(), not @World()"),
    ("Align.training = @Training", 3, "not @Training; did you mean @Training()?"),
    ("Align.objective = @DPO\nDPO.beta = 1", 3, "not @DPO; did you mean @DPO()?"),
    ("Align.hyper = {'a': '1'}", 3, "Align.hyper: expected a dict {key: value} or None"),
    ("Align.training = @Training()\nTraining.donate = 1", 4, "expected True or False, not 1"),
    ("Align.training = @Training()\nTraining.steps = '3'", 4, "expected an integer, not '3'"),
    ("Align.training = @Training()\nTraining.learning_rate = True", 4, "a number, not True"),
    (
      "Align.training = @Training()\nTraining.schedule = 'cosin'",
      4,
      "one of 'constant', 'cosine' or a function (@name), not 'cosin'; did you mean cosine?",
    ),
    ("RATE = '1'\nAlign.hyper = {'a': 1}\nRun.sizes = [1, %RATE]", 5, "item 2: expected a number"),
    ("S = 'x'\nRun.seeds = %S", 3, "S, read by Run.seeds (run.gin:4): expected a list"),
    # objects in a circle
    ("Run.extra = @Loop()\nLoop.inner = [@Loop()]", 4, "@Loop() refers to itself"),
    ("Run.extra = %L\nL = @Loop\nLoop.inner = {'a': %L}", 5, "@Loop refers to itself"),
    # imports
    ("import os", 3, "`import os`: a configuration imports nothing, because importing runs code"),
    ("import os.path as p", 3, "name your own module on the command line, --module=package.module"),
    ("from __gin__ import dynamic_registration", 3, "this is a file of T5X's kind, which imports"),
    ("from t5x import models", 3, "this is a file of T5X's kind"),
    # files
    ("include 'none.gin'", 3, "no file none.gin to include; looked in "),
    ("include 't5x/configs/runs/finetune.gin'", 3, "T5X's own files import modules"),
    ("include 'run.gin'", 3, "circular include: run.gin -> run.gin"),
    # syntax
    ("Run.label = hello", 3, '; text needs quotes: Run.label = "hello"'),
    ("Run.label = /a/b.jsonl", 3, 'text needs quotes: Run.label = "/a/b.jsonl"'),
    ("Align.hyper = none", 3, "; write None"),
    ("Run.seeds = [1,", 4, "EOF in multi-line statement"),
    ("Run.seeds [1]", 3, "in: Run.seeds [1]"),
    ("Run.label = 'open", 3, "in: Run.label = 'open"),
    ("Run.seeds = [1] 2", 3, "Expected newline in: Run.seeds = [1] 2"),
    ("Run.label = $HOME", 3, 'text needs quotes: Run.label = "$HOME"'),
    # what an object itself refuses
    ("Align.objective = @IPO()\nIPO.tau = 0", 3, "@IPO(): tau must be positive, not 0.0"),
    # the table names what cannot be imported
    (
      "Run.label = @Missing()",
      3,
      "Missing is toy_pipeline_missing:Missing, which cannot be imported",
    ),
    ("Run.label = @Gone()", 3, "Gone is toy_pipeline:Gone, which cannot be imported"),
  ],
)
def test_refused_with_file_and_line(write, text, line, expected):
  write(text)
  message = refusal(["run.gin"])
  assert f"run.gin:{line}: " in message
  assert expected in message


def test_all_faults_are_told_at_once(write):
  write("Run.seeds = 1\nSEED = 3\nDPO.beta = 2")
  message = refusal(["run.gin"])
  assert [line.split(": ")[0] for line in message.split("\n")] == [
    f"run.gin:{n}" for n in (3, 4, 5)
  ]


def test_root_without_what_it_needs(write):
  write("Run.source = @World()", pipeline=False)
  assert "@Run() needs align, which nothing sets: --gin.Run.align=VALUE" in refusal(["run.gin"])


@pytest.mark.parametrize(
  "data, line",
  [(b"# caf\xe9\n", 1), (b"# one\n\n# caf\xc3\xa9\n# \xff\n", 4), ("# a\n".encode("utf-16"), 1)],
)
def test_not_utf8(write, data, line):
  path = write("")
  path.write_bytes(data)
  message = refusal(["run.gin"])
  assert message.startswith(f"run.gin:{line}: byte 0x")
  assert "is not UTF-8" in message


def test_utf8_with_bom_and_windows_lines_is_read(write):
  path = write("")
  path.write_bytes(b"\xef\xbb\xbf# caf\xc3\xa9\r\n" + path.read_bytes().replace(b"\n", b"\r\n"))
  assert load(["run.gin"]).root.seeds == (0,)


def test_include_outside_the_search_paths(write, tmp_path):
  (tmp_path / "secret.gin").write_text("Run.seeds = [1]\n")
  for name in ("../secret.gin", str(tmp_path / "secret.gin")):
    write(f"include '{name}'")
    assert f"run.gin:3: {name} lies outside the search paths" in refusal(["run.gin"])
    assert load(["run.gin"], search_paths=[tmp_path]).root.seeds == (1,)


def test_link_out_of_the_search_paths(write, tmp_path):
  (tmp_path / "secret.gin").write_text("Run.seeds = [1]\n")
  (tmp_path / "here" / "link.gin").symlink_to(tmp_path / "secret.gin")
  write("include 'link.gin'")
  assert "run.gin:3: link.gin lies outside the search paths" in refusal(["run.gin"])


def test_a_file_may_include_its_own_neighbours_and_no_other_s(write, tmp_path):
  write("", name="a/run.gin")
  write("include 'part.gin'", name="a/run.gin")
  write("Run.seeds = [1]", name="a/part.gin", pipeline=False)
  assert load(["a/run.gin"]).root.seeds == (1,)
  write("include 'part.gin'", name="b/run.gin")
  assert "b/run.gin:3: no file part.gin" in refusal(["a/run.gin", "b/run.gin"])


def test_longer_circle_names_the_chain(write):
  write("include 'one.gin'")
  write("include 'two.gin'", name="one.gin", pipeline=False)
  write("\ninclude 'one.gin'", name="two.gin", pipeline=False)
  assert refusal(["run.gin"]) == "two.gin:2: circular include: one.gin -> two.gin -> one.gin"


def test_include_below_a_binding_that_it_overrides(write):
  write("Run.seeds = [1]\ninclude 'part.gin'")
  write("Run.seeds = [2]", name="part.gin", pipeline=False)
  message = refusal(["run.gin"])
  assert message.startswith("run.gin:3: Run.seeds is bound again in part.gin:1, which is included")


def test_no_file(toy):
  assert "--gin_file=FILE" in refusal([])
  assert "--gin_file=none.gin: no such file; looked in " in refusal(["none.gin"])
  assert "--gin_file=t5x/x.gin: no such file" in refusal(["t5x/x.gin"])
  assert "--gin_search_paths: nowhere is no folder" in refusal(["a"], search_paths=["nowhere"])


def test_folder_as_file(write, tmp_path):
  assert "Is a directory" in refusal([str(tmp_path)])


# --- flags


@pytest.mark.parametrize(
  "binding, expected",
  [
    ("DATA_FILES=/a/b.jsonl", """--gin.DATA_FILES='"/a/b.jsonl"'"""),
    ("DATA_FILES=b.jsonl", """--gin.DATA_FILES='"b.jsonl"'"""),
    ("DATA_FILES=2024.jsonl", """--gin.DATA_FILES='"2024.jsonl"'"""),
    ("DATA_FILES=~/b.jsonl", """--gin.DATA_FILES='"~/b.jsonl"'"""),
    ("DATA_FILES=[a, b]", """--gin.DATA_FILES='["first", "second"]'"""),
    ("DATA_FILES='a", "gin cannot read this value"),
    ("DATA_FILES=true", "write --gin.DATA_FILES=True"),
    ("DATA_FILES=", "--gin.DATA_FILES needs a value: --gin.DATA_FILES=VALUE"),
    ("DATA_FILES", "--gin.DATA_FILES needs a value: --gin.DATA_FILES=VALUE"),
    (
      "DATA_FILES=3",
      "--gin.DATA_FILES: DATA_FILES, read by Files.files (run.gin:5): expected a st",
    ),
    (
      "DATA_FILE='a'",
      "--gin.DATA_FILE: nothing reads the macro DATA_FILE; did you mean DATA_FILES",
    ),
    ("Files.file='a'", "--gin.Files.file: Files has no parameter file; did you mean files?"),
    ("World.size=3", "--gin.World.size: World.size is not used"),
    ("include 'x.gin'", "needs a value"),
    ("import os; x=1", "--gin.import os; x"),
  ],
)
def test_flags(write, binding, expected):
  write(
    "Run.align = @Align()\nRun.source = @Files()\nDATA_FILES = %gin.REQUIRED\n\n"
    "Files.files = %DATA_FILES",
    pipeline=False,
  )
  assert expected in refusal(["run.gin"], [binding])


def test_flag_that_another_binding_hides(write):
  write("RATE = 2.0\nAlign.training = @Training()\nTraining.learning_rate = %RATE")
  message = refusal(["run.gin"], ["RATE=3.0", "Training.learning_rate=4.0"])
  assert "--gin.RATE: has no effect" in message


# --- objectives


OBJECTIVES = {
  "objectives/dpo.gin": "Align.objective = @DPO()\nDPO.beta = %BETA\n",
  "objectives/ipo.gin": "Align.objective = @IPO()\nTAU = %gin.REQUIRED\nIPO.tau = %TAU\n",
}


@pytest.fixture
def objectives(write):
  for name, text in OBJECTIVES.items():
    write(text, name=name, pipeline=False)
  return write


@pytest.mark.parametrize(
  "text, expected",
  [
    ("Run.objectives = ['dpx']", "run.gin:3: there is no objective dpx; did you mean dpo?"),
    ("Run.objectives = ['dpo']", "dpo.gin:2: nothing sets the macro %BETA"),
    ("Run.objectives = ['ipo']", "ipo.gin:2: TAU must be set: --gin.TAU=VALUE"),
    ("Run.objectives = ['ipo']\nTAU = 1\nBETA = 2", "run.gin:5: nothing reads the macro BETA"),
    ("Run.objectives = ['ipo']\nTAU = '1'", "run.gin:4: TAU, read by IPO.tau ("),
    ("Run.objectives = ['ipo']\nTAU = -1", "@IPO(): tau must be positive"),
    ("Run.objectives = ['dpo']\nBETA = 1\nIPO.tau = 1", "run.gin:5: IPO.tau is not used"),
    ("Run.objectives = 'dpo'\nBETA = 1", "run.gin:3: Run.objectives: expected a list of a string"),
    (
      "Run.objectives = ['dpo']\nBETA = 1\nAlign.objective = @DPO()",
      "run.gin:5: Align.objective is bound, and Run.objectives (run.gin:3) lists objectives too",
    ),
    (
      "Run.objectives = ['own.gin']",
      "own.gin:1: the objective own.gin has no line Align.objective",
    ),
    (
      "include 'part.gin'\nRun.objectives = ['mine.gin']",
      "part.gin, as the run does; with Run.objectives, only one of them may",
    ),
  ],
)
def test_objectives(objectives, text, expected):
  objectives("DPO.beta = 3", name="own.gin", pipeline=False)
  objectives("BETA = 3", name="part.gin", pipeline=False)
  objectives("include 'objectives/dpo.gin'\ninclude 'part.gin'", name="mine.gin", pipeline=False)
  objectives(text)
  assert expected in refusal(["run.gin"])


def test_unused_binding_in_an_objective_s_file(objectives):
  objectives("X = 1\nAlign.objective = @DPO()\nDPO.beta = 1", name="own.gin", pipeline=False)
  objectives("Run.objectives = ['own.gin']")
  assert "own.gin:1: nothing reads the macro X" in refusal(["run.gin"])
