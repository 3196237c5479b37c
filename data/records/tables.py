"""Rows of parquet and arrow files, of which only the columns with text are decoded.

Arrow files are IPC files (feather) or streams (what `datasets` saves). A stream without its end mark was cut short: the
library takes what is there for all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minilm.data.errors import DataError, one_line

_BATCH_ROWS = 1024
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def columns_with_text(path: str, kind: str) -> list[str]:
    """The top-level columns that may hold text: strings, lists of them, structs with them."""
    import pyarrow as pa

    def fits(type_: Any) -> bool:
        if pa.types.is_dictionary(type_):
            return fits(type_.value_type)
        if pa.types.is_struct(type_):
            return any(fits(type_.field(number).type) for number in range(type_.num_fields))
        if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
            return fits(type_.value_type)
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
        return any(is_text(type_) for is_text in texts)

    with _problems(path, kind), _opened(path, kind) as table:
        schema = table.schema_arrow if kind == "parquet" else table.schema
        double = [name for name in schema.names if schema.names.count(name) > 1]
        if double:
            raise DataError(
                f"text {path!r} has two columns called {double[0]!r}; write it again with one of them"
            )
        return [field.name for field in schema if fits(field.type)]


def has_column(path: str, kind: str, name: str) -> str | None:
    """The top-level column that the field `name` lies in, which may be a dotted path; None where there is none."""
    with _problems(path, kind), _opened(path, kind) as table:
        names = (table.schema_arrow if kind == "parquet" else table.schema).names
    found = [column for column in names if name == column or name.startswith(f"{column}.")]
    return max(found, key=len, default=None)


def rows(path: str, kind: str, columns: list[str]) -> Iterator[tuple[str, dict[str, Any], float]]:
    """(place, record, share of the file read) of every row; records hold `columns` alone."""
    number = 0
    with _problems(path, kind):
        for batch, share in _batches(path, kind, columns):
            for begin in range(0, batch.num_rows, _BATCH_ROWS):
                try:
                    records = batch.slice(begin, _BATCH_ROWS).to_pylist()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"text {path!r}: a text in rows {number + 1} to {number + _BATCH_ROWS} is not UTF-8 "
                        f"({error.reason}); write it again with valid text"
                    ) from error
                for record in records:
                    number += 1
                    yield f"row {number}", record, share


def _batches(path: str, kind: str, columns: list[str]) -> Iterator[tuple[Any, float]]:
    import pyarrow as pa

    if kind == "parquet":
        with _opened(path, kind) as table:
            total, done = max(1, table.metadata.num_rows), 0
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                done += batch.num_rows
                yield batch, done / total
            if done != table.metadata.num_rows:
                raise DataError(
                    f"text {path!r} holds {done} rows, but says {table.metadata.num_rows}; fetch it again"
                )
        return
    with _opened(path, kind) as table:
        names = table.schema.names
    only = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns])
    size = max(1, Path(path).stat().st_size)
    with pa.OSFile(path) as file, _ipc(file, path, only) as table:
        if isinstance(table, pa.ipc.RecordBatchFileReader):
            for number in range(table.num_record_batches):
                yield table.get_batch(number), (number + 1) / table.num_record_batches
        else:
            for batch in table:
                yield batch, file.tell() / size


@contextmanager
def _opened(path: str, kind: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        with pq.ParquetFile(path) as table:
            yield table
    else:
        with pa.OSFile(path) as file, _ipc(file, path, None) as table:
            yield table


def _ipc(file: Any, path: str, options: Any) -> Any:
    import pyarrow as pa

    begin = file.read(8)
    file.seek(0)
    if begin.startswith(b"ARROW1"):
        return pa.ipc.open_file(file, options=options)
    file.seek(max(0, file.size() - len(_STREAM_END)))
    if file.read(len(_STREAM_END)) != _STREAM_END:
        raise DataError(
            f"text {path!r} is cut short, or no arrow file (its end mark is missing); fetch it again"
        )
    file.seek(0)
    return pa.ipc.open_stream(file, options=options)


@contextmanager
def _problems(path: str, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(
            f"text {path!r} is damaged or no {kind} file ({one_line(error)}); fetch it again"
        ) from error
