"""Records -> prompt text -> token ids with their loss mask -> batches.

A record is Alpaca's {"instruction", "input", "output"} plus an optional "task" name. PILLOW (section 3) puts
matched records, with their answers, in front of the query:

    ### Instruction: ...  ### Input: ...  ### Response: an answer       <- m exemplars, each a whole block
    ### Instruction: ...  ### Input: ...  ### Response:                 <- the query; the model goes on

Every segment (a block, the query, the answer) is tokenised by itself and the ids are joined: the mask of the
answer is exact by construction, and an exemplar has the same ids and KV cache before any query.

Simplified: Alpaca's section headers without its two-sentence preamble, which would be half of a short record.

Try: python -c "from data.instructions import *; print(read_records('data/example_pool.jsonl')[0])"
"""
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from data.tokenizer import LONGEST_TEXT, Tokenizer

FIELDS = ("task", "instruction", "input", "output")
TEMPLATE = "alpaca-headers-1"  # stored with every adapter: a model tuned on another template answers badly
NEXT_BLOCK = "### Instruction"  # an answer ends here at the latest
Record = dict[str, str]


# ---- records ---------------------------------------------------------------------------------------------

def check_record(item: object, where: str) -> Record:
    """`item` as a record with all four fields, or a ValueError that starts with `where` ("file:line")."""
    if not isinstance(item, dict):
        raise ValueError(f"{where}: a record must be a JSON object with instruction, input and output, "
                         f"but this is a {type(item).__name__}.")
    for field in ("instruction", "output"):
        if field not in item:
            raise ValueError(f"{where}: field '{field}' is missing; found {sorted(item)}.")
    record = {field: item.get(field, "") for field in FIELDS}
    for field, value in record.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: field '{field}' must be text, but it is {json.dumps(value)[:60]}.")
        if len(value) > LONGEST_TEXT:
            raise ValueError(f"{where}: field '{field}' has {len(value):,} characters; shorten it.")
        if re.search("[\ud800-\udfff]", value):  # a JSON escape can bring one, and no file can hold it
            raise ValueError(f"{where}: field '{field}' has half a surrogate pair, no character; mend it.")
    for field in ("instruction", "output"):
        if not record[field].strip():
            raise ValueError(f"{where}: field '{field}' is empty; write it or remove the record.")
    return record


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSON array or of JSON lines (told apart by content, not name); BOM and CRLF are ok.

    Raises FileNotFoundError, or ValueError naming file:line (for an array: the number of the record).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a .json or .jsonl file of instruction records.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from None
    found, n = [], 1
    try:
        if text.lstrip().startswith("["):
            found = [(f"{path}: record {i}", item) for i, item in enumerate(json.loads(text), 1)]
        else:
            for n, line in enumerate(text.split("\n"), 1):  # not splitlines(): it cuts at U+2028 too
                if line.strip():
                    found.append((f"{path}:{n}", json.loads(line)))
    except (ValueError, RecursionError) as error:  # the second, which has no lineno: a thousand brackets
        raise ValueError(f"{path}:{n + getattr(error, 'lineno', 1) - 1}: not valid JSON ({error}); write one "
                         "record a line, or one JSON array.") from None
    if not found:
        raise ValueError(f"{path}: no record in this file; write one a line.")
    return [check_record(item, where) for where, item in found]


# ---- template and token ids ------------------------------------------------------------------------------

def query_text(record: Record) -> str:
    """The block of a record up to where its answer begins. No input, no input section."""
    middle = f"\n\n### Input:\n{record['input']}" if record["input"].strip() else ""
    return f"### Instruction:\n{record['instruction']}{middle}\n\n### Response:\n"


def exemplar_ids(tokenizer: Tokenizer, exemplars: Sequence[Record]) -> list[int]:
    """bos, then each exemplar's whole block: question and answer. The same ids whatever follows."""
    ids = list(tokenizer.bos)
    for record in exemplars:
        ids += tokenizer.encode(query_text(record)) + tokenizer.encode(record["output"] + "\n\n")
    return ids


def training_example(tokenizer: Tokenizer, record: Record, exemplars: Sequence[Record],
                     max_length: int) -> tuple[list[int], int] | None:
    """(ids, n): the last n ids are the answer and its EOS, and they alone carry loss.

    EOS is part of the loss, or the model never learns to stop. Exemplars that do not fit are
    dropped, the farthest first; None if the record itself does not fit: an answer that is cut loses its
    EOS.
    """
    query = tokenizer.encode(query_text(record))
    answer = tokenizer.encode(record["output"]) + [tokenizer.eos]
    for first in range(len(exemplars) + 1):
        ids = exemplar_ids(tokenizer, exemplars[first:]) + query + answer
        if len(ids) <= max_length:
            return ids, len(answer)
    return None


def answering_prompt(tokenizer: Tokenizer, record: Record, exemplars: Sequence[Record],
                     max_length: int) -> tuple[list[int], int]:
    """(ids of exemplars and query, how many exemplars fit): those that do not fit go, the farthest first."""
    query = tokenizer.encode(query_text(record))
    for first in range(len(exemplars) + 1):
        ids = exemplar_ids(tokenizer, exemplars[first:]) + query
        if len(ids) <= max_length:
            return ids, len(exemplars) - first
    raise ValueError(f"the prompt has {len(ids)} tokens, the model has room for {max_length}; shorten it.")


def clean_answer(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Generated ids -> answer text: what stands before EOS and before the template's next block."""
    ids = ids[:ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids
    return tokenizer.decode(ids).split(NEXT_BLOCK)[0].strip()


# ---- batches ---------------------------------------------------------------------------------------------

def length_sorted_batches(lengths: Sequence[int], batch_size: int,
                          generator: torch.Generator | None = None) -> list[list[int]]:
    """Indices in batches of near-equal length, so that next to nothing is padding.

    With a generator, equal lengths fall into other batches each epoch and the batches come in random order.
    """
    def order(n: int) -> list[int]:
        return list(range(n)) if generator is None else torch.randperm(n, generator=generator).tolist()
    rows = sorted(order(len(lengths)), key=lambda i: lengths[i])  # stable: the shuffle decides among equals
    batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in order(len(batches))]


def collate(examples: Sequence[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Training examples -> ids (B, T), padded at the right, and targets (B, T): the *next* id; -1, no loss.

    The shift by one happens here: column t of the targets is what the model should say after reading ids[:,
    :t+1]. The pad id is never looked at: causal attention cannot see to the right, and its targets are -1.
    """
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in examples], True)  # (B, T)
    targets = torch.full_like(ids, -1)  # (B, T)
    for row, (example, n_answer) in enumerate(examples):
        start, end = len(example) - n_answer, len(example)
        targets[row, start - 1:end - 1] = ids[row, start:end]
    return ids, targets
