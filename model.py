"""A Llama-family transformer, hand-written: the network, weights from safetensors, batched generation.

PILLOW uses it in three ways: LoRA is added to it (lora.py), the matcher reads its hidden states as embeddings
(matcher.py), and its greedy answers earn the reward (train_rl.py). Module names are Hugging Face's, so a
checkpoint needs no name map beyond dropping its "model." prefix. One class serves Llama 2 and 3, SmolLM2,
Mistral, Qwen2/2.5 (biases on q, k, v) and Qwen3 (norms on q and k).

Letters: B rows, T new tokens, S columns seen (cached + new), C width, H query heads, G key/value heads, D
width of a head, V vocabulary, L layers, P tokens of a prefix.

Try: python -c "import model; print(model.load('data/base').config)"
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.base_model import read_config, weight_files
from data.files import read_tensors, save_tensors


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
    def read(cls, folder: str | Path) -> Config:
        return cls(**read_config(Path(folder)))  # refuses what this code cannot honour


# ---- the network -----------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """w x / rms(x): a layer norm without the mean and without a bias."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:  # (.., C) -> (.., C)
        # rms(x) = sqrt(mean of x^2 + eps), which PyTorch computes in fp32: squares overflow in half precision
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_tables(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, D/2), fp32, of positions (B, T): moving one position on rotates pair i by
    theta^(-2i/D) radians."""
    dims = torch.arange(0, config.head_dim, 2, device=positions.device).float()  # (D/2)
    freqs = 1 / config.rope_theta ** (dims / config.head_dim)  # (D/2)
    if config.rope_scaling:  # Llama 3.1: slow pairs turn `factor` times slower still, fast ones as before
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * freqs / (2 * torch.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / s["factor"]
    angles = (positions[..., None].float() * freqs).unsqueeze(1)  # (B, 1, T, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of dimensions by its position's angle.

    TRAP: Hugging Face's weights pair dimension i with i + D/2, Meta's files 2i with 2i + 1. With the wrong
    pairs the first token still looks right: position 0 is not rotated.
    """
    x1, x2 = x.chunk(2, dim=-1)  # (.., T, D/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)  # (.., T, D)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cached: Tensor | None) -> Tensor:
        """x (B, T, C) -> (B, T, C). mask (.., H/G T, S): 0 where a token may look, else -inf.
        cached: None, or this layer's keys and values (2, B, G, S, D); its last T columns are filled here."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cached is not None:
            cached[0, :, :, -T:], cached[1, :, :, -T:] = k, v
            k, v = cached  # (B, G, S, D): all columns so far
        # H/G query heads share a key head. They are stacked along time, so one product serves all of them.
        q = q.reshape(B, k.size(1), -1, self.head_dim)  # (B, G, H/G T, D)
        if T == 1 or k.size(2) > 256 or q.is_cuda:  # one fused kernel: up to 4 times as fast for long texts
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, G, H/G T, D)
        else:  # the same written out; in training, with short texts, it is the faster one
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5 + mask  # (B, G, H/G T, S)
            y = scores.softmax(-1) @ v  # (B, G, H/G T, D); softmax computes in fp32, whatever scores are
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
    """Keys and values of the columns so far, and which columns are real: a row may be padded anywhere."""

    def __init__(self, c: Config, rows: int, columns: int, like: Tensor):
        # Zeros, not empty: a masked column has weight 0, and 0 * NaN would be NaN.
        self.kv = like.new_zeros(c.num_hidden_layers, 2, rows, c.num_key_value_heads, columns,
                                 c.head_dim)  # (L, 2, B, G, S, D)
        self.key_mask = torch.zeros(rows, columns, dtype=torch.bool, device=like.device)  # (B, S)
        self.length = 0  # columns filled

    def keep(self, rows: list[int]) -> None:
        """Keeps only these rows, so that finished ones cost nothing more."""
        self.kv, self.key_mask = self.kv[:, :, rows], self.key_mask[rows]


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # nn.Embedding's own random init on the meta device would import torch's compiler (1 s)
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(
            config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None,
                depth: int | None = None) -> Tensor:
        """ids (B, T) -> hidden states (B, T, C) after the first `depth` layers (default: all) and the norm.

        Without a cache: plain causal attention; rows may be padded at the right. With one: the T new columns
        are appended, and attention_mask (B, T) says which of them are not padding (default: all).
        """
        T, cached = ids.size(1), [None] * len(self.layers)
        if cache is None:
            columns = torch.arange(T, device=ids.device)  # (S), here S = T
            positions = columns[None]  # (1, T)
            visible = columns <= columns[:, None]  # (T, S): token t sees columns 0 to t
        else:
            start, cache.length = cache.length, cache.length + T
            cache.key_mask[:, start:cache.length] = True if attention_mask is None else attention_mask
            keys = cache.key_mask[:, :cache.length]  # (B, S)
            # A position counts the row's own real columns. Rotary positions act by their differences, so
            # padding at the left would do no harm, but between a prefix and its query it would add distance.
            positions = (keys.cumsum(1) - 1)[:, start:].clamp(min=0)  # (B, T)
            columns = torch.arange(cache.length, device=ids.device)  # (S)
            own = columns[start:, None]  # (T, 1): each new token's column
            # A token sees the real columns up to its own; padding sees itself, or its softmax would be NaN.
            visible = (keys[:, None] & (columns <= own) | (columns == own))[:, None]  # (B, 1, T, S)
            cached = cache.kv[..., :cache.length, :]  # (L, 2, B, G, S, D)
        dtype, c = self.norm.weight.dtype, self.config
        mask = torch.zeros(visible.shape, dtype=dtype, device=ids.device).masked_fill(~visible, -torch.inf)
        mask = torch.cat([mask] * (c.num_attention_heads // c.num_key_value_heads), dim=-2)  # (.., H/G T, S)
        cos, sin = (table.to(dtype) for table in rope_tables(c, positions))  # (B, 1, T, D/2)
        x = self.embed_tokens(ids)  # (B, T, C)
        for layer, kv in zip(self.layers[:depth], cached[:depth], strict=True):
            x = layer(x, cos, sin, mask, kv)  # (B, T, C)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(.., C) -> (.., V). Not part of forward: with V = 49,152 and C = 576 it is a quarter of a token's
        cost, so callers ask only where they need it."""
        return F.linear(hidden, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)


# ---- generation ------------------------------------------------------------------------------------------

def pad(sequences: Sequence[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids (B, T), filled up with zeros, and the mask of what is not padding (B, T)."""
    width = max(1, max(map(len, sequences)))  # a batch of empty lists is one column of padding
    ids = torch.zeros(len(sequences), width, dtype=torch.long)  # (B, T)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)  # (B, T)
    for row, sequence in enumerate(sequences):
        start = width - len(sequence) if left else 0
        ids[row, start:start + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, start:start + len(sequence)] = True
    return ids, mask


@torch.no_grad()
def generate(model: Transformer, sequences: Sequence[list[int]], max_new_tokens: int, ends: Collection[int],
             stop: Callable[[list[int]], bool] = lambda ids: False,
             prefixes: Sequence[Tensor | None] | None = None,
             choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
             on_token: Callable[[int, int], None] | None = None) -> list[list[int]]:
    """Continues each list of ids until one of `ends`, stop(new ids) or max_new_tokens; returns the new ids.

    prefixes: for each row None, or `prefill`'s (L, 2, G, P, D) of what stands before it: what many rows begin
    with is computed once. choose: logits (B, V) -> ids (B), greedy by default. on_token(row, id) is called as
    tokens come. Rows of any length mix freely: in fp32 each answer equals the row's alone.
    """
    prefixes = prefixes or [None] * len(sequences)
    device = model.embed_tokens.weight.device
    prefix_length = max(0 if p is None else p.size(3) for p in prefixes)
    # padded at the left, so each row's newest token is in the last column, where the next one is read off
    ids, mask = pad(sequences, left=True)  # (B, T)
    cache = Cache(model.config, len(sequences), prefix_length + ids.size(1) + max_new_tokens,
                  model.embed_tokens.weight)
    for row, prefix in enumerate(prefixes):
        if prefix is not None:
            cache.kv[:, :, row, :, prefix_length - prefix.size(3):prefix_length] = prefix
            cache.key_mask[row, prefix_length - prefix.size(3):prefix_length] = True
    cache.length = prefix_length
    hidden = model(ids.to(device), cache, mask.to(device))  # (B, T, C)

    answers: list[list[int]] = [[] for _ in sequences]
    rows, done = list(range(len(sequences))), [False] * len(sequences)  # rows[i]: the answer of cache row i
    for step in range(max_new_tokens):
        next_ids = choose(model.logits(hidden[:, -1]))  # (B)
        for row, token in zip(rows, next_ids.tolist(), strict=True):
            if not done[row]:
                answers[row].append(token)
                done[row] = token in ends or stop(answers[row])
                if on_token:
                    on_token(row, token)
        active = [i for i, row in enumerate(rows) if not done[row]]
        if not active or step == max_new_tokens - 1:
            break
        if 2 * len(active) <= len(rows):  # copying the cache pays once half of the rows are done
            cache.keep(active)
            rows, next_ids = [rows[i] for i in active], next_ids[active]
        hidden = model(next_ids[:, None], cache)  # (B, 1, C)
    return answers


@torch.no_grad()
def prefill(model: Transformer, sequences: Sequence[list[int]]) -> list[Tensor]:
    """Keys and values (L, 2, G, P, D) of each list of ids, which will stand before many others."""
    device = model.embed_tokens.weight.device
    ids, mask = pad(sequences)  # (B, T)
    cache = Cache(model.config, *ids.shape, model.embed_tokens.weight)
    model(ids.to(device), cache, mask.to(device))
    return [cache.kv[:, :, row, :, :len(sequence)].clone() for row, sequence in enumerate(sequences)]


# ---- weights ---------------------------------------------------------------------------------------------

def load(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """The model in `folder` (Hugging Face layout), frozen. ValueError names a tensor that does not fit.

    It is built on the meta device and filled tensor by tensor, so the peak memory is one model.
    """
    config = Config.read(folder)
    with torch.device("meta"):
        model = Transformer(config)
    wanted, state = model.state_dict(), {}
    # Some files hold a tied head once more, and old ones a rope table that follows from the config.
    extra = {"lm_head.weight": wanted["embed_tokens.weight"]} if config.tie_word_embeddings else {}
    extra |= {f"layers.{i}.self_attn.rotary_emb.inv_freq": torch.empty(config.head_dim // 2)
              for i in range(config.num_hidden_layers)}
    remedy = "take config.json and weights of one model, or fetch it again"
    files = weight_files(Path(folder))
    for name, tensor in read_tensors(files, wanted | extra, remedy, extra, "model.", dtype):
        if "inv_freq" not in name:
            state[name] = tensor.to(device)
    embedding = state["embed_tokens.weight"]
    if config.tie_word_embeddings and not torch.equal(state.pop("lm_head.weight", embedding), embedding):
        raise ValueError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding; "
                         "set it to false in config.json, or fetch the model again.")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def save(model: Transformer, folder: str | Path, base: str | Path) -> None:
    """Writes all weights as a Hugging Face folder, that --base and transformers can load. Tokenizer and
    config are those of the folder `base`. Merge LoRA first (lora.py)."""
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
    save_tensors({name if name.startswith("lm_head") else f"model.{name}": tensor
                  for name, tensor in model.state_dict().items()},
                 Path(folder, "model.safetensors"), {"format": "pt"},
                 {name: Path(base, name).read_bytes() for name in names if Path(base, name).exists()})
    if (index := Path(folder, "model.safetensors.index.json")).exists():  # others read its shards first
        index.unlink()
        print(f"({index}: removed, since it names older weights)")
