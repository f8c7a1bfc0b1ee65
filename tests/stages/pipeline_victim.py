"""A pipeline in a process of its own that sends itself a signal, at an exact moment.

  python pipeline_victim.py RUN_DIR SIGNAL STAGE COUNT BINDING…

The moment is the COUNT-th write, sync or rename while STAGE (its folder's name) is being made; it
is sent before the operation. With COUNT 0 nothing is sent.
"""

import os
import sys
from pathlib import Path

from rmd_jax import config
from rmd_jax.stages import artefacts, run
from rmd_jax.training import files


def main(directory: str, number: str, stage: str, count: str, *bindings: str) -> int:
  """Runs it; the exit status."""
  making: list[str] = []
  left = int(count)
  produce = artefacts.produce

  def watched(place, key, make, **rest):
    making.append(place.relative_to(Path(directory) / "seed_0").as_posix())
    try:
      return produce(place, key, make, **rest)
    finally:
      making.pop()

  def armed(operation):
    def around(*arguments):
      nonlocal left
      if making == [stage]:
        left -= 1
        if left == 0:
          os.kill(os.getpid(), int(number))
      return operation(*arguments)

    return around

  artefacts.produce = watched
  for name in ("_write", "_fsync", "_rename"):
    setattr(files, name, armed(getattr(files, name)))
  run.write_report, run.terminal_table = lambda directory: None, lambda directory: ""
  loaded = config.load([str(Path(__file__).with_name("tiny.gin"))], bindings)
  return run.run(loaded, Path(directory))


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
