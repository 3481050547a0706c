"""A Llama-family transformer, hand-written: weights from safetensors, KV cache, batched generation.

Module names are Hugging Face's, so a checkpoint needs no name map beyond dropping its "model." prefix.
One class serves Llama 2/3, SmolLM2, Mistral, Qwen2/2.5 (biases on q, k, v) and Qwen3 (norms on q and k).

PILLOW uses the model three ways: LoRA is added to it (lora.py), the matcher reads its hidden states as
embeddings (matcher.py), and its greedy answers are what the reward judges (train_rl.py).

Letters: B rows, T new tokens, S columns seen (cache + new), C width, H heads, G key/value heads, D head
width, V vocabulary, L layers.

Try: python -c "import model; print(model.load('data/base').config)"
"""
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data.tokenizer import check_fields, read_json

# oneDNN keeps its last 1,024 kernels with all that they need, and batches of ever new lengths make ever new
# ones. With 64, which are enough for one length, 40 steps of train_sft.py are as fast and peak at 1.05 GB
# instead of 1.89. Both are read at the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # values of config.json's model_type
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not fp8: its scales lie elsewhere


@contextmanager
def open_tensors(path: Path) -> Iterator:
    """safe_open's handle for a safetensors file; FileNotFoundError or ValueError in one sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; is {path.parent} the right folder?")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: broken safetensors file ({error}); make or fetch it again.") from None


@dataclass
class Config:
    """The fields of config.json that change the arithmetic."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # None, or the numbers of Llama 3's long-context scaling
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def read(cls, folder: str | Path) -> "Config":
        """From folder/config.json. What this code cannot honour is refused by name, never ignored."""
        file = Path(folder) / "config.json"
        raw = read_json(file, hidden_size=int, num_attention_heads=int, max_position_embeddings=int)
        family = raw.get("model_type")
        # transformers 5 writes rope_parameters; before it there were rope_theta and rope_scaling
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        check_fields({"rope_parameters": rope}, file, rope_parameters=dict)
        kind = rope.get("rope_type", rope.get("type", "default"))
        window = raw.get("sliding_window") if raw.get("use_sliding_window", family == "mistral") else None
        for refused, what in (
                (family not in FAMILIES, f"model_type '{family}' (only {', '.join(FAMILIES)})"),
                ("quantization_config" in raw, "a quantised checkpoint (give the original)"),
                (raw.get("hidden_act", "silu") != "silu", f"hidden_act '{raw.get('hidden_act')}'"),
                (raw.get("attention_bias") or raw.get("mlp_bias"), "attention_bias or mlp_bias"),
                # ignoring a rope type looks fine on short texts and breaks on long ones
                (kind not in ("default", "llama3"), f"rope type '{kind}' (only default and llama3)"),
                (window and not (isinstance(window, int) and window >= raw["max_position_embeddings"]),
                 f"sliding_window {window}")):
            if refused:
                raise ValueError(f"{file}: {what} is not supported; use another model.")
        heads = raw["num_attention_heads"]
        raw |= {"num_key_value_heads": raw.get("num_key_value_heads") or heads,  # absent or null: one a head
                "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
                "rope_theta": rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
                "rope_scaling": rope if kind == "llama3" else None,
                "tie_word_embeddings": raw.get("tie_word_embeddings", False),
                "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}  # all else is the same in all
        check_fields(raw, file, **{field.name: field.type for field in fields(cls)})
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            check_fields(rope, file, **dict.fromkeys(names, float))
            span = {"high_freq_factor - low_freq_factor": rope["high_freq_factor"] - rope["low_freq_factor"]}
            check_fields(span, file, **dict.fromkeys(span, float))  # 0 would make every angle NaN
        if heads % raw["num_key_value_heads"] or raw["head_dim"] % 2 or raw["num_hidden_layers"] > 1000:
            raise ValueError(f"{file}: {heads} heads, {raw['num_key_value_heads']} key/value heads of width "
                             f"{raw['head_dim']} in {raw['num_hidden_layers']} layers are no model of these "
                             "families; fetch it again.")
        return cls(**{field.name: raw[field.name] for field in fields(cls)})


# ---- the network -----------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """w x / rms(x): a layer norm that neither subtracts the mean nor adds a bias."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:  # (.., C) -> (.., C)
        # in fp32: a mean of squares overflows in half precision, or loses its digits
        r = (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt()  # (.., 1)
        return (x * r).to(x.dtype) * self.weight


def rope_tables(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin (B, 1, T, D), fp32: a position on, dimension i has turned by theta^(-2i/D) more."""
    dims = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    freqs = 1 / config.rope_theta ** (dims / config.head_dim)  # (D/2); rounded as in transformers
    if config.rope_scaling:  # Llama 3.1: slow dimensions stretch by `factor`, fast ones stay
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * freqs / (2 * torch.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / s["factor"]
    angles = (positions[..., None].float() * freqs).unsqueeze(1)  # (B, 1, T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # halves, not pairs; see rotate


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position: dimensions i and i + D/2 turn together, as Hugging Face lays weights out. In Meta's
    files 2i and 2i + 1 do, and with the wrong pairs the first token still looks right."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)  # roll swaps the halves


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(width, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor,
                cached: Tensor | None) -> Tensor:
        """x (B, T, C) -> (B, T, C). mask (.., H/G T, S): 0 where a token may look, else -inf.
        cached: None, or this layer's (2, B, G, S, D), whose last T columns are written here."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = q.reshape(B, k.size(1), -1, self.head_dim)  # (B, G, H/G T, D): H/G heads share a key head
        if cached is not None:
            cached[0, :, :, -T:], cached[1, :, :, -T:] = k, v
            k, v = cached  # (B, G, S, D): all columns so far
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, G, H/G T, D)
        y = y.reshape(B, -1, T, self.head_dim).transpose(1, 2)  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU: silu(x) = x sigmoid(x)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, *attention_args) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention_args)
        return x + self.mlp(self.post_attention_layernorm(x))


class Cache:
    """Keys and values of the columns so far, and which columns are real: rows may be padded anywhere."""

    def __init__(self, c: Config, rows: int, columns: int, like: Tensor):
        # Zeros, not empty: a masked column has weight 0, and 0 * NaN would be NaN.
        self.kv = like.new_zeros(c.num_hidden_layers, 2, rows, c.num_key_value_heads, columns,
                                 c.head_dim)  # (L, 2, B, G, S, D)
        self.real = torch.zeros(rows, columns, dtype=torch.bool, device=like.device)  # (B, S)
        self.end = 0  # columns filled

    def keep(self, rows: list[int]) -> None:
        """Keeps these rows alone: the finished ones cost no more."""
        self.kv, self.real = self.kv[:, :, rows], self.real[rows]


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # from_pretrained draws no random numbers; on meta that would import half of PyTorch's compiler (1 s)
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(
            config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, cache: Cache | None = None, real: Tensor | None = None) -> Tensor:
        """ids (B, T) -> hidden states (B, T, C), after the last norm.

        Without a cache: plain causal attention, rows padded at the right if at all.
        With one: the T new columns are appended; real (B, T) says which are not padding (default: all).
        """
        T, cached = ids.size(1), [None] * len(self.layers)
        if cache is None:
            columns = torch.arange(T, device=ids.device)  # (S), here S = T
            positions = columns[None]  # (1, T)
            visible = columns <= columns[:, None]  # (T, S): token t sees columns 0 to t
        else:
            start, cache.end = cache.end, cache.end + T
            cache.real[:, start:cache.end] = True if real is None else real
            seen = cache.real[:, :cache.end]  # (B, S)
            # A row's position counts its own real columns. Rotary positions act by distances, so padding at
            # the left alone would do no harm; between a prefix and its prompt it would push them apart.
            positions = (seen.cumsum(1) - 1)[:, start:].clamp(min=0)  # (B, T)
            columns = torch.arange(cache.end, device=ids.device)  # (S)
            new = columns[start:, None]  # (T, 1): the new tokens' own
            # Each column sees the real ones up to itself; a padded one sees itself too, or softmax gives NaN.
            visible = (seen[:, None] & (columns <= new) | (columns == new))[:, None]  # (B, 1, T, S)
            cached = cache.kv[..., :cache.end, :]  # (L, 2, B, G, S, D)
        dtype, c = self.norm.weight.dtype, self.config
        # Attention's rows are H/G query heads, one below the other: each needs the mask's T rows again.
        mask = torch.zeros(visible.shape, dtype=dtype, device=ids.device).masked_fill(~visible, -torch.inf)
        mask = torch.cat([mask] * (c.num_attention_heads // c.num_key_value_heads), dim=-2)  # (.., H/G T, S)
        cos, sin = (table.to(dtype) for table in rope_tables(self.config, positions))
        x = self.embed_tokens(ids)  # (B, T, C)
        for layer, kv in zip(self.layers, cached, strict=True):
            x = layer(x, cos, sin, mask, kv)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V). Apart from forward: V = 49,152 columns for a width of
        576 are a quarter of a token's cost, so callers ask only where they need them."""
        return F.linear(hidden, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)


# ---- weights ---------------------------------------------------------------------------------------------

def weight_files(folder: str | Path) -> list[Path]:
    """The shards that the index names if there is one, else the single model.safetensors."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = list(read_json(index, weight_map=dict)["weight_map"].values()) or [""]
    for name in names:  # plain names alone: an index could lead anywhere on this disk
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no weight file '{name}' (pickled .bin files are not read); "
                                    "fetch the model again.")
    return sorted({folder / name for name in names})


def read_tensors(paths: Sequence[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    """All tensors of safetensors files, one after the other."""
    for path in paths:
        with open_tensors(path) as file:
            names = list(file.keys())
        for first in range(0, len(names), 16):
            # Opened anew, since what was read of a mapped file stays in memory; but not for each tensor: to
            # read the header 272 times takes longer than to read SmolLM2's weights.
            with open_tensors(path) as file:
                for name in names[first:first + 16]:
                    yield path, name, file.get_tensor(name)


def load(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """The model in `folder` (Hugging Face layout), frozen.

    Built on the meta device and filled tensor by tensor, so the peak is one model. Every tensor must be there
    once with the right shape and none may be left over, else ValueError names it.
    """
    config = Config.read(folder)
    with torch.device("meta"):
        model = Transformer(config)
    wanted, state = model.state_dict(), {}
    for path, name, tensor in read_tensors(weight_files(folder)):
        key = name.removeprefix("model.")
        if key == "lm_head.weight" and config.tie_word_embeddings or key.endswith("inv_freq"):
            continue  # some files carry a tied head's second copy, old ones the rope table
        if key not in wanted or key in state:
            raise ValueError(f"{path}: unexpected tensor '{name}', not in config.json's model; take both "
                             "files of one model.")
        if tensor.shape != wanted[key].shape or tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: tensor '{name}' is {tensor.dtype} {list(tensor.shape)}, but "
                             f"config.json makes it floats {list(wanted[key].shape)}; take both files of one "
                             "model.")
        # copy: keep no memory map of the file, which may be replaced under our feet
        state[key] = tensor.to(device=device, dtype=dtype, copy=True)
    if missing := sorted(set(wanted) - set(state)):
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, e.g. '{missing[0]}'; fetch the "
                         "model again.")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def fingerprint(folder: str | Path) -> str:
    """16 hex digits that name these weights: a hash of config.json and of every byte of the weight files."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for path in weight_files(folder):  # 0.3 s for 269 MB
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def pick_device(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """What --device and --dtype mean here. "auto" is cuda where there is one, and bfloat16 where the machine
    multiplies it natively: emulated bf16 is several times slower than float32."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device) or dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--device {device} --dtype {dtype}: choose auto, cpu, cuda or mps, and auto, "
                         "bfloat16 or float32.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if int(number or 0) >= there[kind]:
        raise ValueError(f"--device {device}: this machine (or this PyTorch) has none; choose cpu.")
    if dtype == "auto":
        cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
        fast = torch.cuda.is_bf16_supported() if "cuda" in device else (
            cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
        dtype = "bfloat16" if fast else "float32"
    return device, getattr(torch, dtype)


def join(device: str) -> tuple[int, int, str]:
    """(rank, world, device): which of torchrun's processes this is, of how many, and on what it computes.
    Without torchrun: 0 of 1."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
        if rank:
            sys.stdout = open(os.devnull, "w")  # the first one speaks, fetches, logs and saves for all
    return rank, world, device


@contextmanager
def first_alone(rank: int, world: int) -> Iterator[None]:
    """torchrun's first process goes through the body before the others do, who then find what it fetched."""
    if rank:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


# ---- generation ------------------------------------------------------------------------------------------

def pad(texts: Sequence[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """Texts of any length -> ids (B, T), filled up with zeros, and which of them are real (B, T)."""
    width = max(1, max(map(len, texts)))  # a batch of empty texts is one column of padding
    ids = torch.zeros(len(texts), width, dtype=torch.long)  # (B, T)
    real = torch.zeros(len(texts), width, dtype=torch.bool)  # (B, T)
    for row, text in enumerate(texts):
        start = width - len(text) if left else 0
        ids[row, start:start + len(text)] = torch.tensor(text, dtype=torch.long)
        real[row, start:start + len(text)] = True
    return ids, real


@torch.no_grad()
def generate(model: Transformer, prompts: Sequence[list[int]], max_new_tokens: int, eos: int,
             stop: Sequence[int] = (), prefixes: Sequence[Tensor | None] | None = None,
             choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
             on_token: Callable[[int, int], None] | None = None) -> list[list[int]]:
    """Continues each prompt until eos, the token sequence `stop`, or max_new_tokens; returns the new ids.

    prefixes: for each row, None or the (L, 2, G, P, D) of `prefill` for ids that stand before its own: what
    many rows begin with is computed once. choose: logits (B, V) -> ids (B), see sample.py's draw.
    on_token(row, id) is called as tokens come. Rows of any length mix freely: each is padded on the left,
    and the result equals the row's alone.
    """
    prefixes = prefixes or [None] * len(prompts)
    device = model.embed_tokens.weight.device
    before = max(0 if p is None else p.size(3) for p in prefixes)  # columns of the longest prefix
    ids, real = pad(prompts, left=True)  # (B, T)
    cache = Cache(model.config, len(prompts), before + ids.size(1) + max_new_tokens,
                  model.embed_tokens.weight)
    for row, prefix in enumerate(prefixes):
        if prefix is not None:
            cache.kv[:, :, row, :, before - prefix.size(3):before] = prefix
            cache.real[row, before - prefix.size(3):before] = True
    cache.end = before
    # padded at the left, so each row's newest token is in the last column, where the next one is read off
    hidden = model(ids.to(device), cache, real.to(device))  # (B, T, C)

    answers: list[list[int]] = [[] for _ in prompts]
    rows, done = list(range(len(prompts))), [False] * len(prompts)  # rows[i]: the prompt of cache row i
    for step in range(max_new_tokens):
        next_ids = choose(model.head(hidden[:, -1]))  # (B)
        for row, token in zip(rows, next_ids.tolist(), strict=True):
            if not done[row]:
                answers[row].append(token)
                done[row] = token == eos or bool(stop) and answers[row][-len(stop):] == list(stop)
                if on_token:
                    on_token(row, token)
        left = [i for i, row in enumerate(rows) if not done[row]]
        if not left or step == max_new_tokens - 1:
            break
        if 2 * len(left) <= len(rows):  # copying the cache pays once half the rows are done
            cache.keep(left)
            rows, next_ids = [rows[i] for i in left], next_ids[left]
        hidden = model(next_ids[:, None], cache)  # (B, 1, C)
    return answers


@torch.no_grad()
def prefill(model: Transformer, texts: Sequence[list[int]]) -> list[Tensor]:
    """Keys and values (L, 2, G, P, D) of each text, P its tokens; it will stand before many others."""
    device = model.embed_tokens.weight.device
    ids, real = pad(texts)  # (B, T)
    cache = Cache(model.config, *ids.shape, model.embed_tokens.weight)
    model(ids.to(device), cache, real.to(device))
    return [cache.kv[:, :, row, :, :len(text)].clone() for row, text in enumerate(texts)]
