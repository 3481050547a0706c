"""bench.py on random weights: it runs without a download, and ours and the peers do the same work.

    pytest tests/test_bench.py
"""
import json
import subprocess
import sys

import bench
import pytest
import tiny

import lora
import model as llama
from data.instructions import prompt_ids
from data.records import read_records
from data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return bench.random_base(tmp_path_factory.mktemp("bench") / "base", "tiny", seed=1)


def test_random_base(base):
    """Every id is a text of its own, or answers that differ would look the same."""
    model, tokenizer = llama.load(base), Tokenizer(base)
    texts = [tokenizer.decode([i]) for i in range(1, model.config.vocab_size)]
    assert len(set(tokenizer.bytes.values())) == len(texts) + 1 and sum(map(bool, texts)) == len(texts)
    assert {split: len(read_records(base / f"{split}.jsonl")) for split in ("pool", "sft", "rl", "val")} == {
        "pool": 870, "sft": 870, "rl": 870, "val": 870}
    lengths = [len(prompt_ids(tokenizer, [r])) for r in read_records(base / "pool.jsonl")]
    assert 40 < sum(lengths) / len(lengths) < 80  # the default data: 60


def test_counted_weights(base):
    """The formula counts the weights that there are, and knows which of them become int8."""
    model = llama.load(base)
    rounded, floats = bench.rounded_and_float(model.config)
    assert rounded + floats == sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    lora.quantize(model)
    assert rounded == sum(q.numel() for name, q in model.named_buffers() if name.endswith(".q"))


@pytest.mark.slow
def test_the_script_on_random_weights():
    pytest.importorskip("peft")
    run = subprocess.run(
        [sys.executable, bench.__file__, "--random", "tiny", "--only", "sft,decode,rollouts",
         "--repeats", "1", "--device", "cpu", "--dtype", "float32"],
        capture_output=True, text=True, cwd=tiny.ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("of the answers are the same as transformers'") == 2
    rows = json.loads(run.stdout.splitlines()[-1])["rows"]
    goals = [row["goal"] for row in rows]
    assert goals == [">= 1.4", ">= 1.4", ">= 0.40", ">= 1.5", ">= 4", ">= 1.3", "", ">= 8", ">= 2.5"]
    assert all(row["ours"] > 0 for row in rows)
    assert [bool(row["theirs"]) for row in rows] == [bool(goal) for goal in goals]  # each goal has its peer
