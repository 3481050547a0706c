"""Plumbing: what a run keeps on disk, and what the next run reads there. The method is elsewhere.

run.json says from what a run was made. The log and the state let a killed fine-tuning go on, and rewards are
kept as they come. `command` writes the next command, `ignored` names flags that do nothing.
"""
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from data import cli, download
from data.device import processes
from data.files import atomic_write, read_json, read_metadata, read_tensors, save_tensors
from data.records import Record, question, read_records

# ---- where a run comes from, and what comes next ---------------------------------------------------------

def say_replaced(settings, *names: str) -> None:
    """Says it when --out_dir holds a run with another value of these flags, or one that --resume could go on
    with: this run will write over it."""
    file = Path(settings.out_dir, "run.json")
    resumable = hasattr(settings, "resume") and Path(settings.out_dir, "state.safetensors").exists()
    before = read_json(file, settings=dict)["settings"] if file.exists() else {}
    other = [f"--{name} {before[name]}" for name in names
             if before.get(name) not in (None, getattr(settings, name, None))]
    if other or resumable:
        print(f"({settings.out_dir} holds a run{' with ' * bool(other)}{', '.join(other)}, which this run "
              f"replaces; Ctrl-C now keeps it, {'--resume goes on with it, ' * (not other)}another --out_dir "
              "keeps both)", flush=True)


def run_record(settings, data: Path, base_id: str) -> dict:
    """What goes into run.json: with the same settings, versions and files the same machine makes the same
    bits. Nothing in it depends on the time."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                         cwd=Path(__file__).parent, capture_output=True, text=True
                         ) if shutil.which("git") else None
    return {"settings": asdict(settings), "base_id": base_id,
            "commit": git.stdout.strip() if git else "",
            "versions": {"python": sys.version.split()[0]} | {
                name: version(name) for name in ("torch", "safetensors", "tiktoken", "numpy")},
            "data": {file.name: sha256(file.read_bytes()).hexdigest()
                     for file in sorted(data.glob("*.jsonl"))}}


def seen_by(run: Path, part: str, data: Path, queries: dict[str, list[Record]]) -> set[str]:
    """The tasks of the records, `part` of its data, on which the run in this folder was trained; none if the
    folder is not of a run of ours.

    Says if that was another data set than `data`, and how many of `queries` were among those records.
    """
    if not (run / "run.json").exists():
        return set()
    digest = read_json(run / "run.json", data=dict)["data"].get(f"{part}.jsonl")
    files = [file for file in (data / f"{part}.jsonl", *download.DATA.glob(f"*/{part}.jsonl"))
             if file.is_file() and sha256(file.read_bytes()).hexdigest() == digest]
    if not files:
        print(f"({run} was trained on other data, which is gone: it may have seen these queries)")
        return set()
    if files[0].parent != data:
        print(f"({run} was trained on {files[0].parent}, not on {data})")
    records = read_records(files[0])
    known = set(map(question, records))
    for split, asked in queries.items():
        if n := sum(question(query) in known for query in asked):
            print(f"({n} of {len(asked)} {split} queries were in the training part of {run}: its answers to "
                  "them prove nothing)")
    return {record["task"] for record in records} - {""}


def command(script: str, s, shared: str, **given: str) -> str:
    """`script` as a command line, with the flags of this run that it knows too and the `given` ones."""
    out_dir = {"train_sft.py": "out/sft"}.get(script, "out/rl")
    usual = {field.name: str(field.default) for field in fields(s)} | {
        "adapter": "out/sft", "matcher": "out/rl", "out_dir": out_dir}  # a default need not be given
    flags = {name: str(getattr(s, name)) for name in shared.split()} | given
    words = [f"--{name} {shlex.quote(value)}" for name, value in flags.items()
             if value.removeprefix(f"{cli.ROOT}/") != usual.get(name)]
    return " ".join([f"python {'' if cli.ROOT.samefile('.') else f'{cli.ROOT}/'}{script}", *words])


def ignored(s, when: str, *names: str) -> None:
    """Says in one line which of these flags were given although they change nothing."""
    given = [f"--{field.name}" for field in fields(s) if field.name in names
             and str(getattr(s, field.name)).removeprefix(f"{cli.ROOT}/") != str(field.default)]
    if given:
        print(f"({', '.join(given)}: without effect {when})")


# ---- the log, and the state of a fine-tuning -------------------------------------------------------------

def open_log(file: Path, lines: int = 0) -> TextIO:
    """log.jsonl, open for a line each step. Only its first `lines` stay: the later steps are made again.
    Of torchrun's processes the first one writes."""
    if processes()[0]:
        return open(os.devnull, "w", encoding="utf-8")
    text = file.read_text(encoding="utf-8", errors="replace") if lines else ""
    with atomic_write(file) as new:
        new.write_text("".join(f"{line}\n" for line in text.splitlines()[:lines]), encoding="utf-8")
    return open(file, "a", encoding="utf-8")


@contextmanager
def whole_steps() -> Iterator[list]:
    """Ctrl-C (with torchrun: SIGTERM) lets the step finish: half an update can neither be saved nor repeated.
    Yields a list that is not empty any more once it was pressed."""
    pressed = []
    handlers = {sig: signal.signal(sig, lambda *_: pressed.append(True))
                for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pressed
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)


def save_state(folder: Path, optimizer: torch.optim.Optimizer, names: dict[Tensor, str],
               progress: list[float], signature: dict) -> None:
    """Weights, AdamW's moments and progress in one file, so a killed run never mixes two steps."""
    tensors = {"progress": torch.tensor(progress, dtype=torch.float64)}
    for p, moments in optimizer.state.items():
        tensors |= {f"{key}.{names[p]}": value for key, value in ({"weight": p} | moments).items()}
    save_tensors(tensors, folder / "state.safetensors",
                 {key: json.dumps(value) for key, value in signature.items()})


def load_state(folder: Path, optimizer: torch.optim.Optimizer, names: dict[Tensor, str],
               signature: dict) -> tuple[int, int, float]:
    """Restores what save_state wrote and returns the progress: steps, tokens, seconds. signature: what both
    runs must have in common, so that the resumed one ends in the same bits on the same machine."""
    file = folder / "state.safetensors"
    if not file.exists():
        if not (folder / "log.jsonl").exists():
            raise FileNotFoundError(f"{folder}: there is no run to resume; run it without --resume.")
        print(f"(the run in {folder} had not saved anything yet: it starts again)")
        return 0, 0, 0.0
    made = read_metadata(file)
    other = {key: made.get(key, "") for key, value in signature.items() if made.get(key) != json.dumps(value)}
    if other:  # a hash tells the user nothing: its name is enough
        had = [f"{key} {value}" if 0 < len(value) < 30 else key for key, value in other.items()]
        raise ValueError(f"{file}: the run to resume had other settings ({', '.join(had)}); use those, "
                         "or another --out_dir.")
    params, wanted = optimizer.param_groups[0]["params"], {"progress": torch.zeros(3)}
    for p in params:
        wanted |= {f"{key}.{names[p]}": p for key in ("weight", "exp_avg", "exp_avg_sq")}
        wanted[f"step.{names[p]}"] = torch.zeros(())
    tensors = dict(read_tensors([file], wanted, "train without --resume"))
    for p in params:
        p.data.copy_(tensors[f"weight.{names[p]}"])
        optimizer.state[p] = {key: tensors[f"{key}.{names[p]}"].to("cpu" if key == "step" else p.device)
                              for key in ("step", "exp_avg", "exp_avg_sq")}
    steps, tokens, seconds = tensors["progress"].tolist()
    return int(steps), int(tokens), seconds


# ---- rewards ---------------------------------------------------------------------------------------------

def read_rewards(file: Path) -> dict[str, dict]:
    """{key: entry} of earlier runs. A line of the file is a computed batch; a torn line loses its batch."""
    known = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            batch, scores = json.loads(line), ("rouge", "semantic", "exact", "prompt_tokens")
            if all(math.isfinite(sum(entry[k] for k in scores)) for entry in batch):
                known |= {entry["key"]: entry for entry in batch}
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            pass
    return known


class RewardFile:
    """Scored answers, {key: entry} in `known`: those of earlier runs, and what `add` writes down."""

    def __init__(self, file: Path):
        self.known = read_rewards(file)
        torn = file.exists() and not file.read_bytes().endswith(b"\n")
        self.file = open(os.devnull if processes()[0] else file, "a", encoding="utf-8")
        self.file.write("\n" if torn else "")  # or the next batch would be lost with the torn line

    def add(self, batch: list[dict]) -> None:
        """Writes the batch as one line, at once; an empty one writes nothing."""
        self.file.write(json.dumps(batch) + "\n" if batch else "")
        self.file.flush()
        self.known |= {entry["key"]: entry for entry in batch}
