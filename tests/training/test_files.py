"""Small files are whole or not there, and errors name the path and the way out."""

import errno
import json
import os
from pathlib import Path

import pytest

from rmd_jax.errors import RunError, UserError
from rmd_jax.training import files


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
  """Lets `after` bytes through, then says that the disk is full."""
  room = [after]

  def write(descriptor, data):
    if not room[0]:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written = os.write(descriptor, bytes(data)[: room[0]])
    room[0] -= written
    return written

  monkeypatch.setattr(files, "_write", write)


def test_a_written_file_has_its_bytes_and_no_temporary_beside_it(tmp_path):
  path = tmp_path / "a.txt"
  files.write_atomic(path, "ü")
  files.write_atomic(path, b"two")
  assert path.read_bytes() == b"two"
  assert list(tmp_path.iterdir()) == [path]


def test_short_writes_are_completed(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_write", lambda fd, data: os.write(fd, bytes(data)[:3]))
  files.write_atomic(tmp_path / "a", b"0123456789")
  files.append(tmp_path / "a", b"abcde")
  assert (tmp_path / "a").read_bytes() == b"0123456789abcde"


@pytest.mark.parametrize("fault", ["_write", "_fsync", "_rename"])
def test_a_fault_leaves_the_old_file_and_names_the_path(tmp_path, monkeypatch, fault):
  path = tmp_path / "a.json"
  files.write_json(path, {"old": 1})

  def fail(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(files, fault, fail)
  with pytest.raises(RunError, match="No space left") as caught:
    files.write_json(path, {"new": 2})
  assert str(path) in str(caught.value)
  assert "Free space" in str(caught.value)
  assert json.loads(path.read_text()) == {"old": 1}
  assert list(tmp_path.iterdir()) == [path]


def test_an_append_that_fills_the_disk_leaves_a_torn_tail(tmp_path, monkeypatch):
  path = tmp_path / "a"
  files.append(path, b"first\n")
  full_disk(monkeypatch, after=3)
  with pytest.raises(RunError, match="append to"):
    files.append(path, b"second\n")
  assert path.read_bytes() == b"first\nsec"
  files.truncate(path, 6)
  assert path.read_bytes() == b"first\n"


def test_what_the_user_cannot_write_is_a_user_error(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="Choose a directory"):
    files.write_atomic(tmp_path / "file" / "x", "")
  with pytest.raises(UserError, match="file is in the way"):
    files.make_directory(tmp_path / "file")

  def deny(*_):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(files, "_write", deny)  # tests may run as root, whom no mode stops
  with pytest.raises(UserError, match=f"{tmp_path}.*Permission denied"):
    files.write_atomic(tmp_path / "x", "data")


def test_json_refuses_what_is_no_json(tmp_path):
  with pytest.raises(ValueError, match="not JSON compliant"):
    files.write_json(tmp_path / "a.json", {"x": float("nan")})
  assert not (tmp_path / "a.json").exists()


def test_trees_are_summed_synced_and_removed(tmp_path, monkeypatch):
  root = tmp_path / "tree"
  (root / "sub").mkdir(parents=True)
  (root / "sub" / "b").write_bytes(b"abc")
  (root / "a").write_bytes(b"")
  abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
  assert files.sums_under(root)["sub/b"] == [3, abc]
  assert files.sha256_of(root / "sub" / "b") == abc
  synced = []
  monkeypatch.setattr(files, "_fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
  files.sync_tree(root)
  assert sorted(synced) == sorted(str(root / p) for p in ("", "a", "sub", "sub/b"))
  files.remove_tree(root)
  files.remove_tree(root)
  assert not root.exists()


def test_durable_means_the_name_is_synced_too(tmp_path, monkeypatch):
  synced = []
  monkeypatch.setattr(
    files, "_fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
  )
  files.write_atomic(tmp_path / "a", b"x")
  assert [path.parent if path != tmp_path else path for path in synced] == [tmp_path, tmp_path]
  assert synced[-1] == tmp_path  # after the rename
