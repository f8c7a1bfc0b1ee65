"""Every name in the table can be imported, described and given its parameters."""

import dataclasses

import pytest

from rmd_jax.config import PUBLIC
from rmd_jax.config.names import lookup


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name(name):
  public = lookup(name)
  assert public is not None
  assert public.name == PUBLIC[name].split(":")[1]
  assert public.parameters or name in ("AllData", "ByteVocabulary")
  if isinstance(public.target, type):
    assert dataclasses.is_dataclass(public.target)
    assert public.target.__dataclass_params__.frozen
  for parameter in public.parameters.values():
    assert not isinstance(parameter.annotation, str)
