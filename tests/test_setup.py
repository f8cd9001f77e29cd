"""What `pip install .` installs: the command runs from any folder, without the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("ddim_pl", "callbacks", "configs", "pyproject.toml", "setup.py", "MANIFEST.in")
TEXTS = ("README.md", "LICENSE")

pytestmark = pytest.mark.skipif(
    find_spec("setuptools") is None or find_spec("pip") is None,
    reason="a wheel is built by setuptools, and installed by pip",
)


def done(*arguments, cwd, **environment):
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return process.returncode, process.stdout + process.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the checkout, for setuptools writes into it, as its archive of sources has it."""
    copy = tmp_path_factory.mktemp("copy")
    for name in (*SOURCES, *TEXTS):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    code, text = done("-c", build, copy / "archive", cwd=copy)
    assert code == 0, text
    (file,) = (copy / "archive").iterdir()
    with tarfile.open(file) as archive:
        archive.extractall(copy / "unpacked", filter="data")
    (folder,) = (copy / "unpacked").iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", place)
    code, text = done("-m", "pip", "wheel", *options, sources, cwd=place)
    assert code == 0, text
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs the installed command in a folder; nothing but the wheel and its needs is found."""
    target = tmp_path_factory.mktemp("target")
    options = ("--no-deps", "--no-index", "--quiet", "--target", target)
    code, text = done("-m", "pip", "install", *options, wheel, cwd=target)
    assert code == 0, text
    packages = Path(find_spec("torch").origin).parents[1]
    # Without `site` no link to a checkout is followed.
    path = os.pathsep.join([str(target), str(packages)])

    def run(*arguments, cwd, script=target / "bin" / "ddim-pl"):
        return done("-S", script, *arguments, cwd=cwd, PYTHONPATH=path)

    return run


def names_below(folder, pattern="*"):
    files = (each for each in folder.rglob(pattern) if each.is_file())
    return {
        each.relative_to(folder).as_posix() for each in files if "__pycache__" not in str(each)
    }


def test_a_wheel_holds_every_file_of_the_packages_and_the_configs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"ddim_pl/{name}" for name in names_below(ROOT / "ddim_pl")}
    expected |= {f"callbacks/{name}" for name in names_below(ROOT / "callbacks")}
    expected |= {f"ddim_pl/configs/{name}" for name in names_below(ROOT / "configs")}
    assert names == expected


def test_the_installed_command_trains_and_samples_in_an_empty_folder(installed, tmp_path):
    place = tmp_path / "where.py"
    place.write_text("import callbacks, ddim_pl, sys; print(ddim_pl.__file__, *sys.path)\n")
    code, text = installed(cwd=tmp_path, script=place)
    assert code == 0, text
    assert str(ROOT) not in text.split()
    assert not text.startswith(str(ROOT / "ddim_pl"))
    empty = tmp_path / "empty"
    empty.mkdir()
    small = ("--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--trainer.accelerator=cpu")
    code, text = installed("fit", "--config", "digits/ddpm", *small, cwd=empty)
    assert code == 0, text
    run = empty / "runs" / "digits-ddpm" / "version_0"
    assert (run / "checkpoints" / "last.ckpt").is_file()
    small = ("--num_images=2", "--model.num_steps=2")
    code, text = installed("sample", "--ckpt_path", "last", *small, cwd=empty)
    assert code == 0, text
    manifest = json.loads((run / "sample" / "manifest.json").read_text())
    assert manifest["updates"] == 2


def test_the_installed_command_names_itself_and_configs_of_a_similar_name(installed, tmp_path):
    code, text = installed("--help", cwd=tmp_path)
    assert code == 0
    assert text.startswith("usage: ddim-pl ")
    code, text = installed("fit", "--config", "digits/dpm", cwd=tmp_path)
    assert code == 2
    assert text.startswith(
        "error: config must be a file that exists, got digits/dpm: did you mean digits/ddpm or "
    )
