"""Configuration: gin files in, frozen dataclasses out. No other module of the library knows gin.

The language is gin's, read by gin-config's own parser; what a file may do is less. It imports
nothing, reaches only the names in `PUBLIC` (and what a user's module adds by `public`), and every
name, value and file in it is checked before anything is built. See `load`.
"""

from rmd_jax.config.canonical import canonical
from rmd_jax.config.loading import Config, load
from rmd_jax.config.names import PUBLIC, public
from rmd_jax.config.values import Bound, FrozenMapping, Made

__all__ = ["PUBLIC", "Bound", "Config", "FrozenMapping", "Made", "canonical", "load", "public"]
