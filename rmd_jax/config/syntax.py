"""From files and command-line bindings to statements, each with the place it comes from.

gin-config's parser reads the language. What it would do besides (import modules, register what they
hold, take any file that it can open) is refused here.
"""

import dataclasses
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gin import config_parser

from rmd_jax.config.values import Macro, Reference
from rmd_jax.errors import UserError

INSTALLED = Path(__file__).resolve().parents[1] / "gin"
SOURCE_TREE = Path(__file__).resolve().parents[2] / "gin"


@dataclasses.dataclass(frozen=True)
class Location:
  """A line of a file, or a flag of the command line (line 0)."""

  name: str
  line: int = 0

  @property
  def command_line(self) -> bool:
    """Whether it is a flag."""
    return self.line == 0

  def __str__(self) -> str:
    return f"{self.name}:{self.line}" if self.line else self.name


@dataclasses.dataclass(frozen=True)
class Key:
  """What a statement binds: a parameter, in a scope, or a macro (no parameter)."""

  scope: tuple[str, ...]
  name: str
  parameter: str

  @property
  def is_macro(self) -> bool:
    """Whether it is a macro: NAME = value."""
    return not self.parameter

  def __str__(self) -> str:
    text = "/".join([*self.scope, self.name])
    return f"{text}.{self.parameter}" if self.parameter else text


@dataclasses.dataclass(frozen=True)
class Statement:
  """`key = value`, as parsed."""

  key: Key
  value: Any
  location: Location
  file: Path | None


class _Delegate(config_parser.ParserDelegate):  # type: ignore[misc]
  """Turns @ and % into our values; gin's own would look them up in its global registry."""

  def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
    *scope, name = scoped_configurable_name.split("/")
    return Reference(tuple(scope), name, evaluate)

  def macro(self, macro_name: str) -> Macro:
    return Macro(macro_name)


def gin_directory() -> Path:
  """The gin files that come with the library: in the package, or beside it in a source tree."""
  return INSTALLED if INSTALLED.is_dir() else SOURCE_TREE


@dataclasses.dataclass(frozen=True)
class SearchPaths:
  """Folders that a name of a file is looked up in; none other is read by an include.

  Attributes:
    own: the folder of the file that was named on the command line; its includes may be there.
    common: the user's search paths, the current folder, the library's gin files.
  """

  common: tuple[Path, ...]
  own: tuple[Path, ...] = ()

  @classmethod
  def of(cls, search_paths: Sequence[str | Path]) -> "SearchPaths":
    """The common paths, those of the user first.

    Raises:
      UserError: one of them is no folder.
    """
    for path in search_paths:
      if not Path(path).is_dir():
        raise UserError(f"--gin_search_paths: {path} is no folder")
    return cls((*map(Path, search_paths), Path(), gin_directory()))

  def beside(self, file: Path) -> "SearchPaths":
    """These paths, and the folder of a file named by the user."""
    return SearchPaths(self.common, (file.parent,))

  def find(self, name: str) -> Path | None:
    """The file of that name in the first folder that has it."""
    for folder in (*self.own, *self.common):
      if (folder / name).is_file():
        return folder / name
    return None

  def holds(self, path: Path) -> bool:
    """Whether a file lies in one of the folders, links followed."""
    path = path.resolve()
    return any(path.is_relative_to(folder.resolve()) for folder in (*self.own, *self.common))

  def __str__(self) -> str:
    return ", ".join(str(folder.resolve()) for folder in (*self.own, *self.common))


def read(name: str, location: Location | None = None) -> str:
  """The text of a gin file.

  Raises:
    UserError: it cannot be read, or is not UTF-8; the line is named.
  """
  at = f"{location}: " if location else ""
  try:
    data = Path(name).read_bytes()
  except OSError as error:
    raise UserError(f"{at}cannot read {name}: {error.strerror}") from error
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    byte = data[error.start]
    raise UserError(
      f"{name}:{line}: byte 0x{byte:02x} is not UTF-8; gin files are UTF-8, save it as that"
    ) from error
  return text.replace("\r\n", "\n").replace("\r", "\n")


class Reader:
  """Reads files named by the user and all that they include, each file once."""

  def __init__(self) -> None:
    self.statements: list[Statement] = []
    self.files: set[Path] = set()
    self._open: list[Path] = []

  def user_file(self, name: str, paths: SearchPaths) -> None:
    """Reads a file given on the command line: a path, or a name in the search paths.

    Raises:
      UserError: see `load`.
    """
    path = Path(name) if Path(name).is_absolute() else paths.find(name)
    if path is None:
      raise UserError(f"--gin_file={name}: no such file; looked in {paths}{_t5x_hint(name)}")
    self._file(path, paths.beside(path), Location(f"--gin_file={name}"))

  def _file(self, path: Path, paths: SearchPaths, location: Location) -> None:
    real = path.resolve()
    if real in self._open:
      chain = " -> ".join(p.name for p in [*self._open[self._open.index(real) :], real])
      raise UserError(f"{location}: circular include: {chain}")
    if real in self.files:
      return
    self.files.add(real)
    self._open.append(real)
    first: dict[Key, Location] = {}
    for item in parse(str(path), read(str(path), location)):
      if isinstance(item, Statement):
        if item.key in first:
          raise UserError(
            f"{item.location}: {item.key} is bound twice in this file, first in line "
            f"{first[item.key].line}; keep one"
          )
        first[item.key] = item.location
        self.statements.append(dataclasses.replace(item, file=real))
      else:
        self._include(item, paths, first)
    self._open.pop()

  def _include(self, include: "Include", paths: SearchPaths, first: dict[Key, Location]) -> None:
    name, location = include.name, include.location
    path = Path(name) if Path(name).is_absolute() else paths.find(name)
    if path is None or not path.is_file():
      raise UserError(f"{location}: no file {name} to include; looked in {paths}{_t5x_hint(name)}")
    if not paths.holds(path):
      raise UserError(
        f"{location}: {name} lies outside the search paths ({paths}); "
        "add its folder with --gin_search_paths, if you trust what is there"
      )
    start = len(self.statements)
    self._file(path, paths, location)
    for statement in self.statements[start:]:
      if statement.key in first:
        raise UserError(
          f"{first[statement.key]}: {statement.key} is bound again in {statement.location}, which "
          f"is included below, in line {location.line}, and would win; put the include first"
        )


@dataclasses.dataclass(frozen=True)
class Include:
  """`include 'name'`."""

  name: str
  location: Location


def parse(name: str, text: str) -> Iterator[Statement | Include]:
  """The statements of a file's text, in order.

  Raises:
    UserError: a syntax error, an import; with file and line.
  """
  parser = None
  lines = text.split("\n")
  try:
    parser = config_parser.ConfigParser(text, _Delegate())
    while (item := parser.parse_statement()) is not None:
      location = Location(name, item.location.line_num)
      if isinstance(item, config_parser.ImportStatement):
        raise UserError(f"{location}: {_import_refusal(item.format())}")
      if isinstance(item, config_parser.IncludeStatement):
        yield Include(item.filename, location)
      elif isinstance(item, config_parser.BindingStatement):
        yield Statement(_key(item), item.value, location, None)
  except (SyntaxError, ValueError, tokenize.TokenError, StopIteration) as error:
    if isinstance(error, UserError):
      raise
    line = _line_of(error, parser)
    content = lines[line - 1].strip() if line <= len(lines) else ""
    hint = _syntax_hint(content)
    raise UserError(f"{name}:{line}: {_syntax_message(error)} in: {content}{hint}") from error


def parse_flag(binding: str) -> Statement:
  """A command-line binding, `X=Y` or `Configurable.parameter=Y`, without the `--gin.`.

  Raises:
    UserError: no such form; a value that lacks its quotes gets a hint.
  """
  left, equals, right = binding.partition("=")
  flag = f"--gin.{left.strip()}"
  if not equals or not right.strip():
    raise UserError(f"{flag} needs a value: {flag}=VALUE")
  try:
    items = list(parse(flag, f"{left.strip()} = {right.strip()}\n"))
  except UserError as error:
    if isinstance(error.__cause__, (SyntaxError, ValueError, tokenize.TokenError)):
      raise UserError(f"{flag}={right}: {_flag_hint(flag, right.strip())}") from error
    raise
  if len(items) != 1 or not isinstance(items[0], Statement):
    raise UserError(f"{flag}={right}: only a binding can be given as a flag")
  return dataclasses.replace(items[0], location=Location(flag))


def _key(item: Any) -> Key:
  scope = tuple(item.scope.split("/")) if item.scope else ()
  if not item.arg_name:
    return Key((), "/".join([*scope, item.selector]), "")
  return Key(scope, item.selector, item.arg_name)


def _line_of(error: Exception, parser: Any) -> int:
  if isinstance(error, SyntaxError) and error.lineno is not None:
    return error.lineno
  if isinstance(error, tokenize.TokenError):
    return int(error.args[1][0])
  token = getattr(parser, "current_token", None)
  return 1 if token is None else int(token.start[0])


def _syntax_message(error: Exception) -> str:
  if isinstance(error, tokenize.TokenError):
    return str(error.args[0])
  text = error.msg if isinstance(error, SyntaxError) else str(error)
  if "Failed to parse token" in text:
    return "a value that gin cannot read"
  return text.strip().rstrip(".") or "unexpected end"


def _import_refusal(line: str) -> str:
  if "__gin__" in line or re.search(r"\b(t5x|seqio|flaxformer)\b", line):
    return (
      f"`{line}`: this is a file of T5X's kind, which imports modules and registers what they "
      "hold. Importing runs code, so rmd_jax reads no such file; write the values that you need as "
      "bindings of rmd_jax's own names (gin/ has examples)"
    )
  return (
    f"`{line}`: a configuration imports nothing, because importing runs code; "
    "name your own module on the command line, --module=package.module"
  )


def _t5x_hint(name: str) -> str:
  if not re.search(r"\b(t5x|flaxformer)\b", name):
    return ""
  return ". T5X's own files import modules, which runs code: rmd_jax does not read them"


WORDS = {"true": "True", "false": "False", "none": "None", "null": "None"}


def _syntax_hint(content: str) -> str:
  left, equals, right = content.partition("=")
  right = right.strip()
  if right in WORDS:
    return f"; write {WORDS[right]}"
  if equals and right and right[0] not in "\"'([{@%":
    return f'; text needs quotes: {left.strip()} = "{right}"'
  return ""


def _flag_hint(flag: str, value: str) -> str:
  if value in WORDS:
    return f"write {flag}={WORDS[value]}"
  if value[0] in "([{":
    return (
      "text in a list needs quotes, and the shell takes one pair away: "
      f"""{flag}='["first", "second"]'"""
    )
  if value[0] in "\"'@%":
    return "gin cannot read this value"
  return f"""text needs quotes, and the shell takes one pair away: {flag}='"{value}"'"""
