"""The matching network: which prompts of the user's pool to put before a query (paper, section 3.2).

An episode has m steps. At each step the policy sees the state, which is the query and the prompts picked so
far, and picks one more prompt. The LLM then reads the picked prompts, in that order, and the query.

    prompt j --frozen LLM--> e_j --prompt MLP--> u_j \\
                                                      scale * <s, u_j> -> softmax over those not yet picked
    query    --frozen LLM--> q  --state MLP----> s   /                    and among the nearest candidates
    mean of the picked e_j ------^

Both MLPs are residual and their last layer starts at zero. So at step 0 s = q and u_j = e_j: the policy *is*
nearest neighbours with a temperature, and REINFORCE (train_rl.py) is judged by what it adds to that strong
baseline. (Not drawn: a learned factor for each half of s, the instruction's and the input's; 1 at step 0.)
Prompts are embedded, not numbered, so a trained matcher works on a pool that it never saw.

Simplified: no second model. The embedding is the LLM's own hidden states, averaged over the instruction and
over the input. The policy chooses among a few candidates, the nearest prompts, so that it tries each often.

Letters: B queries, P prompts of the pool, C width of the LLM, 2 C of an embedding, m picks.

Try: python sample.py --pool data/example_pool.jsonl --prompt "Write the order code." --input "7 red tables"
"""
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import read_json, read_metadata, read_tensors, save_json, save_tensors
from data.instructions import Record, check_record, length_sorted_batches, read_records
from data.tokenizer import Tokenizer
from model import Transformer, pad

# The instruction's share of what "nearest" means; the input has the rest. At 0.5 the nearest prompt is of the
# query's task for 78% of val, at 0.95 for 98%. Between prompts of one task the input decides.
INSTRUCTION = 0.95


# ---- embeddings ------------------------------------------------------------------------------------------

@torch.no_grad()
def embed(model: Transformer, texts: Sequence[Sequence[list[int]]], batch_size: int = 16) -> Tensor:
    """Texts, each a list of parts of token ids -> the mean of the last hidden states of each part, side by
    side (N, parts C), fp32 on the CPU.

    The parts of a text are read as one. An empty part repeats the one before it. Of a text longer than the
    context only the beginning counts.
    """
    joined = [sum(parts, [])[:model.config.max_position_embeddings] for parts in texts]
    n_parts = len(texts[0]) if texts else 1
    vectors = torch.zeros(len(texts), n_parts, model.config.hidden_size)  # (N, parts, C)
    for batch in length_sorted_batches([len(ids) for ids in joined], batch_size):
        ids, _ = pad([joined[i] for i in batch])  # (B, T)
        hidden = model(ids.to(model.embed_tokens.weight.device)).float().cpu()  # (B, T, C)
        for row, i in enumerate(batch):
            start = 0
            for n, part in enumerate(texts[i]):
                piece = hidden[row, start:min(start + len(part), len(joined[i]))]  # (T of this part, C)
                vectors[i, n] = piece.mean(0) if len(piece) else vectors[i, n - 1]
                start += len(part)
    return vectors.flatten(1)


def embed_records(model: Transformer, tokenizer: Tokenizer, records: Sequence[Record]) -> Tensor:
    """(N, 2 C): what is asked, and of what. A single mean would be dominated by the input, which is longer.

    Queries and prompts are embedded in the same way: a prompt's answer plays no part. The template's headers
    are left out. They are the same for all records and would double the tokens.
    """
    return embed(model, [(tokenizer.bos + tokenizer.encode(r["instruction"] + "\n"),
                          tokenizer.encode(r["input"].strip())) for r in records])


# ---- the policy ------------------------------------------------------------------------------------------

class ResidualMLP(nn.Module):
    """x -> x[:width] + MLP(x), whose last layer starts at zero. Outputs are not normalised, so a generally
    useful prompt can raise its score for every query."""

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
    """The two MLPs, a learned factor for each half of the state, and the embedded pool (P, 2 C).

    candidates: the policy chooses among this many nearest prompts (default: the whole pool). logit_scale: the
    softmax is over cosine * logit_scale; a flat start draws bad prompts and loses ground.
    """

    def __init__(self, pool: Tensor, hidden: int = 128, logit_scale: float = 50.0, candidates: int = 1 << 20,
                 generator: torch.Generator | None = None):
        super().__init__()
        width = pool.size(1)
        self.register_buffer("pool", pool)
        # Hidden states of an LLM have a large part in common; without standardising all cosines are near 1.
        # Other pools are standardised by the same numbers, which follow from the stored pool.
        self.register_buffer("mean", pool.mean(0), persistent=False)  # (2 C)
        self.register_buffer("std", pool.std(0, unbiased=False).clamp(min=1e-3), persistent=False)  # (2 C)
        self.prompt_mlp = ResidualMLP(width, width, hidden, generator)
        self.state_mlp = ResidualMLP(2 * width, width, hidden, generator)
        self.log_factors = nn.Parameter(torch.zeros(2))  # of instruction and input: RL may weigh them anew
        self.logit_scale, self.candidates = logit_scale, min(candidates, 1 << 20)

    def standardise(self, embedding: Tensor) -> Tensor:
        """(.., 2 C) -> (.., 2 C) of length 1. A product of two is INSTRUCTION * the instructions' cosine +
        the rest * the inputs'. eps = 1: a half that is constant in the pool has only rounding noise and stays
        near 0; any other has a length of about sqrt(C) = 24."""
        halves = ((embedding - self.mean) / self.std).unflatten(-1, (2, -1))  # (.., 2, C)
        halves = F.normalize(halves, dim=-1, eps=1.0)
        shares = halves.new_tensor([[INSTRUCTION], [1 - INSTRUCTION]])  # (2, 1)
        return (halves * shares.sqrt()).flatten(-2)

    def act(self, query: Tensor, pool: Tensor, m: int, picks: Tensor | None = None, greedy: bool = False,
            generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """query (B, 2 C), pool (P, 2 C) -> picks (B, m), each step's log-probability (B, m), entropy (B).

        With `picks` it scores those instead of drawing. An episode's log-probability is the sum of its
        *sequential* steps: what was picked is masked and the softmax is over the rest. (PromptPG draws in the
        same way, but sums log p(a) + log p(b) of one softmax, which can flip a gradient's sign.) Entropy is
        divided by the log of the number of choices: 1 is uniform. From the second step on it depends on the
        picks drawn.
        """
        if query.size(1) != len(self.mean):
            raise ValueError(f"the matcher is for embeddings of width {len(self.mean)}, but the model's have "
                             f"{query.size(1)}; train a matcher for this model.")
        query, pool = self.standardise(query), self.standardise(pool)
        near = (query @ pool.T).topk(min(len(pool), max(m, self.candidates))).indices  # (B, candidates)
        mask = torch.ones(len(query), len(pool), dtype=torch.bool).scatter(1, near, False)  # (B, P)
        used, prompts = near.unique(), torch.zeros_like(pool)
        prompts[used] = self.prompt_mlp(pool[used])  # u_j (P, 2 C); 0 will do for those that are masked
        drawn, log_probs, entropy = [], [], 0.0
        picked_sum = torch.zeros_like(query)  # (B, 2 C)
        for step in range(m):
            state = self.state_mlp(torch.cat((query, picked_sum / max(1, step)), dim=-1))  # s (B, 2 C)
            factors = self.logit_scale * self.log_factors.exp()  # (2)
            state = (state.unflatten(-1, (2, -1)) * factors[:, None]).flatten(-2)  # (B, 2 C)
            step_log_probs = (state @ prompts.T).masked_fill(mask, -torch.inf).log_softmax(-1)  # (B, P)
            if picks is not None:
                pick = picks[:, step]
            elif greedy:
                pick = step_log_probs.argmax(-1)
            else:
                pick = torch.multinomial(step_log_probs.exp(), 1, generator=generator).squeeze(-1)  # (B)
            log_probs.append(step_log_probs.gather(1, pick[:, None]).squeeze(1))
            # TRAP: 0 * -inf is NaN, and masked after the product it stays NaN in the gradient
            plogp = step_log_probs.exp() * step_log_probs.masked_fill(mask, 0.0)  # (B, P)
            entropy = entropy - plogp.sum(1) / (~mask).sum(1).clamp(min=2).log() / m
            mask = mask.scatter(1, pick[:, None], True)
            picked_sum = picked_sum + pool[pick]
            drawn.append(pick)
        return torch.stack(drawn, dim=1), torch.stack(log_probs, dim=1), entropy


@torch.no_grad()
def nearest(query: Tensor, pool: Tensor, m: int) -> Tensor:
    """The m prompts nearest to each query: by construction the untrained policy, taken greedily. (B, m)"""
    return Matcher(pool, hidden=1).act(query, pool, m, greedy=True)[0]


# ---- files -----------------------------------------------------------------------------------------------

def read_pool(path: str | Path, queries: Sequence[Record] = ()) -> list[Record]:
    """The prompts of a file, each once: a copy would be a pick that says nothing new. A prompt that asks what
    one of `queries` asks is left out: its answer would stand before the question."""
    asked, records = {(q["instruction"], q["input"]) for q in queries}, read_records(path)
    pool = {tuple(r.values()): r for r in records if (r["instruction"], r["input"]) not in asked}
    if len(pool) < len(records):
        print(f"({path}: {len(records) - len(pool)} of {len(records)} prompts are left out: copies of others "
              "or questions of queries)")
    return list(pool.values())


def run_id(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()[:16]


def save(matcher: Matcher, folder: str | Path, pool: Sequence[Record], m: int, model_id: str,
         **notes) -> None:
    """matcher.safetensors and matcher.json. The pool is stored too: a policy is only half without it."""
    meta = {"m": m, "hidden": matcher.prompt_mlp.up.out_features, "width": matcher.pool.size(1),
            "logit_scale": matcher.logit_scale, "candidates": matcher.candidates,
            "instruction": INSTRUCTION, "model_id": model_id, "pool": list(pool)}
    # A run that is killed between the two files must not pair new weights with an older run's pool.
    save_tensors(matcher.state_dict(), Path(folder, "matcher.safetensors"), {"run_id": run_id(meta)})
    save_json(meta | notes, Path(folder, "matcher.json"))


def load(folder: str | Path, model_id: str) -> tuple[Matcher, list[Record], int]:
    """(matcher, its pool, m). ValueError if it was trained on another model's embeddings."""
    file, weights = Path(folder, "matcher.json"), Path(folder, "matcher.safetensors")
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; run python train_rl.py first.")
    kinds = {"m": int, "hidden": int, "width": int, "logit_scale": float, "candidates": int,
             "instruction": float, "model_id": str, "pool": list}
    raw = read_json(file, **kinds)
    meta = {field: raw[field] for field in kinds}
    if meta["model_id"] != model_id:
        raise ValueError(f"{folder}: the matcher was trained on embeddings of model {meta['model_id']}, but "
                         f"this is {model_id}; use the same --base and --adapter, train again, or "
                         "take the nearest prompts with --matcher none.")
    pool = [check_record(r, f"{file}: record {n}") for n, r in enumerate(meta["pool"], 1)]
    if meta["instruction"] != INSTRUCTION:
        raise ValueError(f"{file}: trained with INSTRUCTION = {meta['instruction']}, but it is {INSTRUCTION} "
                         "now; train the matcher again.")
    if read_metadata(weights).get("run_id") != run_id(meta):
        raise ValueError(f"{weights}: not of the run that wrote matcher.json; run train_rl.py again.")
    with torch.device("meta"):
        matcher = Matcher(torch.empty(len(pool), meta["width"]), meta["hidden"])
    tensors = dict(read_tensors([weights], matcher.state_dict(), "train the matcher again"))
    matcher = Matcher(tensors["pool"], meta["hidden"], meta["logit_scale"], meta["candidates"])
    matcher.load_state_dict(tensors)
    return matcher.eval(), pool, meta["m"]
