"""Models: the decoder, its log-probabilities and samples, reward ensembles."""

from rmd_jax.models.decoder import Decoder
from rmd_jax.models.ensemble import RewardEnsemble
from rmd_jax.models.sampling import Samples

__all__ = ["Decoder", "RewardEnsemble", "Samples"]
