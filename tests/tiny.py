"""A model folder in the Hugging Face layout that fits in 300 kB, and records of our own writing, for tests.

Made with this project's code alone. Random weights, so the answers are gibberish (often no UTF-8 either),
which is what a test of streaming or of a cache wants. The EOS id is 0, also what rows are padded with:
code that takes "id == pad" for "padding" fails here (trap 2).
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lora
import matcher as matching
import model as llama
from data import base_model, download, prepare
from data.instructions import TEMPLATE
from data.tokenizer import Tokenizer, byte_alphabet
from model import Config, Transformer

ROOT = Path(__file__).resolve().parent.parent
MERGES = [("#", "#"), ("##", "#"), ("I", "n"), ("In", "s"), ("t", "h"), ("th", "e"), ("o", "n"), ("e", "r"),
          ("e", "s"), ("R", "es"), ("Ġ", "a"), ("Ġ", "the"), ("Ġ", "Ins")]


def build(folder: Path, seed: int = 0, merges: list = MERGES, dtype: torch.dtype = torch.float32,
          **changes) -> Path:
    """Writes config.json (with `changes`), tokenizer.json and model.safetensors into `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<eos>", *byte_alphabet(), *("".join(pair) for pair in merges)]
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "normalizer": None, "post_processor": None, "decoder": {"type": "ByteLevel"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "added_tokens": [{"id": 0, "content": "<eos>", "special": True}],
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)},
                  "merges": [" ".join(pair) for pair in merges]}}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": len(tokens), "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": True, "eos_token_id": 0,
        "bos_token_id": 0, "torch_dtype": str(dtype).removeprefix("torch.")} | changes), encoding="utf-8")
    with torch.device("meta"):  # names and shapes, without memory for a second model
        wanted = Transformer(Config.read(folder)).state_dict()
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, tensor in wanted.items():
        noise = torch.randn(tensor.shape, generator=generator)
        # norms near 1; the rest keeps the size of what flows through, so that attention and depth matter
        noise = 1 + 0.1 * noise if tensor.dim() == 1 else noise / tensor.size(-1) ** 0.5
        weights[name if name.startswith("lm_head") else f"model.{name}"] = noise.to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def records(n: int) -> list[dict]:
    """n different records of two tasks, their answers between one word and five."""
    words = ["apple", "brick", "cloud", "drum", "engine", "fox", "glass", "hill", "iron", "jam", "kite"]
    made = []
    for i in range(n):
        text = " ".join(words[(i + 3 * k) % len(words)] for k in range(1 + i % 5)) + f" {i}"
        kind = ("loud", "Say it louder.", text.upper()) if i % 2 else ("tag", "Put it in a tag.", f"<{text}>")
        made.append({"task": kind[0], "instruction": kind[1], "input": text, "output": kind[2]})
    return made


def write_records(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


POOL = records(8)


def with_data(home: Path) -> Path:
    """`home` with mine.jsonl, 60 records, and their splits in home/data."""
    (home / "data").mkdir()
    write_records(home / "mine.jsonl", records(60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "DATA", home / "data")
        prepare.ensure_data(str(home / "mine.jsonl"))
    return home


def trained(home: Path) -> tuple[Path, Path, Path]:
    """(base, adapter, matcher) folders in `home`: B of the adapter is not zero, the matcher is not kNN."""
    base = build(home / "base")
    model = llama.load(base)
    generator = torch.Generator().manual_seed(0)
    lora.add_lora(model, 2, 4.0, generator=generator)
    for layer in lora.lora_layers(model).values():
        layer.B.data.copy_(0.2 * torch.randn(layer.B.shape, generator=generator))
    lora.save_adapter(model, home / "sft", str(base), base_model.fingerprint(base), TEMPLATE)
    tuned, model_id = lora.load_tuned(base, str(home / "sft"), TEMPLATE, torch.float32, "cpu")
    vectors = matching.embed_records(tuned, Tokenizer(base), POOL)
    matcher = matching.Matcher(vectors, hidden=4, logit_scale=3.0, generator=generator)
    for mlp in (matcher.prompt_mlp, matcher.state_mlp):
        mlp.down.weight.data.copy_(torch.randn(mlp.down.weight.shape, generator=generator))
    matching.save(matcher, home / "rl", POOL, 2, model_id)
    return base, home / "sft", home / "rl"


# ---- the base model as it comes: a GGUF file -------------------------------------------------------------

def smollm2(home: Path) -> dict:
    """home/smollm2.json with the sizes of a tiny model; returns its config."""
    facts = json.loads(Path(base_model.__file__).with_name("smollm2.json").read_text("utf-8"))
    facts["config"] |= {"vocab_size": 9, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
                        "rope_theta": 5000.0}
    (home / "smollm2.json").write_text(json.dumps(facts), encoding="utf-8")
    return facts["config"]


def permute(w, heads: int):
    """What llama.cpp's converter does to q_proj and k_proj."""
    return w.reshape(heads, 2, len(w) // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path: Path, weights: dict | None = None) -> Path:
    """Weights {name: array} of such a model (default: random ones) -> a GGUF file as llama.cpp writes it."""
    import gguf
    facts = json.loads(Path(base_model.__file__).with_name("smollm2.json").read_text("utf-8"))
    if weights is None:
        (path.parent / "config.json").write_text(json.dumps(smollm2(path.parent)), encoding="utf-8")
        model = Transformer(Config.read(path.parent))
        weights = {n: torch.randn(w.shape).half().numpy() for n, w in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["<|endoftext|>", "<|go|>", "<|stop|>", "a", "b", "ab", "1", "2", "Ġ"])
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    names = {value: key for key, value in facts["tensors"].items()}
    for name, w in weights.items():
        *_, layer, part = re.fullmatch(r"(layers\.(\d+)\.)?(.+)\.weight", name).groups()
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
        w = permute(w, heads) if heads else w
        writer.add_tensor((f"blk.{layer}." if layer else "") + f"{names[part]}.weight", w.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def two_processes(script: str, home: Path, flags: dict) -> subprocess.CompletedProcess:
    """torchrun with two processes of train_sft or train_rl, whose data folder is home/data."""
    file = home / "run.py"
    file.write_text(f"import sys, pathlib\nsys.path.insert(0, {str(ROOT)!r})\nimport {script} as script\n"
                    f"from data import download\ndownload.DATA = pathlib.Path({str(home / 'data')!r})\n"
                    "from data import cli\ncli.cli(script.Settings, script.main)\n")
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
         str(file), *(f"--{k}={v}" for k, v in flags.items())],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    return ended
