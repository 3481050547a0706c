"""Plumbing: a file of records -> checked records. Nothing of the method lives here.

A record is Alpaca's {"instruction", "input", "output"} plus an optional "task" name. The same checks serve
data of the user's own, pools, and what this code has written itself. A wrong record is named with its line.

Try: python -c "from data.records import *; print(read_records('data/example_pool.jsonl')[0])"
"""
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.tokenizer import LONGEST_TEXT

FIELDS = ("task", "instruction", "input", "output")
Record = dict[str, str]


def check_record(item: object, where: str) -> Record:
    """`item` as a record with all four fields, or a ValueError that starts with `where` ("file:line")."""
    if not isinstance(item, dict):
        raise ValueError(f"{where}: a record must be a JSON object with instruction, input and output, but "
                         f"it is a {type(item).__name__}.")
    record = {}
    for field in FIELDS:
        needed, value = field in ("instruction", "output"), item.get(field)
        if needed and field not in item:
            raise ValueError(f"{where}: field '{field}' is missing; found {sorted(item)[:9]}. Write "
                             "each record as an instruction and an output, maybe with an input and a task.")
        value = "" if value in (None, [], {}) and not needed else value  # null and empty mean absent
        if not isinstance(value, str):
            raise ValueError(f"{where}: field '{field}' must be text, but it is {json.dumps(value)[:60]}.")
        if needed and not value.strip():
            raise ValueError(f"{where}: field '{field}' is empty; write it or remove the record.")
        if len(value) > LONGEST_TEXT:
            raise ValueError(f"{where}: field '{field}' has {len(value):,} characters; shorten it.")
        if re.search("[\ud800-\udfff]", value):  # a JSON escape can hold one, a UTF-8 file cannot
            raise ValueError(f"{where}: field '{field}' has half a surrogate pair; remove that character.")
        record[field] = value
    return record


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSON array or of JSON lines, told apart by content; a BOM and CRLF do no harm.

    FileNotFoundError, or ValueError that names file:line (in an array: the number of the record) of each that
    is wrong. Other fields are counted and left out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a .json or .jsonl file of instruction records.")
    raw, found, n = path.read_bytes(), [], 1
    try:
        text = raw.decode("utf-8-sig")
        if text.lstrip().startswith("["):
            found = [(f"{path}: record {i}", item) for i, item in enumerate(json.loads(text), 1)]
        else:
            for n, line in enumerate(text.split("\n"), 1):  # TRAP: splitlines() would cut at U+2028 too
                if line.strip():
                    found.append((f"{path}:{n}", json.loads(line)))
    except UnicodeDecodeError as error:
        n += raw[:error.start].count(b"\n")
        raise ValueError(f"{path}:{n}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets; it has no lineno
        raise ValueError(f"{path}:{n + getattr(error, 'lineno', 1) - 1}: not valid JSON ({error}); write one "
                         "record a line, or one JSON array.") from None
    if not found:
        raise ValueError(f"{path}: no record in this file; write one a line.")
    records, wrong, dropped = [], {}, Counter()
    for where, item in found:
        try:
            records.append(check_record(item, where))
            dropped.update(field for field, value in item.items() if field not in FIELDS and value)
        except ValueError as error:
            wrong[where.removeprefix(f"{path}:").strip()] = str(error)
    if wrong:
        first, *more = wrong
        raise ValueError(wrong[first] + bool(more) * f" {len(more)} more are wrong: {', '.join(more[:30])}"
                         + ", ..." * (len(more) > 30))
    if dropped:
        print(f"({path}: fields that are not used: "
              + ", ".join(f"'{field}' of {n} records" for field, n in dropped.most_common(9)) + ")")
    return records


def question(record: Record) -> tuple[str, str]:
    """What a record asks. Records that ask the same are twins, whatever their answers and tasks are."""
    return record["instruction"], record["input"]


def read_pool(path: str | Path, queries: Sequence[Record] = ()) -> list[Record]:
    """The prompts of a file, each once: a copy would be a pick that says nothing new. A prompt that asks what
    one of `queries` asks is left out: its answer would stand before the question."""
    asked, records, pool = set(map(question, queries)), read_records(path), {}
    for record in records:
        if question(record) not in asked:
            pool.setdefault((*question(record), record["output"]), record)
    if len(pool) < len(records):
        print(f"({path}: {len(records) - len(pool)} of {len(records)} prompts are left out: copies of others"
              + ", or the same question as a query's" * bool(queries) + ")")
    return list(pool.values())
