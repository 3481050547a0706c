"""The three scripts one after the other on the real model and data, as a user runs them; and their settings.

pytest tests/test_pipeline.py
"""
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sample
import train_rl
import train_sft

ROOT = Path(__file__).resolve().parent.parent


def test_the_same_setting_has_the_same_default_and_help_everywhere():
    """--base, --device and --dtype mean one thing; --shots of tuning prepares for --m of matching."""
    sft, rl, show = ({f.name: (f.default, f.metadata["help"]) for f in dataclasses.fields(script.Settings)}
                     for script in (train_sft, train_rl, sample))
    assert sft["base"] == rl["base"] == show["base"] and sft["device"] == rl["device"] == show["device"]
    assert sft["dtype"] == rl["dtype"] and sft["data"] == rl["data"] and rl["adapter"] == show["adapter"]
    assert sft["shots"][0] >= rl["m"][0] == 1  # two shots in training help one prompt too
    assert rl["adapter"][0] == sft["out_dir"][0]  # each finds what the one before it wrote
    assert show["matcher"][0] == rl["out_dir"][0]


def script(*arguments) -> str:
    ended = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                           timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr and "Warning" not in ended.stderr, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_the_whole_way_on_the_real_model(tmp_path):
    """Two steps of each. The test asks what is there at the end, not how good it is: README.md says that."""
    sft, rl = tmp_path / "sft", tmp_path / "rl"
    text = script("train_sft.py", "--max_steps", 2, "--batch_size", 4, "--out_dir", sft)
    assert ">>>" in text and "<EOS><<<" in text and "next: python train_rl.py" in text
    assert {f.name for f in sft.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "nanopillow.json", "log.jsonl", "run.json",
        "state.safetensors"}
    lines = [json.loads(line) for line in (sft / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and 0.1 < lines[1]["val_loss"] < 6

    text = script("train_rl.py", "--steps", 2, "--queries", 4, "--test_queries", 8, "--max_new_tokens", 8,
                  "--adapter", sft, "--out_dir", rl)
    assert "validation reward" in text and "next: python sample.py" in text
    assert sum(len(json.loads(line)) for line in (rl / "rewards.jsonl").read_text().splitlines()) > 160 + 30
    assert {f.name for f in rl.iterdir()} == {"matcher.safetensors", "matcher.json", "rewards.jsonl",
                                              "log.jsonl", "table.json", "run.json", "pool.json"}
    assert json.loads((rl / "table.json").read_text())["rows"].keys() == {"no prompt", "nearest", "learned"}

    text = script("sample.py", "--prompt", "Write the date in our style.", "--input", "March 9, 2021",
                  "--pool", ROOT / "data" / "example_pool.jsonl", "--adapter", sft, "--matcher", rl,
                  "--max_new_tokens", 16)
    [(percent, line)] = re.findall(r"^matched with probability (\d+)%: (.*)$", text, re.MULTILINE)
    assert 0 < int(percent) <= 100 and line.startswith("Write the date in our style.")
    assert text.split(line)[1].strip()  # it answered something
