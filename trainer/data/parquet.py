"""verl-format tables: read from a file, a folder or the hub; write the built-in task.

Invariants: a table that is returned has at least one row, every required column, and messages in the prompt
column; anything else is a DataError of one line that starts with the key and the value given. Files of a
folder are read in name order, so row numbers mean the same on every machine.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slipstream.trainer.errors import DataError

REQUIRED_COLUMNS = ("data_source", "reward_model")
OPTIONAL_COLUMNS = ("ability", "extra_info")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_table(path: str, prompt_key: str, key: str) -> pa.Table:
    """The verl columns of a parquet file, a folder of parquet files, or a hub data set.

    prompt_key: column with the messages. key: the config key that holds `path`, for errors.
    """
    where = f"{key}={path!r}"
    local = Path(path)
    if local.is_dir():
        files = sorted(local.glob("*.parquet"))
        if not files:
            raise DataError(f"{where} is a folder without .parquet files")
        table = _concat([_read_file(file, prompt_key, f"{key}={str(file)!r}") for file in files], where)
    elif local.is_file():
        table = _read_file(local, prompt_key, where)
    elif HUB_ID.fullmatch(path) and local.suffix != ".parquet":
        table = _read_hub(path, prompt_key, key)
    else:
        raise DataError(f"{where}: no such file or folder{_nearest_file(local)}")
    if table.num_rows == 0:
        raise DataError(f"{where} has no rows")
    _check_prompt_type(table.schema.field(prompt_key).type, prompt_key, where)
    return table


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes rows as one parquet file; makes the folder, replaces an existing file only once complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".parquet.part")
    pq.write_table(pa.Table.from_pylist(list(rows)), part)
    part.replace(path)


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {str(folder)!r} does not exist either"
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1, cutoff=0.5)
    return f"; nearest: {str(folder / near[0])!r}" if near else ""


def _read_file(path: Path, prompt_key: str, where: str) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read(columns=_wanted(file.schema_arrow.names, prompt_key, where))
    except (pa.ArrowException, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{where} is not a readable parquet file: {reason}") from error


def _read_hub(name: str, prompt_key: str, key: str) -> pa.Table:
    where = f"{key}={name!r}"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{where} is neither a file nor a folder; for a hub data set id, pip install 'slipstream[hub]'"
        ) from error
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{where}: the hub data set could not be loaded: {reason}") from error
    allowed = ("validation", "test") if "validation" in key else ("train",)
    split = next((split for split in allowed if split in splits), None)
    if split is None:
        raise DataError(f"{where} has no split {' or '.join(allowed)}; it has {', '.join(splits)}")
    table = splits[split].with_format("arrow")[:]
    return table.select(_wanted(table.schema.names, prompt_key, where))


def _wanted(present: list[str], prompt_key: str, where: str) -> list[str]:
    for column in (prompt_key, *REQUIRED_COLUMNS):
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
            hint = f"; nearest: {near[0]!r}" if near else ""
            key = " (data.prompt_key)" if column == prompt_key else ""
            raise DataError(f"{where} has no column {column!r}{key}; it has {', '.join(present)}{hint}")
    return [prompt_key, *REQUIRED_COLUMNS, *(column for column in OPTIONAL_COLUMNS if column in present)]


def _concat(tables: list[pa.Table], where: str) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{where}: its files do not have the same columns: {reason}") from error


def _check_prompt_type(kind: pa.DataType, prompt_key: str, where: str) -> None:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list and pa.types.is_struct(kind.value_type):
        names = {field.name for field in kind.value_type.fields}
        if {"role", "content"} <= names:
            return
    raise DataError(
        f"{where}: column {prompt_key!r} (data.prompt_key) is {kind}; "
        "allowed: a list of {role: string, content: string} messages"
    )
