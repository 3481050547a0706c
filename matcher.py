"""The matching network: which prompts of the user's pool go in front of a query (paper, section 3.2).

An episode has m steps. At each one the policy sees the state, which is the query and the prompts picked so
far, and picks one more prompt; the picked prompts, in that order, are read by the LLM before the query.

    prompt j --frozen LLM--> e_j --prompt tower--> u_j \\
                                                        scale * <s, u_j> -> softmax over those not yet picked
    query    --frozen LLM--> q  --state tower----> s   /                     and among the nearest candidates
    mean of the picked e_j ------^

Both towers are residual and their last layer starts at zero. So before training s = q and u_j = e_j: the
policy *is* nearest neighbours with a temperature, and REINFORCE (train_rl.py) has to improve on the
strongest simple baseline instead of finding it again. (Not drawn: a learned factor for each half of s, the
instruction's and the input's, 1 at first.) Prompts are embedded, not indexed: a trained matcher
works on a pool it never saw.

Simplified: the embedding is the LLM's own hidden states, averaged over the instruction and over the input; no
second model. The policy chooses among a few candidates, the nearest prompts, so that it tries each often.

Letters: B queries, P prompts of the pool, C width of the LLM, 2 C of an embedding, m picks.

Try: python sample.py --pool data/example_pool.jsonl --prompt "Write the order code." --input "7 red tables"
"""
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.instructions import Record, check_record, length_sorted_batches, read_records
from data.tokenizer import Tokenizer
from lora import load_adapter, load_tensors, merge, pack, quantize, save_json, save_tensors
from model import Transformer, fingerprint, pad, read_json
from model import load as load_base

# The share of the instruction's cosine in "nearest"; the input's is the rest. At 0.5 the nearest prompt is of
# the query's task for 78% of val, at 0.95 for 98%, and between the prompts of a task the input decides.
INSTRUCTION = 0.95


# ---- the LLM, which embeds and answers --------------------------------------------------------------------

def load_tuned(base: str | Path, adapter: str, template: str, dtype: torch.dtype,
               device: str) -> tuple[Transformer, str]:
    """(base + adapter merged and frozen, an id of these weights); adapter "none" is the bare base.

    The base is made int8 first if the adapter was trained so: it corrects that rounding and no other.
    """
    model, identity = load_base(base, dtype, device), fingerprint(base)
    if adapter != "none":
        ours = Path(adapter) / "nanopillow.json"
        if ours.exists() and read_json(ours, int8=bool)["int8"]:
            quantize(model)
        load_adapter(model, adapter, identity, template)
        merge(model)
        files = [Path(adapter, f"adapter_{name}") for name in ("config.json", "model.safetensors")]
        identity += hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    pack(model)
    return model, identity


# ---- embeddings ------------------------------------------------------------------------------------------

@torch.no_grad()
def embed(model: Transformer, texts: Sequence[Sequence[list[int]]], batch_size: int = 16) -> Tensor:
    """Texts as parts of token ids, read as one -> the means of each part's last hidden states, side by side
    (N, parts C), fp32 on the CPU. An empty part repeats the one before; what is longer than the context is
    known by its beginning."""
    joined = [sum(parts, [])[:model.config.max_position_embeddings] for parts in texts]
    n_parts = len(texts[0]) if texts else 1
    vectors = torch.zeros(len(texts), n_parts, model.config.hidden_size)  # (N, parts, C)
    for batch in length_sorted_batches([len(ids) for ids in joined], batch_size):
        ids, _ = pad([joined[i] for i in batch])  # (B, T)
        hidden = model(ids.to(model.embed_tokens.weight.device)).float().cpu()  # (B, T, C)
        for row, i in enumerate(batch):
            start = 0
            for n, part in enumerate(texts[i]):
                piece = hidden[row, start:min(start + len(part), len(joined[i]))]
                vectors[i, n] = piece.mean(0) if len(piece) else vectors[i, n - 1]
                start += len(part)
    return vectors.flatten(1)


def embed_records(model: Transformer, tokenizer: Tokenizer, records: Sequence[Record]) -> Tensor:
    """A record is known by its question, in two parts, (N, 2 C): what is asked, and of what. Query and prompt
    are embedded alike, the prompt's answer plays no part. In one mean over both the input's words, which are
    more, drown the instruction's. Without the template's headers, which are the same for all (measured: as
    good, at half the tokens)."""
    return embed(model, [(tokenizer.bos + tokenizer.encode(r["instruction"] + "\n"),
                          tokenizer.encode(r["input"].strip())) for r in records])


# ---- the policy ------------------------------------------------------------------------------------------

class Tower(nn.Module):
    """x -> x[:width] + MLP(x), whose last layer starts at zero. Not normalised: a prompt that helps whoever
    asks may grow longer, and with it all its scores."""

    def __init__(self, n_in: int, width: int, hidden: int, generator: torch.Generator | None):
        super().__init__()
        self.up, self.down, self.width = nn.Linear(n_in, hidden), nn.Linear(hidden, width), width
        with torch.no_grad():
            self.up.weight.copy_((torch.rand(hidden, n_in, generator=generator) * 2 - 1) / n_in**0.5)
            self.up.bias.zero_()
            self.down.weight.zero_()
            self.down.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:  # (.., n_in) -> (.., width)
        return x[..., :self.width] + self.down(F.relu(self.up(x)))


class Matcher(nn.Module):
    """Two towers, a learned factor for each half of the state (1 at first), and the embedded pool (P, 2 C).

    The pool's mean and deviation standardise every embedding, of other pools too. It is stored with the
    towers, so that it need not be embedded again; they know no prompt by its number.

    candidates: of the whole pool the policy chooses among this many nearest prompts (default: all).
    """

    def __init__(self, pool: Tensor, hidden: int = 128, scale: float = 50.0, candidates: int = 1 << 20,
                 generator: torch.Generator | None = None):
        super().__init__()
        width = pool.size(1)
        self.register_buffer("pool", pool)
        # Hidden states of an LLM share a large common part; without this all cosines are near 1.
        self.register_buffer("mean", pool.mean(0), persistent=False)  # both follow from the stored pool
        self.register_buffer("deviation", pool.std(0, unbiased=False).clamp(min=1e-3), persistent=False)
        self.prompt_tower = Tower(width, width, hidden, generator)
        self.state_tower = Tower(2 * width, width, hidden, generator)
        self.log_factors = nn.Parameter(torch.zeros(2))  # of instruction and input: RL may weigh them anew
        self.scale = scale  # softmax over cosine * scale: a flat start samples bad prompts and loses ground
        self.candidates = min(candidates, 1 << 20)  # read_json takes no whole numbers of 2^24 and more

    def standardise(self, embedding: Tensor) -> Tensor:
        """-> (.., 2 C), of length 1: a product of two is INSTRUCTION * the instructions' cosine + the rest *
        the inputs'. A half that does not vary in the pool is rounding noise, and eps keeps it small (others
        are near sqrt(C) = 24 long)."""
        halves = ((embedding - self.mean) / self.deviation).unflatten(-1, (2, -1))  # (.., 2, C)
        halves = F.normalize(halves, dim=-1, eps=1.0)
        shares = halves.new_tensor([[INSTRUCTION], [1 - INSTRUCTION]])  # (2, 1)
        return (halves * shares.sqrt()).flatten(-2)

    def episodes(self, query: Tensor, pool: Tensor, m: int, picks: Tensor | None = None, greedy: bool = False,
                 blocked: Tensor | None = None,
                 generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """query (B, 2 C), pool (P, 2 C) -> picks (B, m), log-probability of the episode (B), entropy (B).

        With `picks` it scores those instead of drawing, so acting and learning share one expression. The
        log-probability is the sum of the *sequential* steps: what was picked is masked and the softmax is
        taken over the rest, so that with an unchanged state the second has p(b) / (1 - p(a)). (PromptPG draws
        so too, but sums log p(a) + log p(b), which can flip a gradient's sign.) Entropy is divided by the log
        of the number of choices: 1 is uniform.
        blocked (B, P): never pick.
        """
        if query.size(1) != len(self.mean):
            raise ValueError(f"the matcher is for embeddings {len(self.mean)} wide, the model's have "
                             f"{query.size(1)}; train a matcher for this model.")
        query, pool = self.standardise(query), self.standardise(pool)
        if blocked is None:
            blocked = torch.zeros(len(query), len(pool), dtype=torch.bool)
        if (~blocked).sum(1).min() < m:
            raise ValueError(f"the pool has {len(pool)} prompts, too few to pick {m} a query; lower --m.")
        taken = blocked  # (B, P), true: not to be picked (blocked, no candidate or, later, picked already)
        if self.candidates < len(pool):
            near = (query @ pool.T).masked_fill(blocked, -torch.inf).topk(max(m, self.candidates)).indices
            taken = blocked | torch.ones_like(blocked).scatter(1, near, False)
        wanted, prompts = (~taken).any(0), torch.zeros_like(pool)  # (P), (P, 2 C)
        prompts[wanted] = self.prompt_tower(pool[wanted])  # u_j; 0 where no query may pick j: masked below
        drawn, log_prob, entropy = [], 0.0, 0.0
        picked_sum = torch.zeros_like(query)  # (B, 2 C); with m = 1 it stays so
        for step in range(m):
            state = self.state_tower(torch.cat((query, picked_sum / max(1, step)), dim=-1))  # s (B, 2 C)
            factors = self.scale * self.log_factors.exp()  # (2)
            weighed = state.unflatten(-1, (2, -1)) * factors[:, None]  # (B, 2, C)
            logits = (weighed.flatten(-2) @ prompts.T).masked_fill(taken, -torch.inf)  # (B, P)
            log_probs = logits.log_softmax(-1)  # (B, P)
            if picks is not None:
                pick = picks[:, step]
            elif greedy:
                pick = log_probs.argmax(-1)
            else:
                pick = torch.multinomial(log_probs.exp(), 1, generator=generator).squeeze(-1)  # (B)
            log_prob = log_prob + log_probs.gather(1, pick[:, None]).squeeze(1)
            # Masked before the product: 0 * -inf is NaN, and masked after it stays NaN in the gradient.
            plogp = log_probs.exp() * log_probs.masked_fill(taken, 0.0)
            entropy = entropy - plogp.sum(1) / (~taken).sum(1).clamp(min=2).log() / m
            taken = taken.scatter(1, pick[:, None], True)
            picked_sum = picked_sum + pool[pick]
            drawn.append(pick)
        return torch.stack(drawn, dim=1), log_prob, entropy


# ---- what the policy is compared with --------------------------------------------------------------------

def knn(query: Tensor, pool: Tensor, m: int, blocked: Tensor | None = None) -> Tensor:
    """The m prompts nearest to each query: by construction the untrained policy, taken greedily. (B, m)"""
    with torch.no_grad():
        return Matcher(pool, hidden=1).episodes(query, pool, m, greedy=True, blocked=blocked)[0]


def bm25(queries: Sequence[Record], pool: Sequence[Record], m: int, blocked: Tensor) -> Tensor:
    """The m prompts that share the most telling words with each query (Okapi BM25, k1 1.5, b 0.75). (B, m)"""
    def words(record: Record) -> Counter:
        return Counter(re.findall(r"\w+", f"{record['instruction']} {record['input']}".lower()))
    prompts = [words(p) for p in pool]
    mean = sum(p.total() for p in prompts) / len(pool)
    holders = Counter(word for p in prompts for word in p)  # in how many prompts a word stands
    rarity = {word: math.log(1 + (len(pool) - n + 0.5) / (n + 0.5)) for word, n in holders.items()}
    scores = [[sum(rarity[w] * p[w] * 2.5 / (p[w] + 1.5 * (0.25 + 0.75 * p.total() / mean))
                   for w in query.keys() & p.keys()) for p in prompts] for query in map(words, queries)]
    return torch.tensor(scores).masked_fill(blocked, -1).topk(m).indices


def random_picks(n_queries: int, n_prompts: int, m: int, generator: torch.Generator,
                 blocked: Tensor | None = None) -> Tensor:
    """m different prompts for each query, each set equally likely; blocked (B, P): never pick. (B, m)"""
    order = torch.rand(n_queries, n_prompts, generator=generator)
    return (order if blocked is None else order.masked_fill(blocked, 2)).argsort(1)[:, :m]


def same_question(queries: Sequence[Record], pool: Sequence[Record]) -> Tensor:
    """(B, P), true where the prompt is the query itself: its answer would stand before the question."""
    keys = [(p["instruction"], p["input"]) for p in pool]
    same = [[(q["instruction"], q["input"]) == key for key in keys] for q in queries]
    return torch.tensor(same, dtype=torch.bool)


# ---- files -----------------------------------------------------------------------------------------------

def read_pool(path: str | Path) -> list[Record]:
    """The prompts of a file, each once: a twin would be a second pick that says nothing new."""
    records = read_records(path)
    pool = list({tuple(r.values()): r for r in records}.values())
    if len(pool) < len(records):
        print(f"({path}: {len(records) - len(pool)} of {len(records)} prompts are there twice, left out)")
    return pool


def save(matcher: Matcher, folder: str | Path, pool: Sequence[Record], m: int, model_id: str,
         **notes) -> None:
    """matcher.safetensors and matcher.json, which holds the pool's records: half of a policy."""
    folder = Path(folder)
    # a run killed between the two files must not show the prompts of an older run's pool
    save_tensors(matcher.state_dict(), folder / "matcher.safetensors",
                 {"made": fit_together(pool, model_id, m, matcher.scale, matcher.candidates, INSTRUCTION)})
    save_json({"m": m, "hidden": matcher.prompt_tower.up.out_features, "scale": matcher.scale,
               "candidates": matcher.candidates, "model_id": model_id, **notes, "pool": list(pool)},
              folder / "matcher.json")


def fit_together(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def load(folder: str | Path, model_id: str) -> tuple[Matcher, list[Record], int]:
    """(matcher, its pool, m); ValueError if it was trained with another model's embeddings."""
    folder = Path(folder)
    if not (folder / "matcher.json").exists():
        raise FileNotFoundError(f"{folder / 'matcher.json'} is missing; run python train_rl.py first.")
    meta = read_json(folder / "matcher.json", m=int, hidden=int, scale=float, candidates=int,
                     model_id=str, pool=list)
    if meta["model_id"] != model_id:
        raise ValueError(f"{folder}: the matcher was trained on embeddings of model {meta['model_id']}, this "
                         f"is {model_id}; use the same --base and adapter, or train again.")
    file = folder / "matcher.safetensors"
    tensors, made = load_tensors(file)
    pool = [check_record(r, f"{folder}/matcher.json: record {n}") for n, r in enumerate(meta["pool"], 1)]
    facts = meta["m"], meta["scale"], meta["candidates"], INSTRUCTION
    if made.get("made", "") not in ("", fit_together(pool, model_id, *facts)):
        raise ValueError(f"{file}: of another run (or INSTRUCTION) than matcher.json; run train_rl.py again.")
    vectors, bias = tensors.get("pool", torch.zeros(0)), tensors.get("prompt_tower.up.bias", torch.zeros(0))
    if vectors.dim() != 2 or [len(vectors), *bias.shape] != [len(pool), meta["hidden"]] or (
            not all(tensor.isfinite().all() for tensor in tensors.values())):
        raise ValueError(f"{file}: pool or towers do not fit matcher.json, or are not finite; train again.")
    matcher = Matcher(vectors, meta["hidden"], meta["scale"], meta["candidates"])
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in matcher.state_dict().items()}:
        raise ValueError(f"{file}: tensors do not fit matcher.json; train again.")
    matcher.load_state_dict(tensors)
    return matcher.eval(), pool, meta["m"]
