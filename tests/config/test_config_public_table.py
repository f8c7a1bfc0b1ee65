"""Every name in the table can be imported, described and given its parameters."""

import dataclasses
import typing

import pytest

from rmd_jax.config import PUBLIC
from rmd_jax.config.names import lookup


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name(name):
  public = lookup(name)
  assert public is not None
  assert name == PUBLIC[name].split(":")[1]
  if isinstance(public.target, type):
    assert dataclasses.is_dataclass(public.target)
    assert public.target.__dataclass_params__.frozen
  if PUBLIC[name].startswith("rmd_jax."):  # types that cannot be read would check nothing
    hints = typing.get_type_hints(public.target)
    assert set(public.parameters) <= set(hints)
