"""Builds the suffix tree of arctic-inference, the bench's peer, from its source distribution: C++ alone, no CUDA.

`python -m slipstream.experiments.drafter_index.build_arctic` needs g++, the headers of Python and a package index;
its own tools go into a throw-away environment.

Invariants: the environment it runs in is read and never changed; the source is the one whose hash is written here;
a failed build leaves `out` as it was.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from slipstream.trainer.errors import ConfigError, SlipstreamError
from slipstream.trainer.main import OneLineParser

DEFAULT_OUT = Path("build/arctic")
COMMAND = "python -m slipstream.experiments.drafter_index.build_arctic"
SOURCE = "arctic-inference==0.3.0 --hash=sha256:7f22e3e1b1071c6061c0d6951be17c0fb50b08d06d6e543144c8f52faba60a36"
# Its own build asks for this nanobind.
TOOLS = ("nanobind==2.9.2", "cmake>=3.18,<5", "setuptools>=77")
SUFFIX_DECODING = Path("arctic_inference/suffix_decoding")
PYTHON_FILES = (
    "arctic_inference/__init__.py",
    f"{SUFFIX_DECODING}/__init__.py",
    f"{SUFFIX_DECODING}/cache.py",
    "LICENSE",
)


def build(out: Path) -> None:
    """Makes the folder `out`, from which `arctic_inference.suffix_decoding` can be imported.

    Replaces what is there. ConfigError, one line, when a command fails.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        python = _tools(work / "tools")
        source = _download(work / "source", python)
        package = work / "package"
        for file in PYTHON_FILES:
            (package / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, package / file)
        cmake = python.parent / "cmake"
        flags = (
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={python}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package / SUFFIX_DECODING}",
        )
        _run(cmake, "-S", source / "csrc" / "suffix_decoding", "-B", work / "cmake", *flags)
        _run(cmake, "--build", work / "cmake")
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(package, out)


def _tools(folder: Path) -> Path:
    """The interpreter of an environment with TOOLS, which sees the libraries of this one behind its own."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *TOOLS)
    site = next((folder / "lib").glob("python*/site-packages"))
    # pip asks the source for its metadata, and the answer needs torch.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def _download(folder: Path, python: Path) -> Path:
    """The unpacked source distribution."""
    folder.mkdir()
    wanted = folder / "requirements.txt"
    wanted.write_text(SOURCE + "\n", encoding="utf-8")
    options = ("--no-deps", "--no-binary=:all:", "--no-build-isolation", "--dest", folder)
    _run(sys.executable, "-m", "pip", "--python", python, "download", "--quiet", *options, "-r", wanted)
    archive = next(folder.glob("*.tar.gz"))
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " ".join((done.stderr or done.stdout).split())[-400:]
        raise ConfigError(f"{' '.join(words[:5])} ... failed with {done.returncode}: {last}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, and prints a user's mistake as one line."""
    parser = OneLineParser(prog=COMMAND, description="Builds the suffix tree of arctic-inference.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder to make (default {DEFAULT_OUT})")
    try:
        args: argparse.Namespace = parser.parse_args(argv)
        build(args.out)
    except SlipstreamError as error:
        print(f"slipstream: {error}", file=sys.stderr)
        return error.exit_code
    print(f"built {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
