"""What a checkpoint says of itself: the names of its leaves, its sums, its parameters' identity."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmd_jax.training import files

FORMAT = 1
NAME = "manifest.json"


def _name(key: Any) -> str:
  for attribute in (
    "key",
    "name",
    "idx",
  ):  # of dictionaries, of named tuples and dataclasses, of lists
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  raise TypeError(f"cannot name the path entry {key!r}")


def _is_empty(node: Any) -> bool:
  return not jax.tree.leaves(node)


def by_path(tree: Any) -> tuple[dict[str, Any], list[str]]:
  """Leaves by "a/b/c" path, and the paths of subtrees that have no leaves."""
  leaves: dict[str, Any] = {}
  empty: list[str] = []
  for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)[0]:
    names = [_name(key) for key in keys]
    path = "/".join(names)
    if path in leaves or path in empty or any("/" in name for name in names):
      raise ValueError(f"two leaves of the state cannot be told apart by their path: {path!r}")
    if _is_empty(node):
      empty.append(path)
    else:
      leaves[path] = node
  return leaves, empty


def nested(leaves: Mapping[str, Any], empty: list[str] | None = None) -> Any:
  root: dict[str, Any] = {}
  for path, leaf in [*leaves.items(), *((path, {}) for path in empty or () if path)]:
    *parents, last = path.split("/")
    node = root
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = leaf
  return root


def is_key(leaf: Any) -> bool:
  return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored(leaf: Any) -> Any:
  """A leaf as Orbax stores it: an array; of a random key, its data."""
  if is_key(leaf):
    return jax.random.key_data(leaf)
  return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def spec(leaf: Any) -> list[Any]:
  """[dtype, [shape]] of a leaf, abstract or not; what the manifest says of it."""
  if not hasattr(leaf, "dtype"):
    leaf = np.asarray(leaf)
  return [str(leaf.dtype), list(leaf.shape)]


def _host(leaf: Any) -> np.ndarray:
  """The whole value on this host, whatever its sharding."""
  leaf = stored(leaf)
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    return np.asarray(leaf)
  if leaf.is_fully_replicated:
    return np.asarray(leaf.addressable_data(0))
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def params_hash(tree: Any) -> str:
  """SHA-256 over paths, dtypes, shapes and values of a tree's leaves: the model's identity.

  The same for NumPy and JAX arrays, for any sharding, and for tuples or dictionaries whose path
  names agree. Subtrees without leaves do not count.
  """
  digest = hashlib.sha256()
  leaves, _ = by_path(tree)
  for path in sorted(leaves):
    dtype, shape = spec(leaves[path])
    digest.update(f"{path}\0{dtype}\0{shape}\0".encode())
    digest.update(np.ascontiguousarray(_host(leaves[path])).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _self_sum(manifest: Mapping[str, Any]) -> str:
  rest = {name: value for name, value in manifest.items() if name != "sha256"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def describe(
  state: Any, params: Any, *, step: int, metric: float | None, meta: Mapping[str, Any]
) -> dict[str, Any]:
  """The manifest of a state, still without the sums of its files.

  Raises:
    ValueError: meta is no strict JSON, or two leaves have the same path.
  """
  leaves, empty = by_path(state)
  manifest = {
    "format": FORMAT,
    "step": int(step),
    "metric": metric,
    "params": params_hash(params),
    "meta": dict(meta),
    "leaves": {path: spec(leaf) for path, leaf in leaves.items()},
    "empty": empty,
    "keys": {k: str(jax.random.key_impl(v)) for k, v in leaves.items() if is_key(v)},
  }
  json.dumps(manifest, allow_nan=False)
  return manifest


def seal(directory: Path, manifest: Mapping[str, Any]) -> None:
  """Writes manifest.json with the sums of all files that are there; durable with them."""
  whole = {**manifest, "files": files.sums_under(directory)}
  whole["sha256"] = _self_sum(whole)
  files.write_plain(directory / NAME, json.dumps(whole, indent=1, allow_nan=False))
  files.sync_tree(directory)


def read(directory: Path) -> dict[str, Any]:
  """The manifest, checked against its own sum.

  Raises:
    ValueError: it is missing or damaged; the message says which.
  """
  path = directory / NAME
  try:
    manifest = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise ValueError("manifest.json is missing") from None
  except (OSError, ValueError) as error:
    raise ValueError(f"manifest.json cannot be read ({error})") from error
  if not isinstance(manifest, dict) or manifest.get("sha256") != _self_sum(manifest):
    raise ValueError("manifest.json is damaged: its own sum disagrees")
  if manifest["format"] != FORMAT:
    raise ValueError(f"its format is {manifest['format']}; this version reads {FORMAT}")
  return manifest


def verify(directory: Path) -> dict[str, Any]:
  """The manifest of a checkpoint all of whose files have the sums it says.

  Raises:
    ValueError: it is not good; the message says why.
  """
  manifest = read(directory)
  for name, (size, digest) in manifest["files"].items():
    path = directory / name
    try:
      good = path.stat().st_size == size and files.sha256_of(path) == digest
    except FileNotFoundError:
      raise ValueError(f"{name} is missing") from None
    except OSError as error:
      raise ValueError(f"{name} cannot be read ({error.strerror})") from error
    if not good:
      raise ValueError(f"{name} is damaged: its SHA-256 disagrees with the manifest")
  return manifest
