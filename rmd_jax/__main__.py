"""`python -m rmd_jax` is the command `rmd`."""

import sys

from rmd_jax.cli import main

sys.exit(main())
