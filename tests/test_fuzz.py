"""10,000 broken files: each is read, or refused with a ValueError or an OSError of one sentence; never a
crash, a hang, an allocation without bounds, an unpickled object or a line of somebody else's code.

Each kind runs in a forked process with a limit of its memory and a hook that ends it where anything like that
begins. Same seed, same files: a failure names its number.

    pytest tests/test_fuzz.py
"""
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch

import lora
import model as llama
from data import base_model, download
from data.instructions import TEMPLATE
from data.records import read_records
from data.tokenizer import Tokenizer

SECONDS, MEMORY = 5, 1 << 30  # for one file, on top of what the process has
NASTY = [None, True, False, 0, 1, -1, 2, 7, 1.5, 1e308, float("nan"), float("inf"), 1 << 31, 1 << 63, 1 << 70,
         "", "x", "-1", "x" * 2000, "../../etc/passwd", "/etc/passwd", "\u0000", "\ud800", "\u4e00 \u4e01",
         "(a|aa)+$", "(", [], {}, [[]], [0], [1 << 60, 1 << 60], [-1, -1], {"a": {}}, ["a", 1, None], "F64",
         "__import__('os')"]
INSERTED = [b"\0", b"\xff" * 9, b"[" * 2000, b'{"a":' * 2000, b"9" * 6000, b'"', b"\\ud800"]
FORBIDDEN = ("pickle.", "subprocess.", "socket.", "os.system", "os.exec", "os.fork", "os.posix_spawn",
             "urllib.", "ctypes.dlopen", "compile", "exec", "marshal.")


def bytes_mutated(raw: bytes, rng: random.Random) -> bytes:
    """One to four places: bytes changed, cut out, doubled, put in, or the end cut off."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        i, n = rng.randrange(len(raw) + 1), rng.choice((1, 1, 1, 2, 8, 100))
        match rng.randrange(6):
            case 0:
                raw[i:i + n] = rng.randbytes(n)
            case 1:
                del raw[i:i + n]
            case 2:
                raw[i:i] = raw[i:i + n]
            case 3:
                raw[i:i] = rng.choice(INSERTED)
            case 4:
                raw[i:i + 1] = bytes([(raw[i] if i < len(raw) else 0) ^ 1 << rng.randrange(8)])
            case 5:
                del raw[i:]
    return bytes(raw)


def json_mutated(content, rng: random.Random):
    """One or two places of a JSON value: a nasty value there, the place gone, or there twice."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 2)):
        node, places = content, []
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            places.append((node, key))
            node = node[key]
        if not places:
            return rng.choice(NASTY)
        node, key = rng.choice(places)
        match rng.randrange(4):
            case 0 | 1:
                node[key] = copy.deepcopy(rng.choice(NASTY))
            case 2:
                del node[key]
            case 3 if isinstance(node, dict):
                node[rng.choice((key + "x", "", "vocab", "model.norm.weight"))] = node[key]
            case 3:
                node.append(node[key])
    return content


def either(raw: bytes, rng: random.Random) -> bytes:
    """A JSON file mutated as a value or as bytes."""
    if rng.random() < 0.6:
        text = json.dumps(json_mutated(json.loads(raw), rng), ensure_ascii=rng.random() < 0.5)
        return text.encode("utf-8", "replace")
    return bytes_mutated(raw, rng)


def fuzz(count: int, one) -> None:
    """one(rng) for `count` seeds, in a process of its own; what is neither fine nor a clean refusal fails."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        failures, refused = [], 0
        try:
            if (statm := Path("/proc/self/statm")).exists():  # Linux; macOS keeps no such limit
                limit = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            def watch(event, args):
                if event.startswith(FORBIDDEN) and watching:
                    os.write(writer, f"{number}: {event} {args}"[:500].encode())
                    os._exit(1)
            number, watching = -1, False
            for seed in range(20):  # what is imported lazily comes now
                with suppress(ValueError, OSError):
                    one(random.Random(f"warm-up {seed}"))
            sys.addaudithook(watch)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            for number in range(count):
                signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of CPU time: the machine may be busy
                watching = True
                try:
                    one(random.Random(number))
                except (ValueError, OSError) as error:
                    refused += 1
                    if len(str(error)) < 20:  # it says nothing; cli cuts what is too long
                        failures.append(f"{number}: {type(error).__name__} {str(error)[:300]}")
                except BaseException as error:  # tiktoken's panics are no Exception
                    failures.append(f"{number}: {type(error).__name__} {str(error)[:300]}")
                watching = False
        except BaseException as error:
            failures.append(f"the test itself: {error!r}")
        os.write(writer, json.dumps([len(failures), failures[:20], refused]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read()
    _, ended = os.waitpid(child, 0)
    assert ended == 0, f"ended by {ended} ({int(signal.SIGPROF)} is {SECONDS} seconds on one file): {text}"
    failed, failures, refused = json.loads(text)
    assert not failed, "\n".join(failures)
    assert refused > count // 4  # the mutations do break things


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of tiny.trained."""
    home = tmp_path_factory.mktemp("fuzz")
    tiny.trained(home)
    return home


def damage(folder: Path, *names: str):
    """broken(rng): the folder as it is now, but one of these files mutated."""
    files = {name: (folder / name).read_bytes() for name in names}
    def broken(rng: random.Random) -> None:
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
        name = rng.choice(names)
        mutate = bytes_mutated if name.endswith(".safetensors") else either
        (folder / name).write_bytes(mutate(files[name], rng))
    return broken


def test_records(tmp_path):
    file = tmp_path / "own.jsonl"
    records = tiny.records(6)
    def one(rng):
        if rng.random() < 0.3:
            file.write_bytes(either(json.dumps(records).encode(), rng))
        else:
            lines = [json.dumps(r).encode() for r in records]
            i = rng.randrange(len(lines))
            lines[i] = either(lines[i], rng)
            file.write_bytes(b"\n".join(lines))
        for record in read_records(file):
            assert all(isinstance(value, str) for value in record.values())
    fuzz(4000, one)


def test_safetensors(made, tmp_path):
    folder = Path(shutil.copytree(made / "base", tmp_path / "m"))
    raw = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    def one(rng):
        if rng.random() < 0.5:
            head = either(raw[8:end], rng)
            broken = len(head).to_bytes(8, "little") + head + raw[end:]
        else:
            broken = bytes_mutated(raw[:end], rng) + raw[end:]
        (folder / "model.safetensors").write_bytes(broken)
        llama.load(folder)
    fuzz(2000, one)


def test_model_folder(made, tmp_path):
    """config.json and the index of shards."""
    folder = Path(shutil.copytree(made / "base", tmp_path / "m"))
    (folder / "model.safetensors").rename(folder / "a.safetensors")  # beside it the index would not count
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "a.safetensors"}}))
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}
    config = json.loads((folder / "config.json").read_text()) | {"rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(config))
    broken = damage(folder, "config.json", index.name)
    def one(rng):
        broken(rng)
        model = llama.load(folder)
        assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 48)
    fuzz(1000, one)


def test_tokenizer(made, tmp_path):
    """tokenizer.json, and generation_config.json, which names the ends of an answer."""
    folder = Path(shutil.copytree(made / "base", tmp_path / "m"))
    spec = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}
    # a small spec, so that a mutation seldom lands in the vocabulary alone
    spec["post_processor"] = {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<eos>"}}, {"Sequence": {"id": "A"}}]}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    broken = damage(folder, *["tokenizer.json"] * 4, "generation_config.json")
    def one(rng):
        broken(rng)
        tokenizer = Tokenizer(folder)
        ids = tokenizer.encode("In the storm, 12 times: " + "a" * 40 + " <eos>")
        assert all(0 <= i < 270 for i in [*ids, *tokenizer.bos, *tokenizer.ends])
        assert tokenizer.eos in tokenizer.ends
        tokenizer.decode(ids)
    fuzz(1000, one)


def test_adapter(made, tmp_path):
    folder = Path(shutil.copytree(made / "sft", tmp_path / "a"))
    broken = damage(folder, *(path.name for path in folder.iterdir()))
    base_id, plain = base_model.fingerprint(made / "base"), llama.load(made / "base")
    def one(rng):
        broken(rng)
        lora.load_adapter(copy.deepcopy(plain), folder, base_id, TEMPLATE)
    fuzz(1000, one)


def test_gguf(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(download, "DATA", tmp_path)
    raw = tiny.write_gguf(tmp_path / "m.gguf").read_bytes()
    def one(rng):
        (tmp_path / "broken.gguf").write_bytes(bytes_mutated(raw[:1500], rng) + raw[1500:])
        try:
            base_model.write_hf_folder(tmp_path / "broken.gguf", tmp_path / "out")
        finally:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    fuzz(1000, one)
