"""data/instructions.py: records and what is refused, the template, the loss mask, batches.

    pytest tests/test_instructions.py
"""
import json
import random

import pytest
import torch

from data.instructions import (
    BLOCK_END,
    at_next_block,
    clean_answer,
    join_ids,
    prompt_ids,
    query_text,
    read_fitting,
    say_long_answers,
    training_example,
)
from data.records import check_record, read_records
from data.samples import collate, length_sorted_batches, say_cut_samples

EOS, BOS, END = 256, 257, 258


class Bytes:
    """A tokenizer whose ids are the bytes of the text: every id below can be read by eye."""
    eos, bos, ends = EOS, [BOS], {EOS, END}

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def record(instruction, output, input=""):
    return {"task": "", "instruction": instruction, "input": input, "output": output}


def example(tokenizer, of, prompts=(), limit=999):
    return training_example(tokenizer, [*prompts, of], limit)


PLUM = record("Name the colour.", "purple", "a plum")
GRASS = record("Name the colour.", "green", "fresh grass")
RHYME = record("Give a rhyme for 'moon'.", "spoon")

# ---- template, ids and mask ------------------------------------------------------------------------------

GOLDEN = """\
### Instruction:
Give a rhyme for 'moon'.

### Response:
spoon

### Instruction:
Name the colour.

### Input:
a plum

### Response:
"""


def test_golden_sample():
    """Trap 2: the mask by hand. Both answers carry loss, each with its EOS, the first in spite of a block
    that follows."""
    ids, targets = example(Bytes(), PLUM, [RHYME])
    assert ids == [BOS, *GOLDEN.encode(), *b"purple"]
    first = len(query_text(RHYME))  # BOS and all but the last byte of the first question say nothing
    assert targets[:first] == [-1] * first
    assert targets[first:first + 6] == [*b"spoon", EOS]
    assert targets[first + 6:len(GOLDEN)] == [-1] * (len(GOLDEN) - first - 6)
    assert targets[len(GOLDEN):] == [*b"purple", EOS]
    inputs, wanted = collate([(ids, targets)])
    assert (inputs[0].tolist(), wanted[0].tolist()) == (ids, targets)


def test_golden_sample_of_the_base_model(base_tokenizer):
    """The ids of SmolLM2, which the `tokenizers` package gave for each segment, written out: a change of the
    template or of the tokenizer cannot pass unseen (trap 2, trap 8)."""
    ids, targets = example(base_tokenizer, record("Add.", "10", "3 7"))
    assert ids[:8] == [3757, 20880, 42, 198, 7684, 30, 198, 198]  # "###" " Instruction" ":" "\n" "Add" "."
    assert ids[8:17] == [3757, 18100, 42, 198, 35, 216, 39, 198, 198]  # "###" " Input" ":" "\n" "3" " " "7"
    assert ids[17:21] == [3757, 14212, 42, 198]  # "###" " Response" ":" "\n"
    assert ids[21:] == [33, 32]  # "1" "0"
    assert targets == [-1] * 20 + [33, 32, 2]  # with EOS: what carries loss


def test_eos_is_in_the_loss():
    """Trap 2: the last target of every row is EOS, also where another row is longer (no `ids == pad`)."""
    inputs, targets = collate([example(Bytes(), r) for r in (PLUM, RHYME, GRASS)])
    assert [row[row != -1][-1] for row in targets] == [EOS] * 3
    assert [(row == EOS).sum() for row in targets] == [1] * 3


def test_an_answer_of_the_pad_id_carries_loss():
    """Trap 2: rows are padded with id 0; an answer that is id 0 is loss, the padding is not."""
    inputs, targets = collate([([5, 0, 0], [0, 0, EOS]), ([6, 7, 8, 9, 9], [-1, -1, -1, 9, EOS])])
    assert targets.tolist() == [[0, 0, EOS, -1, -1], [-1, -1, -1, 9, EOS]]
    assert inputs.tolist() == [[5, 0, 0, 0, 0], [6, 7, 8, 9, 9]]
    assert targets.dtype == inputs.dtype == torch.long


def test_segments_are_tokenised_apart(base_tokenizer):
    """Joined as text, the newline that ends the query and the spaces that begin the answer would be cut
    elsewhere; the mask would then begin inside a token."""
    list_record = record("List what to buy.", "  - milk\n  - 12 eggs")
    text, answer, encode = query_text(list_record), list_record["output"], base_tokenizer.encode
    assert encode(text + answer) != encode(text) + encode(answer)
    ids, targets = example(base_tokenizer, list_record, [PLUM])
    block = encode(query_text(PLUM)) + encode("purple") + encode("\n\n")
    assert ids == block + encode(text) + encode(answer)
    assert targets[len(block + encode(text)) - 1:] == [*encode(answer), base_tokenizer.eos]


def test_a_sample_of_three_records_is_three_samples_in_one(base_tokenizer):
    """Each answer's targets are those that it has as the last record, behind the same blocks."""
    for tokenizer in (Bytes(), base_tokenizer):
        ids, targets = example(tokenizer, GRASS, [PLUM, RHYME])
        last = 0
        for n in (1, 2, 3):
            part, wanted = training_example(tokenizer, [PLUM, RHYME, GRASS][:n], 999)
            assert ids[:len(part)] == part
            assert targets[last:len(part)] == wanted[last:]
            last = len(part)


def test_prompts_are_a_prefix_of_their_own(base_tokenizer):
    """The same ids whatever follows, so that their KV cache can be reused."""
    for tokenizer in (Bytes(), base_tokenizer):
        prefix = prompt_ids(tokenizer, [PLUM, RHYME])
        for query in (GRASS, RHYME):
            assert example(tokenizer, query, [PLUM, RHYME])[0][:len(prefix)] == prefix
            rest = tokenizer.encode(query_text(query))
            assert join_ids(tokenizer, [PLUM, RHYME], rest, 999) == (prefix + rest, 2)
    assert prompt_ids(Bytes(), []) == [BOS]


def test_prompts_that_do_not_fit_go_farthest_first():
    """By hand: [RHYME, GRASS], then GRASS alone, then none. The answer and its EOS are 7 more ids."""
    query, answer, prompts = list(query_text(PLUM).encode()), [*b"purple", EOS], [RHYME, GRASS]
    blocks = [list((query_text(p) + p["output"] + "\n\n").encode()) for p in prompts]
    alone, near, full = [BOS, *query], [BOS, *blocks[1], *query], [BOS, *blocks[0], *blocks[1], *query]
    for limit, ids, kept in ((len(full), full, 2), (len(full) - 1, near, 1), (len(near), near, 1),
                             (len(near) - 1, alone, 0), (len(alone), alone, 0)):
        assert join_ids(Bytes(), prompts, query, limit) == (ids, kept), limit
        assert example(Bytes(), PLUM, prompts, limit + 6)[0] == ids + answer[:-1], limit
        assert example(Bytes(), PLUM, prompts, limit + 6)[1][-7:] == answer, limit
    for limit in (len(alone) - 1, -3):
        with pytest.raises(ValueError, match=f"{len(alone)} tokens, .* for {max(0, limit)}; shorten it"):
            join_ids(Bytes(), prompts, query, limit)


def test_query_text():
    assert query_text(RHYME) == "### Instruction:\nGive a rhyme for 'moon'.\n\n### Response:\n"
    assert query_text(record("a", "b", " \n ")) == query_text(record("a", "b"))  # blank input: no section
    assert query_text(PLUM) == GOLDEN[GOLDEN.index("### Instruction:\nName"):]


@pytest.mark.parametrize("text, answer", [
    ("purple", "purple"), ("  purple\n\n", "purple"), ("a\n\nb", "a\n\nb"), ("", ""),
    ("purple\n\n### Instruction:\nNext one", "purple"), ("### Instruction", ""),
    ("# 1 ### Input", "# 1 ### Input"), ("a\n### Instructions\n1. b", "a\n### Instructions\n1. b"),
    ("### Ingredients\neggs", "### Ingredients\neggs"), ("### Instruction: x", "### Instruction: x"),
    ("see ### Instruction:\nx", "see ### Instruction:\nx"), ("a\n\n### Instruction:", "a")])
@pytest.mark.parametrize("end", [[], [EOS], [END], [EOS, *b"more", END], [END, *b"more", EOS]])
def test_clean_answer(text, answer, end):
    """An answer stands before the first of all end ids."""
    assert clean_answer(Bytes(), [*text.encode(), *end]) == answer


@pytest.mark.parametrize("text, over", [
    ("a\n\n### Instruction:\n", True), ("### Instruction:\nx", True), ("a\n### Instruction:", False),
    ("a ### Instruction:\n", False), ("### Instructions:\n", False), ("### Ingredients\n", False)])
def test_an_answer_is_over_at_the_templates_own_block(text, over):
    """Only at the start of a line, and whole: a heading of the answer's own does not end it."""
    assert at_next_block(Bytes(), list(text.encode())) == over


# ---- batches ---------------------------------------------------------------------------------------------

def test_length_sorted_batches():
    rng = random.Random(1)
    lengths = [rng.randint(1, 9) for _ in range(103)]
    plain = length_sorted_batches(lengths, 8)
    assert [i for batch in plain for i in batch] == sorted(range(103), key=lengths.__getitem__)
    assert [len(batch) for batch in plain] == [8] * 12 + [7]

    def shuffled(seed):
        return length_sorted_batches(lengths, 8, torch.Generator().manual_seed(seed))
    assert shuffled(0) == shuffled(0) != shuffled(1)
    for batches in (shuffled(0), shuffled(1)):
        assert sorted(i for batch in batches for i in batch) == list(range(103))
        # near-equal lengths: in order of length the batches follow one another without overlap
        spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches)
        assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))
        assert [lengths[b[0]] for b in batches] != sorted(lengths[b[0]] for b in batches)  # random order
    # other company in each epoch, not only another order of the same batches
    assert {frozenset(b) for b in shuffled(0)} != {frozenset(b) for b in shuffled(1)}
    assert length_sorted_batches([], 8) == []


# ---- reading ---------------------------------------------------------------------------------------------

TWO = [record("Name the colour.", "purple", "a plum"), record("Say it twice.", "hé hé", "hé")]


def encoded(records, array: bool = False, newline: str = "\n") -> bytes:
    if array:
        return json.dumps(records, ensure_ascii=False, indent=1).replace("\n", newline).encode()
    return "".join(json.dumps(r, ensure_ascii=False) + newline for r in records).encode()


@pytest.mark.parametrize("name", ["pool.json", "pool.jsonl"])
@pytest.mark.parametrize("array", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_array_or_lines_under_either_name(tmp_path, name, array, bom, newline):
    (tmp_path / name).write_bytes(bom + encoded(TWO, array, newline))
    assert read_records(tmp_path / name) == read_records(str(tmp_path / name)) == TWO


def test_optional_fields_blank_lines_and_unicode_line_ends(tmp_path):
    """U+2028 and U+0085 end a line for str.splitlines(), but not in JSON: a record is one line."""
    file = tmp_path / "own.jsonl"
    odd = {"instruction": "a\u2028b\u0085c\x0bd", "output": "e\u2029f", "extra": 1}
    null = {"task": None, "instruction": "x", "input": None, "output": "y"}  # null means absent
    file.write_bytes(b'{"instruction": "x", "output": "y"}\n\n  \n' + encoded([null, odd]).rstrip())
    assert read_records(file) == [record("x", "y")] * 2 + [record(odd["instruction"], odd["output"])]


def test_read_fitting(tmp_path, capsys):
    """A record that is longer than the limit by one token is left out, and the user is told."""
    file, question = tmp_path / "sft.jsonl", 1 + len(query_text(PLUM))  # 1: BOS
    short = record("a", "b")
    file.write_bytes(encoded([PLUM, short, PLUM]))
    for answered, longest in ((True, question + 7), (False, question)):
        assert read_fitting(file, Bytes(), longest, answered) == [PLUM, short, PLUM]
        assert capsys.readouterr().out == "sft: 3 records\n"
        assert read_fitting(file, Bytes(), longest - 1, answered) == [short]
        assert capsys.readouterr().out == f"sft: 1 records (2 longer than {longest - 1} tokens, left out)\n"
    for limit in (3, -3):
        with pytest.raises(ValueError, match=f"sft.jsonl: no record fits in {max(0, limit)} tokens"):
            read_fitting(file, Bytes(), limit)


def test_references_that_no_answer_can_reach_are_said(capsys):
    queries = {"rl": [record("x", "12345"), record("x", "1234")], "test": [record("x", "123456")]}
    say_long_answers(queries, Bytes(), 4)
    assert capsys.readouterr().out == ("(2 of 3 references are longer than --max_new_tokens 4: no answer can "
                                       "reach them)\n")
    say_long_answers(queries, Bytes(), 6)
    assert capsys.readouterr().out == ""


def test_records_that_do_not_fit_in_a_sample_are_counted(capsys):
    """As many as training_example leaves out."""
    records = [record("x", "a" * n) for n in (5, 9, 30)]
    lengths = [len(training_example(Bytes(), [r], 999)[0]) for r in records]
    last_two = len(training_example(Bytes(), records[1:], 999)[0])
    samples, between = [[0, 1, 2], [1, 2], [2]], len(BLOCK_END) - 1  # 1: BOS
    for n, limit in ((0, 999), (1, last_two), (3, last_two - 1)):
        left = [training_example(Bytes(), [records[i] for i in sample], limit)[1].count(Bytes.eos)
                for sample in samples]
        assert n == sum(map(len, samples)) - sum(left)
        say_cut_samples(samples, lengths, between, limit)
        said = (f"({n} of 6 places in the samples are left out: a sample has at most {limit} tokens; lower "
                "--shots)\n")
        assert capsys.readouterr().out == (said if n else "")


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a file"):
            read_records(path)


def test_check_record_names_the_place():
    assert check_record({"instruction": "x", "output": "y", "id": 4}, "here:1") == record("x", "y")
    for field in ("instruction", "output"):
        with pytest.raises(ValueError, match=f"^here:1: field '{field}' must be text, but it is null"):
            check_record(record("x", "y") | {field: None}, "here:1")
    with pytest.raises(ValueError, match="^here:1: "):
        check_record([], "here:1")
