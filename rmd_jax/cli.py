"""The command `rmd`: flags in, exit status out. Each command imports what it needs when it runs.

Exit status: 0 done; 1 failed; 2 bad usage, configuration or data; 130 Ctrl-C; 143 stopped by
SIGTERM after saving.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import rmd_jax
from rmd_jax.errors import RunError, UserError

STAGES = {
  "run": "the whole pipeline: every stage whose result is missing or whose inputs changed",
  "sft": "supervised fine-tuning, which makes the reference policy",
  "reward": "train the reward models (and the judge, if the run has one)",
  "score": "store reference log-probabilities and rewards of every example",
  "align": "train the policies, one for each objective",
  "evaluate": "sample from the policies and judge the samples",
  "report": "write the report again, of a run whose stages are finished",
}

EPILOG = """\
examples:
  rmd run --gin_file=runs/quickstart.gin
  rmd run --gin_file=runs/jsonl.gin --gin.DATA_FILES='"pairs.jsonl.gz"'
  rmd align --gin_file=runs/jsonl.gin --gin.DATA_FILES='"pairs.jsonl.gz"' --gin.BETA=0.3
  rmd validate pairs.jsonl.gz

exit status: 0 done, 1 failed, 2 bad usage, configuration or data, 130 Ctrl-C,
143 stopped by SIGTERM after saving
"""


def parser() -> argparse.ArgumentParser:
  """The command line. `--gin.X=Y` is taken out of it by `split_bindings` first."""
  top = argparse.ArgumentParser(
    prog="rmd",
    description=rmd_jax.__doc__,
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  top.add_argument("--version", action="version", version=f"rmd {rmd_jax.__version__}")
  commands = top.add_subparsers(dest="command", metavar="command", required=True)
  for name, text in STAGES.items():
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    _add_config_flags(command)
  _add_validate(commands)
  return top


def _add_config_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    "--gin_file",
    action="append",
    default=[],
    metavar="FILE",
    help="a gin file: a path, or a name in the search paths (runs/quickstart.gin comes with "
    "the library); repeat it to add files, later ones win",
  )
  command.add_argument(
    "--gin.NAME=VALUE",  # for the help alone: split_bindings takes these flags out
    action="store_true",
    help="set a macro (--gin.BETA=0.1) or a parameter (--gin.Training.steps=100); wins over files. "
    """Text needs quotes of its own: --gin.DATA_FILES='"pairs.jsonl"'""",
  )
  command.add_argument(
    "--gin_search_paths",
    action="append",
    default=[],
    metavar="FOLDER[,FOLDER]",
    help="folders that gin files may be included from, searched before the current folder and the "
    "library's own files",
  )
  command.add_argument(
    "--module",
    action="append",
    default=[],
    metavar="PACKAGE.MODULE",
    help="a Python module of yours to import; it names its objects by rmd_jax.config.public",
  )
  command.add_argument(
    "--run_dir",
    type=Path,
    metavar="FOLDER",
    help="where results go; by default runs/NAME, NAME being that of the last gin file",
  )


def _add_validate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
  text = "check preference files, and say what a run would leave out, with file and line"
  command = commands.add_parser("validate", help=text, description=text, allow_abbrev=False)
  command.add_argument("files", nargs="+", metavar="FILE", help="JSONL, JSONL.gz or Parquet")
  command.add_argument(
    "--max_bad_fraction",
    type=fraction,
    default=0.0,
    metavar="F",
    help="the share of unusable records to tolerate, 0 by default",
  )
  command.add_argument(
    "--show",
    type=count,
    default=0,
    metavar="N",
    help="print N records as the model will see them",
  )
  for part in ("prompt", "response"):
    command.add_argument(
      f"--{part}_length",
      type=count,
      metavar="N",
      help=f"tokens of the {part}, to count what is truncated",
    )
  command.add_argument(
    "--vocabulary",
    default="bytes",
    metavar="bytes|FILE",
    help="bytes, or the path of a SentencePiece model",
  )


def fraction(text: str) -> float:
  value = float(text)
  if not 0 <= value <= 1:
    raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
  return value


def count(text: str) -> int:
  value = int(text)
  if value < 0:
    raise argparse.ArgumentTypeError(f"{text} is negative")
  return value


def split_bindings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """Separates `--gin.X=Y` from the other arguments.

  Returns:
    The bindings, `X=Y`, and the rest.
  """
  bindings = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
  return bindings, [a for a in arguments if not a.startswith("--gin.")]


def run_directory(options: argparse.Namespace) -> Path:
  """--run_dir, or runs/NAME after the last gin file."""
  chosen: Path | None = options.run_dir
  return Path("runs") / Path(options.gin_file[-1]).stem if chosen is None else chosen


def _stage(options: argparse.Namespace, bindings: list[str]) -> int:
  from rmd_jax import config

  loaded = config.load(
    options.gin_file,
    bindings,
    [path for paths in options.gin_search_paths for path in paths.split(",")],
    options.module,
  )
  from rmd_jax.stages import run

  only = None if options.command == "run" else options.command
  return run.run(loaded, run_directory(options), only=only)


def _validate(options: argparse.Namespace) -> int:
  from rmd_jax.data import validate, vocabulary

  return validate.main(
    options.files,
    max_bad_fraction=options.max_bad_fraction,
    show=options.show,
    prompt_length=options.prompt_length,
    response_length=options.response_length,
    vocabulary=None
    if options.vocabulary == "bytes"
    else vocabulary.SentencePieceVocabulary(options.vocabulary),
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    arguments: those after the program's name; by default those of this process.

  Returns:
    The exit status. argparse itself exits, with 2, where the usage is wrong.
  """
  bindings, rest = split_bindings(sys.argv[1:] if arguments is None else arguments)
  command_line = parser()
  options = command_line.parse_args(rest)
  command = f"{command_line.prog} {options.command}"
  if bindings and options.command == "validate":
    command_line.error(f"validate takes no --gin.{bindings[0].partition('=')[0]}")
  try:
    status = _validate(options) if options.command == "validate" else _stage(options, bindings)
    sys.stdout.flush()
  except UserError as error:
    print(f"{command}: {error}", file=sys.stderr)
    return 2
  except RunError as error:
    print(f"{command}: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f"{command}: stopped by Ctrl-C; the same command goes on from here", file=sys.stderr)
    return 130
  except BrokenPipeError:  # `rmd validate FILE | head`: whoever read has what he wanted
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  return status
