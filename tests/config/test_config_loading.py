"""What a configuration means, and that its operative text means the same."""

import pickle
import sys

import pytest

from rmd_jax.config import Bound, FrozenMapping, Made, canonical, load, public
from rmd_jax.errors import UserError

EVERYTHING = """\
include 'part.gin'

RATE = 1          # an integer where a number is wanted
SOURCE = @Files()
RHO = None

Run:
  source = %SOURCE
  align = @Align()
  seeds = [1, 2]
  sizes = (3, %RATE)
  label = 'it\\'s "quoted"'

Files.files = ('a.jsonl', "b.jsonl")
Files.rho = %RHO
Align.training = @slow/Training()
Align.objective = @DPO()
Align.hyper = {'a': 1, 'b': -2.5e-3}
Training.steps = 5
slow/Training.steps = 50
Training.learning_rate = 1e999
Training.schedule = @ramp
DPO.beta = %BETA
DPO.gamma = @make_ramp()
make_ramp.slope = 2.0
ramp.slope = 3.0
"""


@pytest.fixture
def everything(write):
  write("BETA = 0.1\n", name="part.gin", pipeline=False)
  write(EVERYTHING, pipeline=False)
  return "run.gin"


def test_values(everything, toy):
  root = load([everything]).root
  assert root.source == toy.Files(files=("a.jsonl", "b.jsonl"), rho=None)
  assert root.seeds == (1, 2)
  assert root.sizes == (3, 1.0)
  assert [type(size) for size in root.sizes] == [int, float]
  assert root.label == 'it\'s "quoted"'
  assert root.align.hyper == {"a": 1.0, "b": -2.5e-3}
  assert all(type(value) is float for value in root.align.hyper.values())
  training = root.align.training
  assert (training.steps, training.learning_rate) == (50, float("inf"))
  assert training.schedule == Bound(toy.ramp, FrozenMapping({"slope": 3.0}))
  assert training.schedule(2) == 6.0
  assert root.align.objective.gamma == Made(toy.make_ramp, FrozenMapping({"slope": 2.0}), len)
  assert root.align.objective.gamma(3) == 6.0


def test_operative_text_makes_the_same_root(everything, write):
  config = load([everything], ["BETA=0.3", "Training.donate=False"])
  write(config.operative, name="again.gin", pipeline=False)
  again = load(["again.gin"])
  assert canonical(again.root) == canonical(config.root)
  assert again.root == config.root
  assert again.operative == config.operative
  assert "BETA = 0.3" in config.operative
  assert "# DPO.label_smoothing = 0.0" in config.operative  # a default, for the reader


def test_loads_are_equal_independent_and_hashable(everything, write):
  first = load([everything])
  hash(first.root)
  write("")
  assert load(["run.gin"]).root.align.objective is None
  write(EVERYTHING, pipeline=False)
  second = load([everything])
  assert first.root == second.root
  assert hash(first.root) == hash(second.root)
  assert first.root.align.training.schedule(2) == 6.0  # not what was loaded last


def test_canonical_tells_what_matters(everything):
  base = canonical(load([everything]).root)
  for binding in (
    "BETA=0.2",  # not compared, yet in the key
    "make_ramp.slope=4.0",
    "ramp.slope=4.0",
    "Run.seeds=[1]",
    "Training.donate=False",
    "Align.hyper={'a': 2}",
    "Training.schedule='cosine'",
  ):
    assert canonical(load([everything], [binding]).root) != base, binding
  assert canonical(load([everything], ["Run.label='other'"]).root) == base  # key=False
  assert canonical(load([everything], ["BETA=1e-1"]).root) == base
  assert base == (
    "Run(source=Files(files=('a.jsonl','b.jsonl'),rho=None),align=Align(training=Training(steps=50,"
    "learning_rate=inf,schedule=toy_pipeline:ramp{'slope':3.0},donate=True),objective=DPO(beta=0.1,"
    "gamma=toy_pipeline:make_ramp{'slope':2.0}(),label_smoothing=0.0),hyper={'a':1.0,'b':-0.0025}),"
    "objectives=(),seeds=(1,2),sizes=(3,1.0),extra=None)"
  )


@pytest.mark.parametrize("value", [lambda x: x, object(), {1, 2}, range(3)])
def test_canonical_refuses_what_has_no_stable_text(value):
  with pytest.raises(TypeError, match="no stable text"):
    canonical((value,))


def test_later_wins(write):
  write("include 'part.gin'\nA = [2]\nRun.seeds = %A")
  write("A = [1]", name="part.gin", pipeline=False)
  write("A = [3]", name="over.gin", pipeline=False)
  assert load(["run.gin"]).root.seeds == (2,)
  assert load(["run.gin", "over.gin"]).root.seeds == (3,)
  assert load(["run.gin", "over.gin"], ["A=[4]"]).root.seeds == (4,)
  assert load(["run.gin"], ["A=[4]", "A=[5]"]).root.seeds == (5,)


def test_required_declares_and_does_not_unset(write):
  write("A = [2]\nRun.seeds = %A")
  write("A = %gin.REQUIRED", name="part.gin", pipeline=False)
  assert load(["run.gin", "part.gin"]).root.seeds == (2,)


def test_a_file_included_twice_is_read_once(write):
  write("include 'a.gin'\ninclude 'b.gin'\nRun.seeds = %A")
  write("A = [1]", name="base.gin", pipeline=False)
  write("include 'base.gin'\nA = [2]", name="a.gin", pipeline=False)
  write("include 'base.gin'", name="b.gin", pipeline=False)
  assert load(["run.gin"]).root.seeds == (2,)


def test_search_paths_come_first_then_here_then_the_library(write, tmp_path):
  write("include 'objectives/dpo.gin'", name="runs/run.gin")
  (tmp_path / "objectives").mkdir()
  (tmp_path / "objectives" / "dpo.gin").write_text("Run.seeds = [7]")
  assert load(["runs/run.gin"], search_paths=[tmp_path]).root.seeds == (7,)
  write("Run.seeds = [8]", name="objectives/dpo.gin", pipeline=False)
  assert load(["runs/run.gin"]).root.seeds == (8,)
  assert load(["runs/run.gin"], search_paths=[tmp_path]).root.seeds == (7,)
  write("Run.seeds = [9]", name="runs/objectives/dpo.gin", pipeline=False)
  assert load(["runs/run.gin"], search_paths=[tmp_path]).root.seeds == (9,)  # beside the file


def test_scopes(write, toy):
  write(
    "Align.training = @a/b/Training()\n"
    "Training.steps = 1\n"
    "a/Training.steps = 2\n"
    "a/Training.learning_rate = 2.0\n"
    "a/b/Training.learning_rate = 3.0\n"
    "Align.objective = @x/DPO()\n"
    "DPO.beta = 1\n"
    "DPO.gamma = 1.0\n"
    "x/DPO.gamma = @make_ramp()\n"
    "make_ramp.slope = 1.0\n"
    "x/make_ramp.slope = 2.0\n"
  )
  root = load(["run.gin"]).root
  assert root.align.training == toy.Training(steps=2, learning_rate=3.0)
  assert root.align.objective.gamma(1) == 2.0  # what a scoped object refers to inherits its scope


def test_a_flag_may_replace_what_reads_a_macro_of_the_file(write):
  write("RATE = 2.0\nAlign.training = @Training()\nTraining.learning_rate = %RATE")
  assert load(["run.gin"], ["Training.learning_rate=3.0"]).root.align.training.learning_rate == 3.0
  config = load(["run.gin"], ["Run.align=@Align()", "Align.training=@x/Training()"])
  assert config.root.align.training.learning_rate == 2.0


# --- objectives


@pytest.fixture
def several(write):
  write("Align.objective = @DPO()\nDPO.beta = %BETA", name="objectives/dpo.gin", pipeline=False)
  write(
    "include 'objectives/dpo.gin'\nGAMMA = %gin.REQUIRED\nSLOPE = 1\nDPO.gamma = %GAMMA\n"
    "DPO.label_smoothing = %SLOPE",
    name="objectives/pessimistic.gin",
    pipeline=False,
  )
  write("Align.objective = @IPO()\nIPO.tau = %TAU", name="objectives/ipo.gin", pipeline=False)
  write(
    "Run.objectives = ['dpo', 'pessimistic', 'ipo']\nBETA = 0.5\nGAMMA = 0.25\nTAU = 2\n"
    "Align.training = @Training()\nTraining.steps = 3"
  )
  return "run.gin"


def test_each_objective_on_its_own(several, toy):
  config = load([several])
  assert config.root.align.objective is None
  assert config.root.objectives == ("dpo", "pessimistic", "ipo")
  dpo, pessimistic, ipo = (config.with_objective(name) for name in config.root.objectives)
  assert dpo.objective == "dpo"
  assert dpo.root.align.objective.beta == 0.5
  assert dpo.root.align.objective.gamma == 0.0  # not the pessimistic one's
  assert pessimistic.root.align.objective.gamma == 0.25
  assert pessimistic.root.align.objective.label_smoothing == 1.0
  assert ipo.root.align.objective == toy.IPO(tau=2.0)
  assert ipo.root.objectives == ()
  assert ipo.root.align.training == config.root.align.training
  with pytest.raises(UserError, match=r"other is not among Run\.objectives, which lists dpo, pess"):
    config.with_objective("other")


def test_run_file_and_flags_win_over_an_objective_s_file(several):
  config = load([several], ["SLOPE=0.5", "GAMMA=4"])
  objective = config.with_objective("pessimistic").root.align.objective
  assert (objective.label_smoothing, objective.gamma) == (0.5, 4.0)


def test_operative_texts_with_objectives(several, write):
  config = load([several], ["SLOPE=0.5"])
  write(config.operative, name="again.gin", pipeline=False)
  again = load(["again.gin"])
  assert canonical(again.root) == canonical(config.root)
  for name in config.root.objectives:
    one = config.with_objective(name)
    assert canonical(again.with_objective(name).root) == canonical(one.root)
    write(one.operative, name="one.gin", pipeline=False)
    assert canonical(load(["one.gin"]).root) == canonical(one.root)


def test_fewer_objectives_by_a_flag(several):
  config = load([several], ["Run.objectives=['dpo']"])  # GAMMA and TAU of the file stay
  assert config.root.objectives == ("dpo",)
  with pytest.raises(UserError, match=r"^--gin.TAU: "):
    load([several], ["Run.objectives=['dpo']", "TAU=3"])


def test_an_overridden_list_may_share_files_with_the_run(several, write):
  config = load([several, "objectives/pessimistic.gin"], ["Run.objectives=[]"])
  assert config.root.align.objective.gamma == 0.25


def test_one_objective_by_include(several, write):
  write("include 'objectives/ipo.gin'\nTAU = 3")
  assert load(["run.gin"]).root.align.objective.tau == 3.0


def test_an_objective_by_its_path(several, write, tmp_path):
  own = tmp_path / "elsewhere" / "mine.gin"
  own.parent.mkdir()
  own.write_text("include 'more.gin'\nAlign.objective = @IPO()\n")
  (own.parent / "more.gin").write_text("IPO.tau = 9\n")
  write(f"Run.objectives = ['{own}']")
  assert load(["run.gin"]).with_objective(str(own)).root.align.objective.tau == 9.0


# --- a user's own objects


def test_public_is_a_decorator_and_a_call(write, toy):
  @public
  def mine(log_ratios, power=1.0):
    return log_ratios**power

  assert public(mine, name="same") is mine
  write("Align.objective = @mine\nmine.power = 2.0")
  assert load(["run.gin"]).root.align.objective(3.0) == 9.0
  write("Align.objective = @same")
  assert load(["run.gin"]).root.align.objective is mine


def test_public_refuses(toy):
  def mine():
    pass

  class Plain:
    pass

  with pytest.raises(ValueError, match=r"DPO is taken by toy_pipeline:DPO"):
    public(mine, name="DPO")
  with pytest.raises(ValueError, match="no name for gin"):
    public(mine, name="a.b")
  with pytest.raises(TypeError, match="frozen=True"):
    public(Plain)
  with pytest.raises(TypeError, match="only a function or a frozen dataclass"):
    public(3)
  public(mine, name="first")
  with pytest.raises(ValueError, match="first is taken by"):
    public(test_public_refuses, name="first")


@pytest.fixture
def modules(monkeypatch):
  before = set(sys.modules)
  monkeypatch.setattr(sys, "path", list(sys.path))
  yield
  for name in set(sys.modules) - before:
    del sys.modules[name]


@pytest.mark.parametrize(
  "name, text, expected",
  [
    ("none_such", None, "--module=none_such: No module named 'none_such'; it is looked for in the"),
    ("broken", "def f(:\n", "broken.py:1: invalid syntax"),
    ("imports", "import none_such\n", "--module=imports: No module named 'none_such'"),
  ],
)
def test_module_that_cannot_be_imported(write, modules, name, text, expected):
  write("")
  if text is not None:
    write(text, name=f"{name}.py", pipeline=False)
  with pytest.raises(UserError, match="--module=") as caught:
    load(["run.gin"], modules=[name])
  assert expected in str(caught.value)


def test_frozen_mapping():
  mapping = FrozenMapping({"a": 1})
  assert mapping == {"a": 1}
  assert hash(mapping) == hash(FrozenMapping({"a": 1}))
  assert pickle.loads(pickle.dumps(mapping)) == mapping
