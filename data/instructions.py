"""Records -> prompt text -> token ids with their loss mask -> batches.

A record is Alpaca's {"instruction", "input", "output"} plus an optional "task" name. A *prompt* is a record
of the pool, with its answer; the user's request is the *query*. PILLOW puts prompts before it (section 3):

    ### Instruction: ...  ### Input: ...  ### Response: an answer       <- m prompts, each a whole block
    ### Instruction: ...  ### Input: ...  ### Response:                 <- the query; the model continues

Every segment (a block, the query, the answer) is tokenised separately and the ids are joined. So the answer's
mask is exact, a prompt has the same ids before any query, and the first one has the same KV cache.

Simplified: Alpaca's section headers without its two-sentence preamble, which would be half of a short record.

Try: python -c "from data.instructions import *; print(read_records('data/example_pool.jsonl')[0])"
"""
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import LONGEST_TEXT, Tokenizer

FIELDS = ("task", "instruction", "input", "output")
TEMPLATE = "alpaca-headers-2"  # stored with every adapter: a model tuned on another template answers badly
BLOCK_END = "\n\n"  # between a prompt's answer and the next block
NEXT_BLOCK = "### Instruction:\n"  # at the start of a line it ends an answer; a heading of its own does not
# Scripts without blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
NO_BLANKS = ("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
             "\U00020000-\U0003ffff]")
Record = dict[str, str]


# ---- records ---------------------------------------------------------------------------------------------

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


def read_fitting(path: Path, tokenizer: Tokenizer, max_length: int, answered: bool = True) -> list[Record]:
    """read_records without those longer than max_length tokens (question, and answer if `answered`)."""
    records, kept = read_records(path), []
    for record in records:
        ids = tokenizer.bos + tokenizer.encode(query_text(record))
        length = len(ids) + (len(tokenizer.encode(record["output"])) + 1 if answered else 0)  # + 1: EOS
        kept += [record] if length <= max_length else []
    if not kept:
        raise ValueError(f"{path}: no record fits in {max(0, max_length)} tokens; shorten them"
                         + " or lower --max_new_tokens" * (not answered) + ".")
    print(f"{path.stem}: {len(kept)} records" + (len(kept) < len(records)) * (
        f" ({len(records) - len(kept)} longer than {max_length} tokens, left out)"))
    return kept


def say_long_answers(queries: dict[str, list[Record]], tokenizer: Tokenizer, limit: int) -> None:
    """Says how many references no answer can reach."""
    lengths = [len(tokenizer.encode(query["output"])) for of in queries.values() for query in of]
    if n := sum(length > limit for length in lengths):
        print(f"({n} of {len(lengths)} references are longer than --max_new_tokens {limit}: no answer can "
              "reach them)")


# ---- template and token ids ------------------------------------------------------------------------------

def query_text(record: Record) -> str:
    """A record's block up to where its answer begins. Without an input there is no input section."""
    middle = f"\n\n### Input:\n{record['input']}" if record["input"].strip() else ""
    return f"### Instruction:\n{record['instruction']}{middle}\n\n### Response:\n"


def segments(tokenizer: Tokenizer, record: Record) -> list[list[int]]:
    """The ids of a block's question, of its answer, and of what separates it from the next block. Training
    and use take them from here, so that a prompt is read as it was trained."""
    return [tokenizer.encode(text) for text in (query_text(record), record["output"], BLOCK_END)]


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[Record]) -> list[int]:
    """bos, then each prompt's whole block, question and answer: the same ids whatever follows."""
    ids = list(tokenizer.bos)
    for record in prompts:
        ids += sum(segments(tokenizer, record), [])
    return ids


def join_ids(tokenizer: Tokenizer, prompts: Sequence[Record], rest: list[int],
             max_length: int) -> tuple[list[int], int]:
    """(ids of prompts and `rest`, how many prompts fit). ValueError if `rest` alone is too long.

    If not all fit, prompts are dropped from the front, even though the first pick is the best match. It
    stands first because its keys and values can then be shared.
    """
    for first in range(len(prompts) + 1):
        ids = prompt_ids(tokenizer, prompts[first:]) + rest
        if len(ids) <= max_length:
            return ids, len(prompts) - first
    raise ValueError(f"the query has {len(ids)} tokens, but the model has room for {max(0, max_length)}; "
                     "shorten it, or lower --max_new_tokens.")


def training_example(tokenizer: Tokenizer, records: Sequence[Record],
                     max_length: int) -> tuple[list[int], list[int]]:
    """The blocks of `records` as one sample: (ids, targets), equally long. targets[t] is what the model
    should say after it has read ids[:t + 1], and -1 where nothing is to be learned.

    Every answer has loss. Attention is causal, so each is read exactly as behind the prompts before it, and
    one pass trains with 0, 1, 2 .. prompts. After an answer's last token the target is EOS, or the model
    never learns to stop, even where the next block follows. If not all fit, the first records are left out.
    """
    ids, targets = list(tokenizer.bos), [-1] * len(tokenizer.bos)
    for record in records:
        question, answer, end = segments(tokenizer, record)
        ids += question + answer + end
        targets += [-1] * (len(question) - 1) + answer + [tokenizer.eos] + [-1] * len(end)
    ids, targets = ids[:-len(end)], targets[:-len(end)]  # nothing follows the last answer
    if len(ids) > max_length and len(records) > 1:
        return training_example(tokenizer, records[1:], max_length)
    return ids, targets


def say_cut_samples(samples: Sequence[Sequence[int]], lengths: Sequence[int], between: int,
                    max_length: int) -> None:
    """Says how many records training_example will leave out. lengths: each record's own; between: what two in
    a row add to that (BLOCK_END, less a second bos)."""
    cut = 0
    for sample in samples:
        total = sum(lengths[i] for i in sample) + between * (len(sample) - 1)
        for i in sample[:-1]:
            cut, total = cut + (total > max_length), total - (lengths[i] + between) * (total > max_length)
    if cut:
        print(f"({cut} of {sum(map(len, samples))} places in the samples are left out: a sample has at most "
              f"{max_length} tokens; lower --shots)")


def clean_answer(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Generated ids -> the answer: what stands before an end token and before the template's next block."""
    end = next((i for i, token in enumerate(ids) if token in tokenizer.ends), len(ids))
    # the limit of new tokens may have cut the block's first line
    return re.split(r"(?m)^### Instruction(?::\n|:?\Z)", tokenizer.decode(ids[:end]))[0].strip()


def at_next_block(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether generated ids have gone on to the template's next block: the answer is over."""
    return re.search(f"(?m)^{NEXT_BLOCK}", tokenizer.decode(ids)) is not None


def words(text: str) -> list[str]:
    """The words that scores compare, in lower case: runs of letters, marks and digits of any script. Where a
    script has no blanks each character is a word; a text of symbols only is cut at its blanks."""
    text = re.sub(NO_BLANKS, r" \g<0> ", unicodedata.normalize("NFC", text.lower()))
    found = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    return found or text.split()


# ---- batches ---------------------------------------------------------------------------------------------

def length_sorted_batches(lengths: Sequence[int], batch_size: int,
                          generator: torch.Generator | None = None) -> list[list[int]]:
    """Indices in batches of near-equal length, so that hardly anything is padding. With a generator, equal
    lengths are shuffled among themselves, and so is the order of the batches."""
    def order(n: int) -> list[int]:
        return list(range(n)) if generator is None else torch.randperm(n, generator=generator).tolist()
    rows = sorted(order(len(lengths)), key=lambda i: lengths[i])  # stable: the shuffle decides among equals
    batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in order(len(batches))]


def collate(examples: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Training examples -> ids (B, T) and targets (B, T), padded at the right; -1: no loss.

    The pad id is never looked at: causal attention cannot see to the right, and its targets are -1.
    """
    ids, targets = ([torch.tensor(row) for row in rows] for rows in zip(*examples, strict=True))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(targets, batch_first=True, padding_value=-1)
