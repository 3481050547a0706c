"""The matching network: which prompts of the user's pool to put before a query (paper, section 3.2).

An episode has m steps. At each step the policy sees the state, which is the query and the prompts picked so
far, and picks one more prompt. The LLM then reads the picked prompts, in that order, and the query.

    prompt j --frozen LLM--> e_j --prompt MLP--> u_j \\
                                                      scale * <s, u_j> + usefulness of j -> softmax over those
    query    --frozen LLM--> q  --state MLP----> s   /    not yet picked and among the nearest candidates
    mean of the picked e_j ------^

    usefulness of j = - trust * doubts_j

What REINFORCE (train_rl.py) can learn here: which query goes with which prompt (the MLPs, and a factor for
each part of s); and which prompts are any good, namely how far to believe the LLM's own doubts about a prompt
(trust): its surprise at the prompt's answer, and whether the answer only repeats the input. All of it starts
at zero: the MLPs are residual, with a last layer of zeros, so at step 0 s = q and u_j = e_j. The policy then
*is* nearest neighbours with a temperature, and RL is judged by what it adds to that strong baseline. Prompts
are embedded, not numbered, so a trained matcher works on a pool that it never saw.

Simplified: no second model. The embedding is the LLM's own hidden states at a third of its depth. The policy
chooses among a few candidates, the nearest prompts, so that it tries each often.

Letters: B queries, P prompts of the pool, C width of the LLM, V parts of a text (E = V C), m picks.

Try: python sample.py --pool data/example_pool.jsonl --prompt "Write the order code." --input "7 red tables"
"""
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import read_json, read_metadata, read_tensors, save_json, save_tensors
from data.instructions import query_text, training_example
from data.records import Record, check_record
from data.samples import collate, length_sorted_batches
from data.tokenizer import Tokenizer
from model import Transformer, pad

# Each part's share of what "nearest" means: the text in question (the input, or the instruction if there is
# no input), and the header of the answer, where the LLM has read all and is about to answer.
SHARES = (0.4, 0.6)


# ---- embeddings ------------------------------------------------------------------------------------------

@torch.no_grad()
def embed(model: Transformer, texts: Sequence[Sequence[list[int]]], depth: int | None = None,
          batch_size: int = 16) -> Tensor:
    """Texts, each a list of V parts of token ids -> the mean hidden state of each part after `depth` layers
    (default: all), side by side (N, V C), fp32 on the CPU.

    The parts of a text are read as one. An empty part repeats the one before it. Of a text longer than the
    context only the beginning counts.
    """
    joined = [sum(parts, [])[:model.config.max_position_embeddings] for parts in texts]
    n_parts = len(texts[0]) if texts else 1
    vectors = torch.zeros(len(texts), n_parts, model.config.hidden_size)  # (N, V, C)
    for batch in length_sorted_batches([len(ids) for ids in joined], batch_size):
        ids, _ = pad([joined[i] for i in batch])  # (B, T)
        hidden = model(ids.to(model.embed_tokens.weight.device), depth=depth).float().cpu()  # (B, T, C)
        for row, i in enumerate(batch):
            start = 0
            for n, part in enumerate(texts[i]):
                piece = hidden[row, start:min(start + len(part), len(joined[i]))]  # (T of this part, C)
                vectors[i, n] = piece.mean(0) if len(piece) else vectors[i, n - 1]
                start += len(part)
    return vectors.flatten(1)


def embed_records(model: Transformer, tokenizer: Tokenizer, records: Sequence[Record]) -> Tensor:
    """(N, E): the text in question, and what the LLM is about to do with it. Queries and prompts are embedded
    in the same way: a prompt's answer plays no part.

    A third of the layers: the last ones are about the next token, not about the text, and find the right task
    less often.
    """
    texts = []
    for record in records:
        question, header = query_text(record).rsplit("### ", 1)
        instruction, *content = re.split("(### Input:\n)", question, maxsplit=1)
        parts = [tokenizer.encode(text) for text in (instruction, "".join(content), "### " + header)]
        texts.append([tokenizer.bos + parts[0], *parts[1:]])
    vectors = embed(model, texts, depth=math.ceil(len(model.layers) / 3))  # (N, 3 C)
    return vectors[:, model.config.hidden_size:]  # an empty input has repeated the instruction's part


@torch.no_grad()
def doubts(model: Transformer, tokenizer: Tokenizer, records: Sequence[Record]) -> Tensor:
    """(P, 2), what speaks against a prompt: the LLM's surprise at its answer (mean negative log-likelihood of
    the answer's tokens, in nats), as in Local Perplexity Ranking (arXiv 2405.17264); and 1 if the answer only
    repeats the input. A copy hardly surprises an LLM, so surprise alone would praise it."""
    found, device = torch.zeros(len(records), 2), model.embed_tokens.weight.device
    limit = model.config.max_position_embeddings
    examples = [training_example(tokenizer, [record], limit) for record in records]
    for batch in length_sorted_batches([len(ids) for ids, _ in examples], 16):
        ids, targets = collate([(examples[i][0][:limit], examples[i][1][:limit]) for i in batch])  # (B, T)
        rows, columns = (targets >= 0).nonzero(as_tuple=True)  # (N) each: where there is an answer
        # The head sees those N only: logits of all B x T positions would be the largest tensor of a run.
        logits = model.logits(model(ids.to(device))[rows, columns]).float()  # (N, V)
        loss = F.cross_entropy(logits, targets[rows, columns].to(device), reduction="none").cpu()  # (N)
        found[batch, 0] = torch.zeros(len(batch)).index_add(0, rows, loss) / rows.bincount(
            minlength=len(batch)).clamp(min=1)
    found[:, 1] = torch.tensor([float(r["output"].strip() == r["input"].strip()) for r in records])
    return found


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
    """The two MLPs, a factor for each part of the state, the trust, and the pool: its embeddings (P, E) and
    doubts (P, 2).

    candidates: the policy chooses among this many nearest prompts (default: the whole pool). logit_scale: the
    softmax is over cosine * logit_scale; a flat start draws bad prompts and loses ground.
    """

    def __init__(self, pool: Tensor, hidden: int = 128, logit_scale: float = 20.0, candidates: int = 1 << 20,
                 generator: torch.Generator | None = None, doubts: Tensor | None = None):
        super().__init__()
        width = pool.size(1)
        self.register_buffer("pool", pool)
        self.register_buffer("doubts", torch.zeros(len(pool), 2) if doubts is None else doubts)
        # Hidden states of an LLM have a large part in common; without standardising all cosines are near 1.
        # Other pools are standardised by the same numbers, which follow from the stored pool.
        self.register_buffer("mean", pool.mean(0), persistent=False)  # (E)
        self.register_buffer("std", pool.std(0, unbiased=False).clamp(min=1e-3), persistent=False)  # (E)
        self.prompt_mlp = ResidualMLP(width, width, hidden, generator)
        self.state_mlp = ResidualMLP(2 * width, width, hidden, generator)
        self.log_factors = nn.Parameter(torch.zeros(len(SHARES)))  # RL may weigh the parts of a text anew
        self.trust = nn.Parameter(torch.zeros(2))
        self.logit_scale, self.candidates = logit_scale, min(candidates, 1 << 20)

    def use_pool(self, pool: Tensor, doubts: Tensor) -> None:
        """From now on the policy picks from this pool (P, E), doubts (P, 2)."""
        self.pool, self.doubts = pool, doubts

    def usefulness(self) -> Tensor:
        """What a prompt's score holds whatever the query is (P)."""
        return -self.doubts @ self.trust

    def standardise(self, embedding: Tensor) -> Tensor:
        """(.., E) -> (.., E) of length 1: a product of two is the mean of their parts' cosines, weighed by
        SHARES. eps = 1: a part that is constant in the pool has only rounding noise and stays near 0; any
        other has a length of about sqrt(C) = 24."""
        parts = ((embedding - self.mean) / self.std).unflatten(-1, (len(SHARES), -1))  # (.., V, C)
        parts = F.normalize(parts, dim=-1, eps=1.0)
        return (parts * parts.new_tensor(SHARES)[:, None].sqrt()).flatten(-2)

    def act(self, query: Tensor, m: int, picks: Tensor | None = None, greedy: bool = False,
            generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """query (B, E) -> picks (B, m), each step's log-probability (B, m), entropy (B).

        With `picks` it scores those instead of drawing. An episode's log-probability is the sum of its
        *sequential* steps: what was picked is masked and the softmax is over the rest. (PromptPG draws in the
        same way, but sums log p(a) + log p(b) of one softmax, which can flip a gradient's sign.) Entropy is
        divided by the log of the number of choices: 1 is uniform. From the second step on it depends on the
        picks drawn.
        """
        if query.size(1) != len(self.mean):
            raise ValueError(f"the matcher is for embeddings of width {len(self.mean)}, but the model's have "
                             f"{query.size(1)}; train a matcher for this model.")
        query, pool = self.standardise(query), self.standardise(self.pool)
        near = (query @ pool.T).topk(min(len(pool), max(m, self.candidates))).indices  # (B, candidates)
        mask = torch.ones(len(query), len(pool), dtype=torch.bool).scatter(1, near, False)  # (B, P)
        used, prompts = near.unique(), torch.zeros_like(pool)
        prompts[used] = self.prompt_mlp(pool[used])  # u_j (P, E); 0 will do for those that are masked
        drawn, log_probs, entropy, usefulness = [], [], 0.0, self.usefulness()
        picked_sum = torch.zeros_like(query)  # (B, E)
        for step in range(m):
            state = self.state_mlp(torch.cat((query, picked_sum / max(1, step)), dim=-1))  # s (B, E)
            factors = self.logit_scale * self.log_factors.exp()  # (V)
            state = (state.unflatten(-1, (len(factors), -1)) * factors[:, None]).flatten(-2)  # (B, E)
            scores = state @ prompts.T + usefulness  # (B, P)
            step_log_probs = scores.masked_fill(mask, -torch.inf).log_softmax(-1)  # (B, P)
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
    return Matcher(pool, hidden=1).act(query, m, greedy=True)[0]


# ---- files -----------------------------------------------------------------------------------------------

def run_id(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()[:16]


def save(matcher: Matcher, folder: str | Path, pool: Sequence[Record], m: int, model_id: str,
         **notes) -> None:
    """matcher.safetensors and matcher.json. The pool is stored too: a policy is only half without it."""
    meta = {"m": m, "hidden": matcher.prompt_mlp.up.out_features, "width": matcher.pool.size(1),
            "logit_scale": matcher.logit_scale, "candidates": matcher.candidates,
            "shares": list(SHARES), "model_id": model_id, "pool": list(pool)}
    # A run that is killed between the two files must not pair new weights with an older run's pool.
    save_tensors(matcher.state_dict(), Path(folder, "matcher.safetensors"), {"run_id": run_id(meta)})
    save_json(meta | notes, Path(folder, "matcher.json"))


def load(folder: str | Path, model_id: str) -> tuple[Matcher, list[Record], int]:
    """(matcher, its pool, m). ValueError if it was trained on another model's embeddings."""
    file, weights = Path(folder, "matcher.json"), Path(folder, "matcher.safetensors")
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; run python train_rl.py first, with --out_dir {folder} "
                                "and this --base and --adapter.")
    kinds = {"m": int, "hidden": int, "width": int, "logit_scale": float, "candidates": int,
             "shares": list, "model_id": str, "pool": list}
    raw = read_json(file, **kinds)
    meta = {field: raw[field] for field in kinds}
    if meta["model_id"] != model_id:
        raise ValueError(f"{folder}: the matcher was trained for another base or adapter (run.json there "
                         "names them); use the same ones, train it again, or take the nearest prompts with "
                         "--matcher none.")
    pool = [check_record(r, f"{file}: record {n}") for n, r in enumerate(meta["pool"], 1)]
    if meta["shares"] != list(SHARES):
        raise ValueError(f"{file}: trained with SHARES = {meta['shares']}, but they are {list(SHARES)} now; "
                         "train the matcher again.")
    if read_metadata(weights).get("run_id") != run_id(meta):
        raise ValueError(f"{weights}: not of the run that wrote matcher.json; run train_rl.py again.")
    with torch.device("meta"):
        matcher = Matcher(torch.empty(len(pool), meta["width"]), meta["hidden"])
    tensors = dict(read_tensors([weights], matcher.state_dict(), "train the matcher again"))
    matcher = Matcher(tensors["pool"], meta["hidden"], meta["logit_scale"], meta["candidates"])
    matcher.load_state_dict(tensors)
    return matcher.eval(), pool, meta["m"]
