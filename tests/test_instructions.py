"""data/instructions.py: records and what is refused, the template, the loss mask, batches.

    pytest tests/test_instructions.py
"""
import json
import random

import pytest
import torch

from data.instructions import (
    check_record,
    clean_answer,
    collate,
    exemplar_ids,
    length_sorted_batches,
    query_text,
    read_records,
    training_example,
)

EOS, BOS = 256, 257


class Bytes:
    """A tokenizer whose ids are the bytes of the text: every id below can be read by eye."""
    eos, bos = EOS, [BOS]

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def record(instruction, output, input=""):
    return {"task": "", "instruction": instruction, "input": input, "output": output}


PLUM = record("Name the colour.", "purple", "a plum")
GRASS = record("Name the colour.", "green", "fresh grass")
RHYME = record("Give a rhyme for 'moon'.", "spoon")

# ---- template, ids and mask ------------------------------------------------------------------------

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
    """Trap 2: the mask by hand. Only "purple" and the EOS after it carry loss, not the exemplar's answer."""
    ids, n = training_example(Bytes(), PLUM, [RHYME], 10_000)
    assert ids == [BOS] + list(GOLDEN.encode()) + list(b"purple") + [EOS]
    assert n == 7 and ids[-n:] == list(b"purple") + [EOS]

    inputs, targets = collate([(ids, n)])
    # columns: BOS and all but the last byte of the prompt; then those that say p u r p l e EOS; then EOS
    mask = [0] * len(GOLDEN) + [1] * 7 + [0]
    assert (targets[0] != -1).int().tolist() == mask
    assert targets[0, len(GOLDEN):].tolist() == list(b"purple") + [EOS, -1]
    assert inputs[0].tolist() == ids


def test_golden_sample_of_the_base_model(base_tokenizer):
    """The ids of SmolLM2, which the `tokenizers` package gave for each segment, written out: a change of the
    template or of the tokenizer cannot pass unseen (trap 2, trap 8)."""
    ids, n = training_example(base_tokenizer, record("Add.", "10", "3 7"), [], 100)
    assert ids[:8] == [3757, 20880, 42, 198, 7684, 30, 198, 198]  # "###" " Instruction" ":" "\n" "Add" "."
    assert ids[8:17] == [3757, 18100, 42, 198, 35, 216, 39, 198, 198]  # "###" " Input" ":" "\n" "3" " " "7"
    assert ids[17:21] == [3757, 14212, 42, 198]  # "###" " Response" ":" "\n"
    assert (ids[21:], n) == ([33, 32, 2], 3)  # "1" "0" EOS: what carries loss


def test_eos_is_in_the_loss():
    """Trap 2: the last target of every row is EOS, also where another row is longer (no `ids == pad`)."""
    inputs, targets = collate([training_example(Bytes(), r, [], 999) for r in (PLUM, RHYME, GRASS)])
    for row in targets:
        assert row[row != -1][-1] == EOS
    assert (targets[:, -1] == -1).all()  # nothing follows the last id


def test_an_answer_of_the_pad_id_carries_loss():
    """Trap 2: rows are padded with id 0; an answer that is id 0 is loss, the padding is not."""
    inputs, targets = collate([([5, 0, 0, EOS], 3), ([6, 7, 8, 9, 9, EOS], 2)])
    assert targets.tolist() == [[0, 0, EOS, -1, -1, -1], [-1, -1, -1, 9, EOS, -1]]
    assert inputs.tolist() == [[5, 0, 0, EOS, 0, 0], [6, 7, 8, 9, 9, EOS]]


def test_segments_are_tokenised_apart(base_tokenizer):
    """Joined as text, the newline that ends the query and the spaces that begin the answer would be cut
    elsewhere; the mask would then begin inside a token."""
    list_record = record("List what to buy.", "  - milk\n  - 12 eggs")
    text, answer = query_text(list_record), list_record["output"]
    encode = base_tokenizer.encode
    assert encode(text + answer) != encode(text) + encode(answer)
    ids, n = training_example(base_tokenizer, list_record, [PLUM], 999)
    block = encode(query_text(PLUM)) + encode("purple\n\n")
    assert ids == block + encode(text) + encode(answer) + [base_tokenizer.eos]
    assert n == len(encode(answer)) + 1 and base_tokenizer.decode(ids[-n:]) == answer


def test_exemplars_are_a_prefix_of_their_own(base_tokenizer):
    """The same ids whatever follows, so that their KV cache can be reused."""
    for tokenizer in (Bytes(), base_tokenizer):
        prefix = exemplar_ids(tokenizer, [PLUM, RHYME])
        for query in (GRASS, RHYME):
            ids, _ = training_example(tokenizer, query, [PLUM, RHYME], 999)
            assert ids[:len(prefix)] == prefix
    assert exemplar_ids(Bytes(), []) == [BOS]


def test_exemplars_that_do_not_fit_go_farthest_first():
    full, n = training_example(Bytes(), PLUM, [RHYME, GRASS], 999)
    near, _ = training_example(Bytes(), PLUM, [GRASS], 999)
    alone, _ = training_example(Bytes(), PLUM, [], 999)
    assert len(alone) < len(near) < len(full)
    for limit, expected in ((len(full), full), (len(full) - 1, near), (len(near), near),
                            (len(near) - 1, alone), (len(alone), alone)):
        assert training_example(Bytes(), PLUM, [RHYME, GRASS], limit) == (expected, n), limit
    # Trap 2: an answer that does not fit is no sample; cut, it would teach never to stop
    assert training_example(Bytes(), PLUM, [RHYME, GRASS], len(alone) - 1) is None


def test_query_text():
    assert query_text(RHYME) == "### Instruction:\nGive a rhyme for 'moon'.\n\n### Response:\n"
    assert query_text(record("a", "b", " \n ")) == query_text(record("a", "b"))  # blank input: no section
    assert query_text(PLUM) == GOLDEN[GOLDEN.index("### Instruction:\nName"):]


@pytest.mark.parametrize("text, answer", [
    ("purple", "purple"), ("  purple\n\n", "purple"), ("a\n\nb", "a\n\nb"), ("", ""),
    ("purple\n\n### Instruction:\nNext one", "purple"), ("### Instruction", ""),
    ("# 1 ### Input", "# 1 ### Input")])
def test_clean_answer(text, answer):
    ids = list(text.encode())
    assert clean_answer(Bytes(), ids) == answer
    assert clean_answer(Bytes(), ids + [EOS]) == answer
    assert clean_answer(Bytes(), ids + [EOS] + list(b"more") + [EOS]) == answer


# ---- batches -----------------------------------------------------------------------------------------

def test_collate_against_a_naive_loop():
    """The shift by one: where the target of column t is not -1, it is the id of column t + 1."""
    rng = random.Random(0)
    examples = []
    for _ in range(40):
        ids = [rng.randrange(300) for _ in range(rng.randint(2, 30))]
        examples.append((ids, rng.randint(1, len(ids) - 1)))
    inputs, targets = collate(examples)
    assert inputs.shape == targets.shape == (40, max(len(ids) for ids, _ in examples))
    assert inputs.dtype == targets.dtype == torch.long
    for row, (ids, n) in enumerate(examples):
        for t in range(inputs.size(1)):
            assert inputs[row, t] == (ids[t] if t < len(ids) else 0)
            has_loss = len(ids) - n <= t + 1 < len(ids)
            assert targets[row, t] == (ids[t + 1] if has_loss else -1)


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


# ---- reading ------------------------------------------------------------------------------------------

TWO = [record("Name the colour.", "purple", "a plum"), record("Say it twice.", "hé hé", "hé")]


def encoded(records, array: bool, newline: str = "\n") -> bytes:
    if array:
        return json.dumps(records, ensure_ascii=False, indent=1).replace("\n", newline).encode()
    return "".join(json.dumps(r, ensure_ascii=False) + newline for r in records).encode()


@pytest.mark.parametrize("name", ["pool.json", "pool.jsonl"])
@pytest.mark.parametrize("array", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_array_or_lines_under_either_name(tmp_path, name, array, bom, newline):
    (tmp_path / name).write_bytes(bom + encoded(TWO, array, newline))
    assert read_records(tmp_path / name) == TWO
    assert read_records(str(tmp_path / name)) == TWO


def test_optional_fields_blank_lines_and_unicode_line_ends(tmp_path):
    """U+2028 and U+0085 end a line for str.splitlines(), but not in JSON: a record is one line."""
    file = tmp_path / "own.jsonl"
    odd = {"instruction": "a\u2028b\u0085c\x0bd", "output": "e\u2029f", "extra": 1}
    file.write_text(json.dumps({"instruction": "x", "output": "y"}) + "\n\n  \n"
                    + json.dumps(odd, ensure_ascii=False), encoding="utf-8", newline="")
    assert read_records(file) == [record("x", "y"), record(odd["instruction"], odd["output"])]


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a file"):
            read_records(path)


def test_check_record_names_the_place():
    assert check_record({"instruction": "x", "output": "y", "id": 4}, "here:1") == record("x", "y")
    with pytest.raises(ValueError, match="^here:1: "):
        check_record([], "here:1")
