"""`rmd` finds its gin files from any folder, in a plain and in an editable install."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
GIN_FILES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "gin").rglob("*.gin"))


def call(*command, cwd, status=0) -> subprocess.CompletedProcess:
  done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
  assert done.returncode == status, done.stdout + done.stderr
  return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A copy of the source tree, because builds leave files in it."""
  root = tmp_path_factory.mktemp("source")
  for name in ("rmd_jax", "gin"):
    shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(ROOT / "setup.py", root)
  return root


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
  out = tmp_path_factory.mktemp("wheel")
  options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out))
  call(sys.executable, "-m", "pip", "wheel", *options, str(source), cwd=out)
  (path,) = out.glob("rmd_jax-*.whl")
  return path


@pytest.fixture(scope="module", params=["plain", "editable"])
def environment(request, source, tmp_path_factory):
  """bin/ of an environment that has this one's packages, and rmd_jax installed in it."""
  folder = tmp_path_factory.mktemp(request.param)
  venv.create(folder, with_pip=False, symlinks=True)
  python = folder / "bin" / "python"
  version = f"python{sys.version_info.major}.{sys.version_info.minor}"
  site = folder / "lib" / version / "site-packages"
  # Not --system-site-packages: this environment's own rmd_jax must not be seen; its .pth is not.
  (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
  what = (
    ("--no-build-isolation", "--editable", str(source))
    if request.param == "editable"
    else (str(request.getfixturevalue("wheel")),)
  )
  pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet")
  call(*pip, *what, cwd=folder)
  expected = source / "gin" if request.param == "editable" else site / "rmd_jax" / "gin"
  return folder / "bin", expected


def test_wheel_carries_the_gin_files(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  assert sorted(n.removeprefix("rmd_jax/") for n in names if n.endswith(".gin")) == GIN_FILES
  assert not [n for n in names if n.startswith(("gin/", "tests/", "benchmarks/"))]


def test_gin_files_are_found_from_any_folder(environment, tmp_path):
  binaries, expected = environment
  code = "from rmd_jax.config import syntax; print(syntax.gin_directory())"
  assert call(binaries / "python", "-c", code, cwd=tmp_path).stdout.strip() == str(expected)
  found = sorted(str(p.relative_to(expected.parent)) for p in expected.rglob("*.gin"))
  assert found == GIN_FILES


def test_objective_is_read_from_any_folder(environment, tmp_path):
  binaries, expected = environment
  flags = ("--gin_file=runs/quickstart.gin", "--gin_file=objectives/ensemble.gin")
  # Everything is read and checked but for the one flag that is wrong.
  for command in ((binaries / "rmd",), (binaries / "python", "-m", "rmd_jax")):
    done = call(
      *command, "run", *flags, "--gin.Run.objectives=[]", "--gin.BETTA=1", cwd=tmp_path, status=2
    )
    assert done.stderr == (
      "rmd run: --gin.BETTA: nothing reads the macro BETTA; did you mean BETA?\n"
    )
  done = call(binaries / "rmd", "run", "--gin_file=objectives/none.gin", cwd=tmp_path, status=2)
  assert str(expected) in done.stderr


def test_gin_config_is_not_hidden(environment, source):
  binaries, _ = environment
  code = "import gin; print(gin.__file__)"
  assert "site-packages" in call(binaries / "python", "-c", code, cwd=source).stdout
