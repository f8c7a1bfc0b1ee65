"""What every stage of one pipeline run (one seed) shares."""

import dataclasses
from pathlib import Path

from rmd_jax.data.preference_data import Prepared
from rmd_jax.models.decoder import Decoder
from rmd_jax.training.partitioning import MeshConfig


@dataclasses.dataclass(frozen=True)
class Context:
  """The shared surroundings of the stages.

  Attributes:
    directory: the seed's folder, which holds a folder for each stage.
    seed: decides initialisation, order, subsets and samples.
    data: tokenised splits, demonstrations and vocabulary.
    policy: the policy's architecture, its vocabulary size filled in.
    mesh: sizes of the mesh axes.
    suffix: what progress lines add to a stage's name, to tell seeds apart.
  """

  directory: Path
  seed: int
  data: Prepared
  policy: Decoder
  mesh: MeshConfig
  suffix: str = ""
