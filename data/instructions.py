"""The template: records -> prompt text -> token ids with their loss mask; and where an answer ends.

A *prompt* is a record of the pool, with its answer; the user's request is the *query*. PILLOW puts prompts
before it (section 3):

    ### Instruction: ...  ### Input: ...  ### Response: an answer       <- m prompts, each a whole block
    ### Instruction: ...  ### Input: ...  ### Response:                 <- the query; the model continues

Every segment (a block, the query, the answer) is tokenised separately and the ids are joined. So the answer's
mask is exact, a prompt has the same ids before any query, and the first one has the same KV cache.

A record is an instruction, maybe an input, and an output (data/records.py).
Simplified: Alpaca's section headers without its two-sentence preamble, which would be half of a short record.

Try: python -c "from data.instructions import *; print(query_text({'instruction': 'Greet me.', 'input': ''}))"
"""
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from data.records import Record, read_records
from data.tokenizer import Tokenizer

TEMPLATE = "alpaca-headers-2"  # stored with every adapter: a model tuned on another template answers badly
BLOCK_END = "\n\n"  # between a prompt's answer and the next block
NEXT_BLOCK = "### Instruction:\n"  # at the start of a line it ends an answer; a heading of its own does not


# ---- records that fit ------------------------------------------------------------------------------------

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


def load_queries(data: Path, tokenizer: Tokenizer, room: int, seed: int) -> dict[str, list[Record]]:
    """{split: its queries of at most `room` tokens} of rl, val, test; shuffled: a split is sorted by task."""
    order, queries = torch.Generator().manual_seed(seed), {}
    for split in ("rl", "val", "test"):
        found = read_fitting(data / f"{split}.jsonl", tokenizer, room, answered=False)
        queries[split] = [found[i] for i in torch.randperm(len(found), generator=order).tolist()]
    return queries


def say_long_answers(queries: dict[str, list[Record]], tokenizer: Tokenizer, limit: int) -> None:
    """Says how many references are longer than any answer may be."""
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


def clean_answer(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Generated ids -> the answer: what stands before an end token and before the template's next block."""
    end = next((i for i, token in enumerate(ids) if token in tokenizer.ends), len(ids))
    # the limit of new tokens may have cut the block's first line
    return re.split(r"(?m)^### Instruction(?::\n|:?\Z)", tokenizer.decode(ids[:end]))[0].strip()


def at_next_block(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether generated ids have gone on to the template's next block: the answer is over."""
    return re.search(f"(?m)^{NEXT_BLOCK}", tokenizer.decode(ids)) is not None
