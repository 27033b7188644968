"""Where rows come from: files of several kinds, folders of them, data sets of the Hub -> (place, row) one by one.

A record that cannot be read is given as a :class:`BadRow` in the row's stead, so that one line never hides the others.
"""

import ast
import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

COMPRESSIONS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ENDINGS = {  # of the files that are read here -> kind, compression
    **{kind + packed: (kind, packed) for kind in TEXT_ENDINGS for packed in (*COMPRESSIONS, ".zst")},
    ".parquet": (".parquet", ""),
}
KINDS = ".jsonl, .json, .csv or .tsv (as they are, or .gz, .bz2, .xz, .zst) or .parquet"
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
SURROGATES = re.compile("[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BadRow(ValueError):
    """Why a row cannot be used; whoever knows its place adds it."""


Record = tuple[str, dict | BadRow]


def read_source(source: str, split: str) -> Iterator[Record]:
    """(place, row) of everything in a file, a folder, or what ``datasets`` knows by that name.

    What lies in a folder and is not read is named on stderr.

    Raises:
        ValueError: a file of another kind, a damaged one, a missing split.
        OSError: a source that does not exist or cannot be reached.
    """
    path = Path(source)
    if _is_saved(path):
        return _read_dataset(source, split)
    files = local_files(source)
    if path.is_dir():
        left = sorted(p.name for p in path.iterdir() if p not in files and not p.name.startswith("."))
        if files and left:
            say(f"{source}: not read, because only {KINDS} at the top of a folder are: {', '.join(left)}")
    # Parquet alone is how data sets of the Hub lie on a disk, with their splits in the names of the files.
    if all(file.name.endswith(".parquet") for file in files) and (path.is_dir() or not files):
        return _read_dataset(source, split)
    return read_files(files)


def say(text: str) -> None:
    """A remark on stderr, from one process of a run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ppow: {text}", file=sys.stderr)


def local_files(source: str) -> list[Path]:
    """The row files that ``source`` names: itself, or those at the top of the folder; empty for anything else."""
    path = Path(source)
    if path.is_dir():
        return sorted(child for child in path.iterdir() if _kind(child)[0] and child.is_file() and child.name[0] != ".")
    if _kind(path)[0]:
        if not path.exists():
            raise FileNotFoundError(f"{source} does not exist.")
        return [path]
    if path.is_file():
        raise ValueError(f"{source} is not one of {KINDS}; convert it to one JSON object per line.")
    return []


def read_files(files: list[Path]) -> Iterator[Record]:
    """(place, row) of every row; a place is ``file:line``, or ``file[index]`` where rows have no lines.

    Raises:
        ValueError: a file that is damaged, or as a whole not what its name says.
    """
    for path in files:
        kind, packed = _kind(path)
        try:
            if kind == ".parquet":
                yield from _read_parquet(path)
                continue
            with _open_text(path, packed, newline="" if kind in (".csv", ".tsv") else None) as text:
                yield from _READERS[kind](path, text)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, UnicodeError, csv.Error) as error:
            raise _damaged(path, error) from None
        except OSError as error:
            if error.errno is not None:  # of the system, which names the file itself
                raise
            raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or not what its name says ({error}).")


def _kind(path: Path) -> tuple[str, str]:
    """The kind of a file, as its ending, and the compression's; twice nothing for one that is not read here."""
    return next((found for ending, found in ENDINGS.items() if path.name.endswith(ending)), ("", ""))


def _open_text(path: Path, packed: str, newline: str | None) -> io.TextIOWrapper:
    """Text without its byte order mark. Bytes that are no UTF-8 come as lone surrogates, for the row to be named."""
    if packed == ".zst":
        import pyarrow

        stream = io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    else:
        stream = COMPRESSIONS[packed](path, "rb")
    start = stream.peek(4)[:4]
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8-sig")
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=newline)


# -- JSON --------------------------------------------------------------------------------------------------------------


def _read_json_lines(path: Path, lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        line = line.strip("\ufeff \t\r\n")  # a mark also stands where files were joined
        if line:
            yield f"{path}:{number}", _parse_row(line)


def _parse_row(line: str) -> dict | BadRow:
    try:
        return _as_row(parse_json(line))
    except ValueError as error:
        return BadRow(f"not valid JSON ({error}).")


def _as_row(value: object) -> dict | BadRow:
    return value if isinstance(value, dict) else BadRow(f"expected a JSON object, got {type(value).__name__}.")


def parse_json(text: str) -> Any:
    """Parse; half a surrogate pair, which no tokenizer takes, becomes U+FFFD. Raises ValueError for all that fails."""
    if SURROGATES.search(text):
        raise ValueError("it holds bytes that are not UTF-8")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return _whole_characters(value) if ESCAPED_SURROGATE.search(text) else value


def _whole_characters(value: Any) -> Any:
    if isinstance(value, str):
        return SURROGATES.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(item) for key, item in value.items()}
    return [_whole_characters(item) for item in value] if isinstance(value, list) else value


def _read_json(path: Path, file: io.TextIOWrapper) -> Iterator[Record]:
    """A .json file: a list of rows, an object of columns, an object that holds one list of rows, one row, or lines."""
    text = file.read().lstrip("\ufeff")
    if not text.strip():
        return
    try:
        whole = parse_json(text)
    except ValueError as error:
        lines = text.split("\n")  # JSON Lines under another name?
        if not text.lstrip().startswith("{") or all(isinstance(_parse_row(line), BadRow) for line in lines[:100]):
            raise ValueError(f"{path}: not valid JSON ({error}).") from None
        yield from _read_json_lines(path, lines)
        return
    for index, row in enumerate(_rows_of(whole)):
        yield f"{path}[{index}]", _as_row(row)


def _rows_of(whole: Any) -> list:
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict) or _is_row(whole):
        return [whole]
    values = list(whole.values())
    if values and all(isinstance(v, dict) and v.keys() == values[0].keys() for v in values):  # as pandas writes
        return [{name: column[key] for name, column in whole.items()} for key in values[0]]
    alone = len(values) == 1 and all(isinstance(item, dict) for item in values[0])  # {"data": rows}
    if values and all(isinstance(v, list) and len(v) == len(values[0]) for v in values) and not alone:
        return [dict(zip(whole, row)) for row in zip(*values)]
    lists = [v for v in values if isinstance(v, list) and all(isinstance(item, dict) for item in v)]
    return lists[0] if len(lists) == 1 else [whole]


def _is_row(value: dict) -> bool:
    """Whether an object is one row, rather than columns of some."""
    for chat in (value.get(key) for key in ("messages", "conversations", "conversation")):
        if isinstance(chat, list) and any(isinstance(m, dict) and m.keys() & {"role", "from"} for m in chat):
            return True
    if isinstance(value.get("turns"), list) and all(isinstance(turn, str) for turn in value["turns"]):
        return True
    return any(isinstance(value.get(key), str) for key in ("text", "prompt", "instruction", "question"))


# -- tables ------------------------------------------------------------------------------------------------------------


def _read_table(path: Path, lines: Iterator[str]) -> Iterator[Record]:
    """A .csv or .tsv file with a header; an empty cell is a missing column."""
    csv.field_size_limit(2**31 - 1)  # whole chats stand in a cell
    header = next(lines, "").lstrip("\ufeff")
    delimiter = "\t" if _kind(path)[0] == ".tsv" else max(",;\t", key=header.count)
    reader = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, BadRow(f"not valid CSV ({error}).")
            continue
        if None in row:
            yield place, BadRow(f"has more cells than the header's {len(reader.fieldnames or ())}.")
        elif any(SURROGATES.search(cell) for cell in row.values() if cell):
            yield place, BadRow("holds bytes that are not UTF-8.")
        else:
            yield place, {name.strip(): cell for name, cell in row.items() if cell}


def parse_cell(text: str) -> Any:
    """A list or an object that a table, or a column of texts, holds as text: JSON, or as Python prints it.

    Raises:
        ValueError: anything else.
    """
    try:
        return parse_json(text)
    except ValueError:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise ValueError(f"is a text that is not JSON: {text!r:.80}") from None


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}[{index}]", without_nulls(row)
                    index += 1
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from None


def without_nulls(value: Any) -> Any:
    """Columns hold a null wherever another row has something: in a table, a null is a missing key."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if not is_null(item)}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def is_null(value: object) -> bool:
    """None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


_READERS: dict[str, Callable[[Path, io.TextIOWrapper], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
}


# -- data sets ---------------------------------------------------------------------------------------------------------


def _is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` of datasets wrote this folder."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _read_dataset(source: str, split: str) -> Iterator[Record]:
    """A data set of the Hub, a folder of Parquet files as the Hub has them, or a saved data set."""
    import datasets

    if _is_saved(Path(source)):
        rows = datasets.load_from_disk(source)
        if isinstance(rows, dict):
            if split not in rows:
                raise ValueError(f"{source} has the splits {', '.join(rows)}, not {split!r}; choose one with --split.")
            rows = rows[split]
    else:
        rows = datasets.load_dataset(source, split=split)
    for index, row in enumerate(rows):
        yield f"{source}[{split}] row {index}", without_nulls(row)
