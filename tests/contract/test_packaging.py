"""What is installed is what was written, and the top-level name `kernels` stays free for others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOMS = ("conf", "drafter", "experiments", "kernels", "rollout", "trainer")
NOT_SHIPPED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so", "runs", "tests")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_package_list_is_the_folders_with_python_files(repo_root: Path) -> None:
    text = (repo_root / "pyproject.toml").read_text(encoding="utf-8")
    setuptools = tomllib.loads(text)["tool"]["setuptools"]
    folders = {path.parent for room in ROOMS for path in (repo_root / room).rglob("*.py")}
    folders |= {repo_root / room for room in ROOMS}
    expected = {f"slipstream.{folder.relative_to(repo_root).as_posix().replace('/', '.')}" for folder in folders}
    assert set(setuptools["packages"]) == expected
    assert len(setuptools["packages"]) == len(expected)
    assert setuptools["package-dir"] == {f"slipstream.{room}": room for room in ROOMS}


def test_each_room_says_that_it_is_typed(repo_root: Path) -> None:
    for room in ROOMS:
        assert (repo_root / room / "py.typed").is_file()


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: left-overs of earlier builds in the checkout could hide a missing file."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(repo_root, source, ignore=NOT_SHIPPED)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation")
    done = run(*build, "--outdir", folder, source, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, and sees the libraries of this one.

    A plain path in a .pth file is added to sys.path, but the .pth files in that path are not read: the
    editable install of this checkout stays out of sight.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    done = run(*pip, cwd=folder)
    assert done.returncode == 0, done.stderr
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python.parent


def test_the_wheel_holds_configuration_policy_and_native_code(wheel: Path, repo_root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [*repo_root.glob("conf/**/*.yaml"), *repo_root.glob("experiments/quickstart/policy/*.json")]
    shipped += [*repo_root.glob("experiments/quickstart/policy/*.safetensors")]
    shipped += [path for room in ROOMS for path in (repo_root / room).rglob("*.py")]
    missing = {f"slipstream/{path.relative_to(repo_root).as_posix()}" for path in shipped} - names
    assert not missing
    assert "slipstream/experiments/quickstart/policy/model.safetensors" in names
    assert any(name.startswith("slipstream/kernels/_native.") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    top_level = {name.partition("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"slipstream"}


def test_the_installed_command_makes_its_plan_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    code = "import slipstream.conf, slipstream.kernels._native as n; print(slipstream.conf.__file__, n.__file__)"
    where = run(installed / "python", "-c", code, cwd=tmp_path)
    assert where.returncode == 0, where.stderr
    assert all(path.startswith(str(installed.parent)) for path in where.stdout.split())
    done = run(installed / "slipstream", "train", "experiment=quickstart", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plan of quickstart" in done.stdout
    assert "4 prompts x 8 samples = 32 samples" in done.stdout
    assert "parameters" in done.stdout
    assert list(tmp_path.iterdir()) == []


KERNELS_CODE = """
import kernels
assert kernels.get_kernel
assert {marker!r} in kernels.__file__, kernels.__file__
import slipstream.kernels
assert not hasattr(slipstream.kernels, "get_kernel")
assert slipstream.kernels.__spec__.name == "slipstream.kernels"
"""


def test_the_top_level_name_kernels_belongs_to_others(repo_root: Path, tmp_path: Path) -> None:
    """The Hugging Face package `kernels` must win, even with the checkout in front of it on the path."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def get_kernel(repo_id): return repo_id\n", encoding="utf-8")
    path = os.pathsep.join([str(repo_root), str(package.parent)])
    code = KERNELS_CODE.format(marker=str(package))
    done = run(sys.executable, "-c", code, cwd=repo_root, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # needs a package index; the stand-in above holds the rule everywhere
def test_the_real_package_kernels_is_found_too(repo_root: Path, tmp_path: Path) -> None:
    """The real package, installed aside: beside the tests' own libraries its newest release may not fit."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), "kernels"]
    installed = run(*pip, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    code = KERNELS_CODE.format(marker=str(site))
    done = run(sys.executable, "-c", code, cwd=repo_root, PYTHONPATH=os.pathsep.join([str(repo_root), str(site)]))
    assert done.returncode == 0, done.stderr
