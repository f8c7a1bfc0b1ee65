"""Reward model distillation in JAX: robust offline preference optimisation."""

__version__ = "0.1.0"
