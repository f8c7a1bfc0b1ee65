"""Installs rmd_jax, the command `rmd`, and the gin files.

gin/ is not a Python package in the source tree (an __init__.py there would shadow gin-config when
Python runs from the root). It is installed as rmd_jax/gin, which rmd_jax.config searches first.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
  r'^__version__ = "(.+)"$', (ROOT / "rmd_jax" / "__init__.py").read_text("utf-8"), re.MULTILINE
).group(1)
README = ROOT / "README.md"

GIN_PACKAGES = {
  ".".join(["rmd_jax", *folder.relative_to(ROOT).parts]): str(folder.relative_to(ROOT))
  for folder in [ROOT / "gin", *sorted(p for p in (ROOT / "gin").rglob("*") if p.is_dir())]
}

setuptools.setup(
  name="rmd-jax",
  version=VERSION,
  description="Reward model distillation in JAX: robust offline preference optimisation",
  long_description=README.read_text("utf-8") if README.exists() else "",
  long_description_content_type="text/markdown",
  python_requires=">=3.11",
  packages=[*setuptools.find_packages(include=["rmd_jax", "rmd_jax.*"]), *GIN_PACKAGES],
  package_dir=GIN_PACKAGES,
  package_data={package: ["*.gin"] for package in GIN_PACKAGES},
  entry_points={"console_scripts": ["rmd = rmd_jax.cli:main"]},
  # Ranges that have been installed and tested together. flax 0.12 does not import on jax >= 0.11.1.
  install_requires=[
    "flax>=0.12.8,<0.13",
    "gin-config>=0.5,<0.6",
    "jax>=0.10.2,<0.11",
    "jaxtyping>=0.3.7,<0.4",
    "matplotlib>=3.10,<4",
    "numpy>=2.1,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pyarrow>=20",
    "sentencepiece>=0.2,<0.3",
    "seqio>=0.0.20,<0.1",
    "tensorboard>=2.20,<2.22",
    "tensorflow>=2.20,<2.22",
    "tensorflow-datasets>=4.9.9,<5",
  ],
  extras_require={
    "cuda": ["jax[cuda12]>=0.10.2,<0.11"],
    "dev": [
      "beartype>=0.22,<1",
      "hypothesis>=6.130,<7",
      "mypy>=1.18",
      "pytest>=8.4,<10",
      "pytest-xdist>=3.6,<4",
      "ruff>=0.14",
      "scipy>=1.14,<2",
      "wheel>=0.45",
    ],
    "hf": ["safetensors>=0.5", "tokenizers>=0.21", "transformers>=4.56"],
    "launch": ["xmanager>=0.7"],
    "t5x": ["tensorstore>=0.1.70", "zarr>=2.18"],
    "tpu": ["jax[tpu]>=0.10.2,<0.11"],
  },
)
