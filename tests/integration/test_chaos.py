"""A few faults in one real job on two raylets: the chaos bench at its smallest."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_job import command

FAULTS = "kill_worker,kill_driver,hang_reward"


@pytest.mark.slow
def test_a_job_under_faults_loses_and_changes_nothing(tmp_path: Path) -> None:
    result_file = tmp_path / "chaos.json"
    arguments = ["--faults", "3", "--kinds", FAULTS, "--json", str(result_file)]
    done = subprocess.run(
        command("bench", "chaos", *arguments), cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(result_file.read_text())["result"]
    assert result["faults"] == 3
    assert set(result["kinds"]) == set(FAULTS.split(","))
    for name in ("lost", "duplicated", "tokens_different", "rewards_different", "left_out", "hung", "unclear_stops"):
        assert result[name] == 0, name
    assert result["weights_max_abs_difference"] == 0.0
    assert result["tokens_compared"] > 10_000
    assert result["kinds"]["hang_reward"]["recovered"] == 1
    assert result["kinds"]["kill_driver"]["resumed"] == 1
