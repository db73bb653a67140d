"""Workers wanted: the command writes, the job reads; what makes no sense changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream.trainer.main import main
from slipstream.trainer.resize import FILE, read_wanted, resize


class Names:
    """Workers by name, as a pool names them."""

    def __init__(self, num: int) -> None:
        self.workers: dict[str, dict[str, Any]] = {f"worker {i}": {"state": "serving"} for i in range(num)}

    def add_worker(self) -> str:
        name = f"worker {len(self.workers)}"
        self.workers[name] = {"state": "starting"}
        return name

    def remove_worker(self, name: str, drain: bool = True) -> None:
        assert drain
        self.workers[name]["state"] = "leaving"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "settings.json").write_text("{}")
    return tmp_path


def test_the_wish_is_met_once(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = Names(2)
    assert resize(pool, run_dir) == []
    assert main(["workers", str(run_dir)]) == 0
    assert main(["workers", str(run_dir), "4"]) == 0
    assert main(["workers", str(run_dir)]) == 0
    assert capsys.readouterr().out.split("\n") == ["as the job was started", "4", ""]
    assert resize(pool, run_dir) == ["4 rollout workers wanted: worker 2, worker 3 to join once Ray has room"]
    assert resize(pool, run_dir) == []
    main(["workers", str(run_dir), "1"])
    assert resize(pool, run_dir) == ["1 rollout workers wanted: worker 1, worker 2, worker 3 to leave"]
    assert resize(pool, run_dir) == []
    assert [facts["state"] for facts in pool.workers.values()] == ["serving", "leaving", "leaving", "leaving"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["0"], "workers=0; allowed: 1 to 4096"),
        (["5000"], "workers=5000; allowed: 1 to 4096"),
        (["many"], "invalid int value: 'many'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["workers", str(run_dir), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert read_wanted(run_dir) is None


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workers", str(tmp_path), "2"]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_a_torn_wish_is_reported_and_changes_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / FILE).write_text("3x")
    pool = Names(2)
    assert resize(pool, run_dir) == []
    assert len(pool.workers) == 2
    assert "'3x'; allowed: 1 to 4096" in capsys.readouterr().err
