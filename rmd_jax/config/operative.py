"""The operative config: the bindings that count, in one text without includes."""

import math
from collections.abc import Iterable
from typing import Any

from rmd_jax.config.planning import Call
from rmd_jax.config.syntax import Key, Statement

HEADER = """\
# The bindings that this run reads, after all includes and overrides. This file makes the same run
# again: rmd run --gin_file=THIS_FILE. Lines that begin with # are defaults, for the reader.
"""


def operative_text(statements: Iterable[Statement], calls: Iterable[Call]) -> str:
  """A gin file of these statements, with the defaults of what they build as comments.

  Args:
    statements: one a key.
    calls: the plan, for the defaults.
  """
  macros: list[str] = []
  groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
  for statement in statements:
    key, line = statement.key, f"{statement.key} = {literal(statement.value)}"
    if key.is_macro:
      macros.append(line)
    else:
      groups.setdefault((key.name, key.scope), []).append(line)
  for call in calls:
    lines = groups.setdefault((call.public.name, ()), [])
    for name, parameter in call.public.parameters.items():
      if name not in call.arguments and not parameter.required:
        line = f"# {Key((), call.public.name, name)} = {parameter.default!r}"
        if line not in lines:
          lines.append(line)
  order = sorted(groups, key=lambda group: (group[0] != "Run", group))
  blocks = [macros, *(groups[group] for group in order)]
  return HEADER + "".join("\n" + "\n".join(block) + "\n" for block in blocks if block)


def literal(value: Any) -> str:
  """A parsed value as gin reads it."""
  if isinstance(value, list):
    return "[" + ", ".join(map(literal, value)) + "]"
  if isinstance(value, tuple):
    return "(" + "".join(f"{literal(item)}, " for item in value).rstrip() + ")"
  if isinstance(value, dict):
    return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
  if isinstance(value, float) and math.isinf(value):
    return "1e999" if value > 0 else "-1e999"  # gin has no word for infinity
  if isinstance(value, (bool, int, float, str, bytes)) or value is None:
    return repr(value)
  return str(value)  # a reference or a macro
