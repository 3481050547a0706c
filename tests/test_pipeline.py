"""The three scripts one after the other on the real model and data, as a user runs them; and their --help.

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
from data import prepare

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("script", [train_sft, train_rl, sample], ids=lambda script: script.__name__)
def test_help_lists_every_setting(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        prepare.cli(script.Settings, script.main)
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    listed = set(re.findall(r"--(\w+)", text[text.index("options:"):]))
    fields = dataclasses.fields(script.Settings)
    assert {field.name for field in fields} <= listed
    assert all(field.metadata["help"] in text for field in fields)


def test_the_same_setting_has_the_same_default_and_help_everywhere():
    """--base, --device and --dtype mean one thing; --m of training is what --shots prepares for."""
    by_name = [{f.name: (f.default, f.metadata["help"]) for f in dataclasses.fields(script.Settings)}
               for script in (train_sft, train_rl, sample)]
    for name in ("base", "device", "dtype"):
        assert by_name[0][name] == by_name[1][name] == by_name[2][name]
    assert by_name[0]["data"] == by_name[1]["data"] and by_name[1]["adapter"] == by_name[2]["adapter"]
    assert by_name[0]["shots"][0] == by_name[1]["m"][0]
    assert by_name[1]["adapter"][0] == by_name[0]["out_dir"][0]  # each finds what the one before it wrote
    assert by_name[2]["matcher"][0] == by_name[1]["out_dir"][0]


def script(*arguments) -> str:
    ended = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                           timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr and "Warning" not in ended.stderr, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_the_whole_way_on_the_real_model(tmp_path):
    """Two steps of each. What is there at the end, not how good it is: the README's table says that."""
    sft, rl = tmp_path / "sft", tmp_path / "rl"
    text = script("train_sft.py", "--max_steps", 2, "--batch_size", 4, "--eval_every", 2, "--out_dir", sft)
    assert ">>>" in text and "<EOS><<<" in text and "next: python train_rl.py" in text
    assert {f.name for f in sft.iterdir()} == {"adapter_config.json", "adapter_model.safetensors",
                                               "nanopillow.json", "log.jsonl", "log.png", "run.json",
                                               "state.safetensors"}
    lines = [json.loads(line) for line in (sft / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and 0.1 < lines[1]["val_loss"] < 6

    few = ("--steps", 2, "--queries", 4, "--val_queries", 8, "--test_queries", 8, "--fixed_tries", 2,
           "--random_seeds", 1, "--max_new_tokens", 8, "--adapter", sft, "--out_dir", rl)
    text = script("train_rl.py", *few)
    assert "validation reward" in text and "next: python sample.py" in text
    assert len((rl / "rewards.jsonl").read_bytes().splitlines()) > 30
    script("train_rl.py", *few, "--eval_only")
    assert len((rl / "rewards.jsonl").read_bytes().splitlines()) > 40
    files = {"matcher.safetensors", "matcher.json", "rewards.jsonl", "log.jsonl", "log.png",
             "table.json", "run.json"}
    assert {f.name for f in rl.iterdir()} == files
    rows = json.loads((rl / "table.json").read_text())["rows"]
    assert {"no prompt", "random", "best fixed", "same words (BM25)", "nearest (kNN)",
            "learned"} <= rows.keys()
    # eight queries say little; but the nearest prompts are often of the right task, and no prompt never is
    assert rows["nearest (kNN)"]["right_task"] > 0 == rows["no prompt"]["right_task"]

    text = script("sample.py", "--prompt", "Write the date in our style.", "--input", "March 9, 2021",
                  "--pool", ROOT / "data" / "example_pool.jsonl", "--adapter", sft, "--matcher", rl,
                  "--max_new_tokens", 16)
    [(percent, line)] = re.findall(r"^matched \((\d+)%\): (.*)$", text, re.MULTILINE)
    assert 0 < int(percent) <= 100 and line.startswith("Write the date in our style.")
    assert text.split(line)[1].strip()  # it answered something
