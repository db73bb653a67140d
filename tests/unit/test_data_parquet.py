"""Reading verl-format parquet: what is accepted, and the one line for everything else."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slipstream.conf.schema import TaskConfig
from slipstream.trainer.data.chain_sum import make_rows
from slipstream.trainer.data.make import main as make_main
from slipstream.trainer.data.parquet import read_table, write_rows
from slipstream.trainer.errors import DataError

ROWS = make_rows(TaskConfig(num_train=12), "train")


def read(path: Path | str, prompt_key: str = "prompt") -> pa.Table:
    return read_table(str(path), prompt_key, "data.train_path")


def error_of(path: Path | str, prompt_key: str = "prompt") -> str:
    with pytest.raises(DataError) as error:
        read(path, prompt_key)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"data.train_path={str(path)!r}") or Path(path).is_dir()
    return line


def test_round_trip_of_a_file_and_a_folder(tmp_path: Path) -> None:
    write_rows(ROWS[:7], tmp_path / "set" / "a.parquet")
    write_rows(ROWS[7:], tmp_path / "set" / "b.parquet")
    assert [path.name for path in (tmp_path / "set").iterdir() if path.suffix != ".parquet"] == []
    assert read(tmp_path / "set" / "a.parquet").to_pylist() == ROWS[:7]
    assert read(tmp_path / "set").to_pylist() == ROWS


def test_other_columns_are_not_read(tmp_path: Path) -> None:
    write_rows([{**row, "image": b"x" * 100} for row in ROWS], tmp_path / "t.parquet")
    assert "image" not in read(tmp_path / "t.parquet").schema.names


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write_rows(ROWS, tmp_path / "train.parquet")
    assert "train.parquet'" in error_of(tmp_path / "trian.parquet").split("nearest:")[1]
    assert "does not exist either" in error_of(tmp_path / "nowhere" / "deep" / "x.parquet")


def test_folder_without_parquet(tmp_path: Path) -> None:
    assert "without .parquet files" in error_of(tmp_path)


def test_empty_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "t.parquet")
    assert "has no rows" in error_of(tmp_path / "t.parquet")


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_torn_file(tmp_path: Path, keep: float) -> None:
    whole = tmp_path / "whole.parquet"
    write_rows(ROWS, whole)
    content = whole.read_bytes()
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    assert "not a readable parquet file" in error_of(torn)


def test_missing_columns_are_named_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_rows([{**row, "prompts": row["prompt"]} for row in ROWS], path)
    line = error_of(path, "promt")
    assert "no column 'promt' (data.prompt_key)" in line
    assert "data_source" in line
    assert "nearest: 'prompt'" in line
    write_rows([{key: value for key, value in row.items() if key != "reward_model"} for row in ROWS], path)
    assert "no column 'reward_model'" in error_of(path)


def test_prompt_column_of_the_wrong_type(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_rows([{**row, "prompt": row["prompt"][0]["content"]} for row in ROWS], path)
    assert "is string; allowed: a list of {role: string, content: string}" in error_of(path)
    write_rows([{**row, "prompt": [{"text": "hi"}]} for row in ROWS], path)
    assert "allowed: a list of {role" in error_of(path)


def test_folder_of_files_that_do_not_match(tmp_path: Path) -> None:
    write_rows(ROWS[:2], tmp_path / "a.parquet")
    write_rows([{**row, "data_source": 5} for row in ROWS[2:4]], tmp_path / "b.parquet")
    assert "do not have the same columns" in error_of(tmp_path)


def test_hub_id_without_the_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'slipstream[hub]'" in error_of("someone/some-prompts")


class Split:
    """The two calls of a `datasets.Dataset` that the reader makes."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.table = pa.Table.from_pylist(rows)

    def with_format(self, name: str) -> Split:
        assert name == "arrow"
        return self

    def __getitem__(self, rows: slice) -> pa.Table:
        return self.table


def test_hub_id_reads_the_split_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda name: {"train": Split(ROWS[:5]), "test": Split(ROWS[5:])}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read("someone/some-prompts").to_pylist() == ROWS[:5]
    table = read_table("someone/some-prompts", "prompt", "data.validation_path")
    assert table.to_pylist() == ROWS[5:]
    hub.load_dataset = lambda name: {"everything": Split(ROWS)}  # type: ignore[attr-defined]
    assert "has no split train; it has everything" in error_of("someone/some-prompts")

    def offline(name: str) -> None:
        raise ConnectionError("no route\nto host")

    hub.load_dataset = offline  # type: ignore[attr-defined]
    assert "could not be loaded: no route" in error_of("someone/some-prompts")


def test_data_command_writes_what_the_task_would_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["chain_sum", "--out", str(tmp_path), "--num-train", "20", "--num-validation", "9", "--seed", "5"]
    assert make_main(argv) == 0
    printed = capsys.readouterr().out
    assert "p99/p50" in printed
    task = TaskConfig(num_train=20, num_validation=9, seed=5)
    assert read(tmp_path / "train.parquet").to_pylist() == make_rows(task, "train")
    assert read(tmp_path / "validation.parquet").to_pylist() == make_rows(task, "validation")


@pytest.mark.parametrize(
    ("options", "expected"),
    [(["--num-train", "0"], "--num-train=0"), (["--min-level", "5", "--max-level", "2"], "min_level=5")],
)
def test_data_command_refuses_in_one_line(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_main(["chain_sum", "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
