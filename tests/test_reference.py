"""The real base model against transformers on real records: logits, greedy tokens, perplexity; int8's cost.

    pytest tests/test_reference.py -s        # prints what was measured

Records are read from the prepared data at run time. Windows of text are short (256 tokens); 1,500 are in
test_model.py. Two cores need some minutes, so all tests here are slow ones.
"""
import json
import os
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import pad_rows

import lora
import model as llama
import train_sft
from data import download, prepare
from data.instructions import join_ids, query_text, training_example
from data.records import read_records
from data.samples import collate
from model import generate

pytestmark = pytest.mark.slow
TOKENS, WINDOW = 20_000, 256
LOGITS_DIFFER = 5e-4  # 30 layers add up their rounding


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    """conftest.py sets one thread, for tiny models; this one is large enough for all."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def splits():
    """{split: records} of the default data set, each shuffled: its files are ordered by task."""
    folder = prepare.ensure_data("bigbench")
    return {name: random.Random(0).sample(records, len(records)) for name in ("pool", "sft", "val", "test")
            for records in [read_records(folder / f"{name}.jsonl")]}


@torch.inference_mode()
def test_64_greedy_tokens_of_real_records(base_model, base_reference, base_tokenizer, splits):
    """20 records of 20 tasks, as train_rl.py asks them, every other one with a prompt in front. Both sides
    answer them as one batch, padded at the left, on past any eos; and ours reads each answer again alone."""
    by_task = {record["task"]: record for record in splits["test"]}
    queries = list(by_task.values())[:20]
    asked = [join_ids(base_tokenizer, splits["pool"][i:i + i % 2], base_tokenizer.encode(query_text(query)),
                      512)[0] for i, query in enumerate(queries)]
    assert len(asked) == 20 and len(set(map(len, asked))) > 10

    ids, real = pad_rows(asked)
    how = base_reference.generation_config
    eos, how.eos_token_id = how.eos_token_id, None  # an argument of None would mean: as in the config
    try:
        out = base_reference.generate(ids, attention_mask=real.long(), do_sample=False, max_new_tokens=64,
                                      pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    finally:
        how.eos_token_id = eos
    theirs, logits = out.sequences[:, ids.size(1):].tolist(), torch.stack(out.logits, dim=1)  # (20, 64, V)
    assert {len(answer) for answer in theirs} == {64} and len({tuple(answer) for answer in theirs}) > 15
    assert generate(base_model, asked, 64, ends=()) == theirs

    largest = 0.0
    for query, answer, reference in zip(asked, theirs, logits, strict=True):
        ours = base_model.logits(base_model(torch.tensor([query + answer]))[0, len(query) - 1:-1])
        assert ours.argmax(-1).tolist() == answer
        largest = max(largest, (ours - reference).abs().max().item())
    top = logits.topk(2).values
    print(f"\n20 records x 64 greedy tokens equal; largest difference of a logit {largest:.1e}, "
          f"nearest tie {(top[..., 0] - top[..., 1]).min():.1e}")
    assert largest < LOGITS_DIFFER


# ---- logits and perplexity of real text ------------------------------------------------------------------

@pytest.fixture(scope="module")
def text(base_tokenizer, splits):
    """(rows, WINDOW) ids, over 20,000 tokens: questions and answers of many records one after the other."""
    records = random.Random(1).sample(splits["test"] + splits["val"], len(splits["test"] + splits["val"]))
    joined = "\n\n".join(f"{r['instruction']}\n{r['input']}\n{r['output']}" for r in records)
    rows = TOKENS // WINDOW + 2
    return torch.tensor(base_tokenizer.encode(joined)[:rows * WINDOW]).view(rows, WINDOW)


def losses(logits, ids):
    """Negative log-likelihood of each token but the first of a row."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").double()


@pytest.fixture(scope="module")
@torch.inference_mode()
def ours(base_model, text):
    """(losses, float64, one a token; logits of every tenth window); both sides read a window at a time."""
    parts, kept = [], []
    for row, ids in enumerate(text.split(1)):
        logits = base_model.logits(base_model(ids))
        parts.append(losses(logits, ids))
        kept += [logits] if row % 10 == 0 else []
    return torch.cat(parts), kept


@torch.inference_mode()
def test_perplexity_equals_transformers(base_reference, text, ours):
    """Equal to four digits; and since a mean may hide much, each token's loss, and logits for every tenth
    window: text of more than 20 records."""
    our_losses, our_logits = ours
    parts, largest, size = [], 0.0, 0.0
    for row, ids in enumerate(text.split(1)):
        logits = base_reference(ids).logits
        parts.append(losses(logits, ids))
        if row % 10 == 0:
            assert torch.equal(our_logits[row // 10].argmax(-1), logits.argmax(-1))
            largest = max(largest, (our_logits[row // 10] - logits).abs().max().item())
            size = max(size, logits.abs().max().item())
    theirs = torch.cat(parts)
    a, b, worst = our_losses.mean().exp(), theirs.mean().exp(), (our_losses - theirs).abs().max().item()
    print(f"\nlargest difference of a logit {largest:.1e} (they reach {size:.0f}), of a token's loss "
          f"{worst:.1e}; perplexity of {len(theirs)} tokens: ours {a:.6f}, transformers {b:.6f}")
    assert len(theirs) >= TOKENS and 2 < b < 50
    assert abs(a / b - 1) < 1e-5
    assert max(largest, worst) < LOGITS_DIFFER


@torch.inference_mode()
def test_int8_changes_perplexity_little(base, text, ours):
    """The frozen base of the default run is int8: what that costs, measured on the same text."""
    int8 = lora.quantize(llama.load(base))
    after = torch.cat([losses(int8.logits(int8(ids)), ids) for ids in text.split(1)])
    before = ours[0][:len(after)]
    change = after - before  # the same tokens on both sides: its error is much smaller than a loss's own
    percent, error = 100 * change.mean().expm1(), 100 * change.std() / len(change) ** 0.5
    print(f"\nperplexity of {len(change)} tokens: fp32 {before.mean().exp():.4f}, int8 {percent:+.3f}% "
          f"(standard error {error:.3f}%)")
    assert abs(percent) < 0.1
    assert change.abs().max() > 1e-3  # it was int8


# ---- LoRA on int8 ----------------------------------------------------------------------------------------

def test_lora_on_int8_learns_as_on_the_float_base(base, base_tokenizer, base_model, splits, tmp_path,
                                                  monkeypatch):
    """12 steps of train_sft.py on 96 short records, the base int8 or not: int8's validation loss is at most
    0.5% above the other's. The mean of two seeds, since chance alone makes 0.2 to 0.6% here.

    Not int8 means bfloat16 where the machine multiplies that, else float32, on which the bound is as fair."""
    monkeypatch.setattr(download, "DATA", tmp_path)
    (tmp_path / "bigbench").mkdir()
    for name in ("pool", "rl", "test"):  # a data folder must have all splits; these are not read
        (tmp_path / "bigbench" / f"{name}.jsonl").touch()
    for name, size in (("sft", 96), ("val", 48)):
        short = [r for r in splits[name] if len(r["instruction"] + r["input"] + r["output"]) < 150][:size]
        (tmp_path / "bigbench" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in short))
        assert len(short) == size
    ids, targets = collate([training_example(base_tokenizer, [r], 512) for r in short])
    with torch.inference_mode():
        before = train_sft.answer_loss(base_model, ids, targets).item() / (targets >= 0).sum().item()

    after = {"int8": [], "float": []}
    for seed in (1337, 1338):
        for name in after:
            out = tmp_path / f"{name} {seed}"
            train_sft.main(train_sft.Settings(base=str(base), out_dir=str(out), no_int8=name == "float",
                                              shots=0, batch_size=8, epochs=1, seed=seed, device="cpu"))
            last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
            assert last["step"] == 12
            after[name].append(last["val_loss"])
    print(after)
    after = {name: sum(losses) / 2 for name, losses in after.items()}
    print(f"\nvalidation loss {before:.3f} before; after 12 steps {after}: int8 "
          f"{100 * (after['int8'] / after['float'] - 1):+.2f}%")
    assert after["float"] < 0.8 * before  # it did learn
    assert 0.99 * after["float"] < after["int8"] < 1.005 * after["float"]
