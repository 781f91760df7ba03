"""Records to train on, evaluate on or answer: from JSONL, from Parquet, from a folder of either, or from the hub.

A record has a `prompt` (a string, or messages that end with the user's turn) or `messages` (a whole conversation; its last
assistant turn, if it ends with one, is the off-policy answer), and may have any of these strings:
    answer: the right result, for grading;
    completion: the off-policy answer to `prompt`;
    teacher_context: text that only the teacher sees;
    teacher: the name of the teacher that scores the record.
Its `tools` (a list of functions, or that as JSON) reach the chat templates.
Other columns are kept. A row that does not fit is named by its file and line (JSONL) or its row, counted from 0 (Parquet, hub).
"""

import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from simct.console import error_line
from simct.data.prompts import Prompt, message_of, prompt_of, short, tools_of
from simct.data.sources import (
    Places,
    Record,
    Row,
    dataset_rows,
    from_hub,
    from_parquet,
    is_parquet,
    local_files,
    read_jsonl,
    read_parquet,
)

ON_BAD_ROW = ("stop", "skip")
TEXTS = ("answer", "completion", "teacher_context", "teacher")
COLUMNS = ("prompt", "messages", "tools", *TEXTS)  # what is read to check a row

Report = Callable[[str], None]


def load_records(
    source: str | Path,
    *,
    split: str = "train",
    streaming: bool = False,
    on_bad_row: str = "stop",
    report: Report | None = None,
):
    """The checked records of a file, a folder or a data set of the hub (`name` or `name:config`).

    Args:
        source: a `.parquet` file; any other file is read as JSON lines. Of a folder, the files of `split` are read, told by their
            names as `datasets` does (all of them where no name speaks of a split).
        split: of a folder or a hub data set; there also a slice, "train[:1000]". A file is one split, whatever its name.
        streaming: read and check rows when they are asked for. Of several files each is then a source of its own: its bad rows
            are reported at its end, and it is an error that it has no other.
        on_bad_row: "stop", or "skip": leave bad rows out, count them and report the first few.
        report: called with that text; a warning if not given.

    Returns:
        JSONL: a list of dictionaries, each with its `prompt`, all in memory. Parquet and hub: a `datasets.Dataset`, mapped from
        disk (`rows` reads it fast). Streaming: a `datasets.IterableDataset`, whose files are its shards.

    Raises ValueError, also while a stream is read: nothing can be read there, a bad row and on_bad_row="stop", no good row at all.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row is {on_bad_row!r}: expected one of {', '.join(ON_BAD_ROW)}")
    files = local_files(source, split)
    bad = BadRows(str(source), on_bad_row, report)
    if streaming:
        return _stream(source, split, files, bad)
    if files is not None and not is_parquet(files[0]):
        return bad.records(row for file in files for row in read_jsonl(file))
    if files is None:
        dataset, place = from_hub(source, split), lambda number: (str(source), number)
    else:
        dataset, place = from_parquet(source, files)
    _check_columns(source, dataset.column_names)
    columns = [name for name in COLUMNS if name in dataset.column_names]
    places, good = Places("row"), array("q")
    for row in bad.good(Row(*place(i), "row", *read, index=i) for i, *read in dataset_rows(dataset, columns)):
        places.add(row)
        good.append(row.index)
    if len(good) < len(dataset):
        dataset = dataset.select(good)
    dataset.places = places
    return dataset


class Records(list):
    """Records in memory, and where each was read."""

    def __init__(self, records: Iterable[Record], places: Places) -> None:
        super().__init__(records)
        self.places = places


def place_of(records, number: int) -> str | None:
    """The file and line (or row) of a record that `load_records` gave, if nobody has chosen among them since."""
    places = getattr(records, "places", None)
    return None if places is None else places(number)


def part_of(records, start: int, stop: int):
    """Records `start` to `stop - 1` of what `load_records` gave."""
    places = records.places.part(start, stop)
    if isinstance(records, Records):
        return Records(records[start:stop], places)
    part = records.select(range(start, stop))
    part.places = places
    return part


def read_prompts(path: str | Path) -> list[Record]:
    """The records of a JSONL file, each with a checked `prompt`; other columns are kept.

    Raises:
        ValueError: the file is missing or holds no record; a line is not a JSON object, or has no usable `prompt` or `messages`
            (named with its line number).
    """
    return BadRows(str(path), "stop", None, check=prompt_of).records(read_jsonl(Path(path)))


def reference_answer(record: Record) -> str | None:
    """The off-policy answer of a record: `completion`, or the last assistant turn of `messages`; None where there is none.
    ValueError if it is not a string."""
    if record.get("completion") is not None:
        return _text(record, "completion")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return None
    if messages[-1].get("role") != "assistant" or messages[-1].get("tool_calls"):  # a call of a tool is no text
        return None
    content = message_of(messages[-1], "field 'messages', the last message")["content"]
    _encodable("messages", content)
    return content


def check_record(record: Record) -> Prompt:
    """The record's prompt, once every field that the package reads has been checked. ValueError names the field."""
    prompt = prompt_of(record)
    tools_of(record)
    reference_answer(record)
    for name in TEXTS:
        _text(record, name)
    return prompt


def rows(records: Iterable[Record], columns: list[str] | None = None) -> Iterator[Record]:
    """The records one by one; those of a `datasets.Dataset` by blocks of columns (row by row it would be slow)."""
    if not hasattr(records, "select_columns") or not hasattr(records, "__len__"):
        yield from records
        return
    dataset = records.with_format(None)
    for block in (dataset if columns is None else dataset.select_columns(columns)).iter(batch_size=1000):
        for values in zip(*block.values(), strict=True):
            yield dict(zip(block, values, strict=True))


class BadRows:
    """What happens to rows that are no records. One rule for all sources: the first one ends the reading, or it is left out,
    counted, and reported at the end with the first few."""

    SHOWN = 3

    def __init__(self, source: str, on_bad_row: str, report: Report | None, check=check_record) -> None:
        self.source, self.on_bad_row, self.report, self.check = source, on_bad_row, report, check

    def records(self, found: Iterable[Row]) -> "Records":
        records = Records((), Places("line"))
        for row in self.good(found):
            records.append(row.record)
            records.places.add(row)
        return records

    def good(self, found: Iterable[Row], source: str | None = None, may_be_empty: bool = False) -> Iterator[Row]:
        """The good rows, records with their `prompt`, of one source (of which there may be others: then this one may be empty)."""
        source = self.source if source is None else source
        kept, count, first = 0, 0, []
        for row in found:
            problem = row.problem
            if problem is None:
                try:
                    row.record = {**row.record, "prompt": self.check(row.record)}
                except ValueError as error:
                    problem = error_line(error)
            if problem is None:
                kept += 1
                yield row
                continue
            count += 1
            if len(first) < self.SHOWN:
                first.append(error_line(f"{row.place}: {problem}"))
            if self.on_bad_row == "stop":
                raise ValueError(first[0])
        if not kept and count:
            raise ValueError(f"data {source!r} has only bad rows, {count} of them, the first: {first[0]}")
        if not kept and not may_be_empty:
            raise ValueError(f"data file {source!r} is empty: expected at least one line with a prompt or messages")
        if count:
            more = f"; and {count - len(first)} more" if count > len(first) else ""
            text = f"{count} of {kept + count} rows of {error_line(source)} left out: {'; '.join(first)}{more}"
            (self.report or _warn)(text)


def _stream(source, split: str, files: list[Path] | None, bad: BadRows):
    from datasets import IterableDataset

    if files is None:
        stream = from_hub(source, split, streaming=True)
        return IterableDataset.from_generator(_stream_hub, gen_kwargs={"stream": stream, "bad": bad})
    shards = {"files": list(map(str, files)), "bad": bad, "total": len(files)}
    return IterableDataset.from_generator(_stream_files, gen_kwargs=shards)


def _stream_files(files: list[str], bad: BadRows, total: int) -> Iterator[Record]:
    """`files`: all of them, or the part that a worker was given."""
    for file in files:
        found = (read_parquet if is_parquet(file) else read_jsonl)(Path(file))
        for row in bad.good(found, file, may_be_empty=total > 1):
            yield row.record


def _stream_hub(stream, bad: BadRows) -> Iterator[Record]:
    for row in bad.good(Row(bad.source, i, "row", *read) for i, *read in dataset_rows(stream)):
        yield row.record


def _check_columns(source, columns: list[str]) -> None:
    if "prompt" not in columns and "messages" not in columns:
        raise ValueError(
            f"data {str(source)!r}: expected a column 'prompt' or 'messages', found only {sorted(columns)}"
        )


def _text(record: Record, name: str) -> str | None:
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {short(value)}: expected a string")
    _encodable(name, value)
    return value


def _encodable(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"field {name!r} holds half a character ({half!r}, a lone surrogate): expected text") from None


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
