"""Finished rollouts from a file, for offline training. The columns tell which of two formats it has: own_format, which
is what `oapl rollouts` writes, or authors_format. Either may be JSON or Parquet."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from oapl_engine.errors import ConfigError
from oapl_engine.rollout_log.authors_format import AUTHORS, read_authors_format
from oapl_engine.rollout_log.import_checks import Limits, RolloutFile
from oapl_engine.rollout_log.own_format import OURS, read_own_format
from oapl_engine.rows import Row, check_file, read_json_rows, row_decoder

JSON_KINDS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def read_rollouts(path: str | Path, limits: Limits, tokenizer: Any = None) -> RolloutFile:
    """All rollouts of a JSON or Parquet file; the tokenizer is needed for text. ConfigError names file and line."""
    path = Path(path)
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"rollouts {path}: the file is empty")
    found, rows = set(first[2]), itertools.chain([first], rows)
    if set(OURS) <= found:
        return read_own_format(path, rows, limits)
    if set(AUTHORS) <= found:
        return read_authors_format(rows, limits, tokenizer)
    raise ConfigError(
        f"rollouts {path}: columns {', '.join(sorted(found))}; wanted are {', '.join(OURS)} (oapl rollouts) or "
        f"{', '.join(AUTHORS)} (the OAPL authors' format)"
    )


def _rows(path: Path) -> Iterator[Row]:
    check_file(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.name.endswith(JSON_KINDS):
        return read_json_rows(path, row_decoder())
    raise ConfigError(f'rollouts {path}: unknown kind "{path.suffix}"; use {", ".join(JSON_KINDS)} or .parquet')


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise ConfigError(f"rollouts {path}: two columns have one name among {', '.join(names)}: which one counts?")
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rollouts {path} is damaged or not a Parquet file: {error}") from error
