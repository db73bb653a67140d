"""The laws of the house that can be read off the code: sizes, who imports whom, and commented choices."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from slipstream.trainer.config import CONF_DIR, load_settings

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 420, 70

MAY_IMPORT = {
    "kernels": {"kernels"},
    "drafter": {"drafter", "kernels"},
    "rollout": {"rollout", "drafter", "kernels"},
    "conf": {"conf"},
    "trainer": {"trainer", "rollout", "drafter", "kernels", "conf"},
    "experiments": {"experiments", "trainer", "rollout", "drafter", "kernels"},
}
# The command hands `slipstream bench` over to the experiments; nothing else looks upwards.
UPWARDS = {("trainer/main.py", "experiments")}
CORE_ROOMS = ("kernels", "drafter", "rollout")
HEAVY = {"ray", "wandb", "hydra", "omegaconf", "pydantic", "verl", "sglang"}
MAY_IMPORT_HEAVY = (
    "rollout/worker.py",
    "rollout/pool.py",
    "rollout/streaming_pool.py",
    "rollout/actors.py",
    "rollout/crew.py",
    "rollout/flight.py",
    "rollout/health.py",
    "rollout/placement.py",
    "rollout/weight_store.py",
    "rollout/sglang/",
)

SOURCES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))
NATIVE_SOURCES = sorted(path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".h", ".cpp"))
CHOICES = sorted(CONF_DIR.rglob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in CONF_DIR.glob("experiment/*.yaml"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute, from slipstream.<room>"
            # `from slipstream import kernels` names the room only in its second half.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_check() -> None:
    assert {name_of(path).partition("/")[0] for path in SOURCES} >= {"conf", "drafter", "rollout", "trainer"}
    assert len(EXPERIMENTS) >= 3


@pytest.mark.parametrize("path", SOURCES + NATIVE_SOURCES, ids=name_of)
def test_a_file_is_about_one_noun(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_FILE_LINES, f"{name_of(path)} has {len(lines)} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_function_fits_on_a_page(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{name_of(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_rooms_import_downwards_only(path: Path) -> None:
    name = name_of(path)
    room = name.partition("/")[0]
    for module in imported_modules(path):
        package, _, rest = module.partition(".")
        assert package not in MAY_IMPORT, f"{name}: import slipstream.{module}, not {module}"
        used = rest.partition(".")[0]
        if package == "slipstream" and (name, used) not in UPWARDS:
            assert used in MAY_IMPORT[room], f"{name} imports {module}, and {room} may not know {used}"


@pytest.mark.parametrize("path", [path for path in SOURCES if name_of(path).startswith(CORE_ROOMS)], ids=name_of)
def test_core_rooms_import_little(path: Path) -> None:
    if not name_of(path).startswith(MAY_IMPORT_HEAVY):
        heavy = {module.partition(".")[0] for module in imported_modules(path)} & HEAVY
        assert not heavy, f"{name_of(path)} imports {heavy}"


def test_the_engine_and_the_drafter_load_without_the_trainers_libraries() -> None:
    code = (
        "import sys, slipstream.rollout.torch_engine, slipstream.drafter.suffix\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_kernels_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_and_bears_its_name(name: str) -> None:
    assert load_settings([f"experiment={name}"]).experiment_name == name


# data=parquet is not complete on its own: the path is the user's.
@pytest.mark.parametrize("path", [path for path in CHOICES if path.parent != CONF_DIR], ids=name_of)
def test_every_choice_validates(path: Path) -> None:
    more = ["data.train_path=org/name"] if (path.parent.name, path.stem) == ("data", "parquet") else []
    load_settings([f"{path.parent.name}={path.stem}", *more])


@pytest.mark.parametrize("path", CHOICES, ids=name_of)
def test_every_key_has_a_comment_above_it(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
    above = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if re.match(r"\s*\w+:", line):
            text = above.strip()
            commented = text.startswith("#") and not text.startswith("# @package")
            assert commented, f"{name_of(path)}:{number} has no comment above {line.strip()}"
        above = line


def test_every_group_has_a_default_choice() -> None:
    groups = {path.parent.name for path in CHOICES if path.parent != CONF_DIR}
    defaults = yaml.safe_load((CONF_DIR / "main.yaml").read_text(encoding="utf-8"))["defaults"]
    listed = {group for entry in defaults if isinstance(entry, dict) for group in entry}
    assert listed == groups
