"""What every stage of one pipeline run (one seed) shares."""

import dataclasses
from functools import cached_property
from pathlib import Path

from rmd_jax.data.preference_data import PreferenceData, Prepared
from rmd_jax.models.decoder import Decoder
from rmd_jax.training.partitioning import MeshConfig


@dataclasses.dataclass(frozen=True)
class Context:
  """The shared surroundings of the stages.

  Attributes:
    directory: the seed's folder, which holds a folder for each stage.
    seed: decides initialisation, order, subsets and samples.
    source: the preference data, not yet read.
    architecture: the policy's architecture; its vocabulary size is the data's.
    mesh: sizes of the mesh axes.
    suffix: what progress lines add to a stage's name, to tell seeds apart.
  """

  directory: Path
  seed: int
  source: PreferenceData
  architecture: Decoder
  mesh: MeshConfig
  suffix: str = ""

  @cached_property
  def data(self) -> Prepared:
    """Tokenised splits, demonstrations and vocabulary; read when a stage first needs them."""
    return self.source.prepare(self.directory / "data")

  @cached_property
  def policy(self) -> Decoder:
    """The policy's architecture with the vocabulary's size filled in."""
    return dataclasses.replace(self.architecture, vocab_size=self.data.vocabulary.size)
