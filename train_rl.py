"""REINFORCE trains the matcher: the second half of PILLOW (paper, section 3.2).

The LLM (base + LoRA) is frozen and is part of the environment. For a query q the policy picks prompts a =
(a_1..a_m), the LLM answers with them before q, and the answer's similarity to the reference is the reward
R(q, a). The mean reward J can be climbed with drawn picks, and no gradient goes through the LLM:

    J = E_q sum_a pi(a|q) R(q, a)
    grad J = E_q sum_a R grad pi = E_q E_{a ~ pi} [ R grad log pi(a|q) ]     as grad pi = pi grad log pi
    E_{a ~ pi} [ b grad log pi ] = b grad sum_a pi = b grad 1 = 0            for a b that does not depend on a
    grad J = E_q E [ 1/K sum_k (R_k - b_k) grad log pi(a_k|q) ]              K episodes a_k of each query

where log pi(a|q) is the sum over the m sequential picks. The baseline b_k is the mean reward of the query's
other K - 1 episodes (leave-one-out). They are drawn independently of a_k, so it adds no bias, and it removes
what all of them share: how easy the query is. Without it every drawn pick is reinforced, good or bad, since
R >= 0. With few samples that noise feeds itself and the policy collapses (tests/experiment.py shows it). An
entropy bonus, annealed to zero, keeps the policy exploring.

Simplified: nothing else. No value network, no clipping, no KL. Answers are decoded greedily, so the reward is
a function of (query, picks): each one is computed once and kept on disk, and the same command replays it.

Letters: B queries, P prompts, K episodes of a query, m picks, C width of the LLM, N all queries of a split.

    python train_rl.py                  # needs out/sft, see train_sft.py
    python train_rl.py --pool data/example_pool.jsonl --out_dir out/rl_own
"""
import copy
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.cli import cli, opt

import torch
import torch.nn.functional as F
from torch import Tensor

import matcher as matching
from data import instructions
from data.base_model import ensure_base
from data.device import join_torchrun, main_process_first, pick_device, shared_out
from data.files import save_json
from data.prepare import ensure_data
from data.records import Record, read_pool
from data.runs import RewardFile, command, ignored, open_log, run_record, say_replaced, seen_by
from data.samples import length_sorted_batches
from data.scores import print_harm, print_step, print_table, rouge_l
from data.tokenizer import Tokenizer
from lora import load_tuned
from matcher import Matcher, embed, embed_records
from model import Transformer, generate, prefill


@dataclass
class Settings:
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    adapter: str = opt("out/sft", "folder of the LoRA adapter, or none for the bare base")
    data: str = opt("bigbench", "bigbench, bigbench-clean, alpaca, dolly, or a .json/.jsonl file of your own")
    pool: str = opt("", "file of the prompts to pick from; empty: the data set's own pool")
    out_dir: str = opt("out/rl", "folder for the matcher, the rewards, the log and the table")
    # the policy
    m: int = opt(1, "prompts picked for each query", 1)
    logit_scale: float = opt(20.0, "softmax over cosine * this at the start; below 20 it is too flat", 1e-6)
    candidates: int = opt(16, "nearest prompts to choose among; few, so that each is tried often", 2)
    # REINFORCE
    steps: int = opt(50, "updates; each asks the LLM for up to queries x samples answers", 1)
    queries: int = opt(16, "queries in a step; many queries teach more than many passes over few", 1)
    samples: int = opt(8, "episodes of a query, K; the baseline of one is the mean of the others", 2)
    lr: float = opt(1e-3, "Adam's learning rate, falling to zero; at 3e-3 the policy collapses", 1e-12)
    entropy: float = opt(0.05, "weight of the normalised entropy bonus, falling linearly to zero")
    # the answers
    max_new_tokens: int = opt(48, "longest answer; the default data's answers have at most 160 characters", 1)
    test_queries: int = opt(256, "test queries in the table; 0: all of them")
    seed: int = opt(1337, "seed of the MLPs, the picks, the order of queries and the choice of test queries")
    device: str = opt("auto", "auto (cuda if there is one, else cpu), cpu, cuda or mps")
    dtype: str = opt("auto", "auto (bfloat16 where the machine has it), bfloat16 or float32")


TEXTUAL = 0.5  # ROUGE-L's weight in the reward; the cosine has the rest
FACTORS_LR = 300  # times lr: the factors and the trust, four numbers, serve all queries and may move fast
ROLLOUT_BATCH = 32  # answers generated together
PREFIX_BYTES = 2e9  # prompts' keys and values; of 60 tokens in bf16 1.4 MB for a 135M model, 12 MB for 1.7B
VAL_QUERIES = 160  # the matcher that does best on them is kept
EVAL_EVERY = 10  # steps between validations


# ---- the environment: (query, picks) -> answer -> reward -------------------------------------------------

class Environment:
    """The frozen LLM as REINFORCE sees it. Each (query, picks) is answered once and kept in `file`."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, pool: list[Record], max_new_tokens: int,
                 identity: str, file: Path, judge: "Environment | None" = None):
        self.model, self.tokenizer, self.pool, self.max_new_tokens = model, tokenizer, pool, max_new_tokens
        self.judge = judge or self  # whose LLM embeds answers; one for all rows of a table
        outputs = [p["output"] for p in pool]
        what = json.dumps([identity, instructions.TEMPLATE, max_new_tokens, sorted(tokenizer.ends), outputs])
        self.identity = hashlib.sha256(what.encode()).hexdigest()
        self.blocks = [instructions.prompt_ids(tokenizer, [p]) for p in pool]
        self.groups = length_sorted_batches([len(ids) for ids in self.blocks], 4)  # prefilled together
        self.prefixes: dict[int, Tensor] = {}  # prompt -> its keys and values as the first of an episode
        if self.judge is self:  # cosines are of embeddings standardised by the pool's answers
            answers = embed(model, [[tokenizer.encode(text)] for text in outputs])  # (P, C)
            self.mean, self.std = answers.mean(0), answers.std(0, unbiased=False).clamp(min=1e-3)  # (C)
        self.asked = self.computed = self.shortened = 0
        self.stored = RewardFile(file)
        self.known = self.stored.known  # {key: entry}

    def key(self, query: Record, picks: Sequence[int]) -> str:
        """Everything that an entry depends on, but not this code: if you change generation or scoring, delete
        the file of rewards."""
        prompts = [[instructions.query_text(self.pool[j]), self.pool[j]["output"]] for j in picks]
        texts = [self.identity, instructions.query_text(query), query["output"], prompts]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:24]

    def scores(self, queries: Sequence[Record], picks: Sequence[Sequence[int]]) -> list[dict]:
        """One entry {key, answer, rouge, semantic, exact, prompt_tokens} for each (query, picks)."""
        keys = [self.key(q, p) for q, p in zip(queries, picks, strict=True)]
        todo = {k: (q, p) for k, q, p in zip(keys, queries, picks, strict=True) if k not in self.known}
        self.asked, self.computed = self.asked + len(keys), self.computed + len(todo)
        jobs = []
        for key, (query, picked) in todo.items():
            rest = self.tokenizer.encode(instructions.query_text(query))
            room = self.model.config.max_position_embeddings - self.max_new_tokens
            ids, kept = instructions.join_ids(self.tokenizer, [self.pool[j] for j in picked], rest, room)
            first = picked[-kept] if kept else None  # the first prompt that fits; its block is a prefix
            self.shortened += kept < len(picked)
            jobs.append((key, query, first, ids[len(self.blocks[first]) if kept else 0:]))
        batches = length_sorted_batches([len(ids) for *_, ids in jobs], ROLLOUT_BATCH)
        for entries in shared_out(batches, lambda batch: self.answer([jobs[i] for i in batch])):
            self.stored.add(entries)
        return [self.known[k] for k in keys]

    def answer(self, jobs: list[tuple[str, Record, int | None, list[int]]]) -> list[dict]:
        """One batch of (key, query, first prompt, ids after it) -> entries, rounded as they are stored."""
        keys, queries, firsts, rests = zip(*jobs, strict=True)
        # Nothing stands before a first prompt, so its keys and values serve all queries. They are computed in
        # fixed groups of the pool, so that no bit of them depends on what else is asked for.
        if sum(kv.nbytes for kv in self.prefixes.values()) > PREFIX_BYTES:
            self.prefixes.clear()
        for group in self.groups:
            if set(group) & set(firsts) - self.prefixes.keys():
                self.prefixes |= zip(group, prefill(self.model, [self.blocks[j] for j in group]), strict=True)
        prefixes = [None if j is None else self.prefixes[j] for j in firsts]
        generated = generate(self.model, rests, self.max_new_tokens, self.tokenizer.ends,
                             lambda ids: instructions.at_next_block(self.tokenizer, ids), prefixes)
        answers = [instructions.clean_answer(self.tokenizer, ids) for ids in generated]
        references = [query["output"].strip() for query in queries]
        semantic = self.judge.similarity(answers, references)
        return [{"key": key, "answer": a, "rouge": round(rouge_l(a, r), 6), "semantic": round(cosine, 6),
                 "exact": a == r, "prompt_tokens": len(ids) + (0 if j is None else len(self.blocks[j]))}
                for key, a, r, cosine, ids, j
                in zip(keys, answers, references, semantic, rests, firsts, strict=True)]

    def similarity(self, answers: list[str], references: list[str]) -> list[float]:
        """Cosine of mean-pooled, standardised embeddings, negative ones cut to 0; 1 for equal texts."""
        # Only of this batch: with embeddings kept from earlier ones, a replay could differ in the last bit.
        pairs = [(a, r) for a, r in zip(answers, references, strict=True) if a and a != r]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        vectors = embed(self.model, [[self.tokenizer.encode(t)] for t in texts])  # (texts, C)
        of = dict(zip(texts, F.normalize((vectors - self.mean) / self.std, dim=1), strict=True))
        return [1.0 if a == r else max(0.0, float(of[a] @ of[r])) if a else 0.0
                for a, r in zip(answers, references, strict=True)]

    def rewards(self, queries: Sequence[Record], picks: Sequence[Sequence[int]]) -> Tensor:
        """R(q, a), 0 to 1 (N): the paper's mix of textual and semantic similarity to the reference."""
        entries = self.scores(queries, picks)
        return torch.tensor([TEXTUAL * e["rouge"] + (1 - TEXTUAL) * e["semantic"] for e in entries])


# ---- REINFORCE -------------------------------------------------------------------------------------------

def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards (B, K) -> advantages (B, K): each minus the mean of the query's other K - 1."""
    K = rewards.size(1)
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (K - 1)


def reinforce(matcher: Matcher, queries: dict[str, Tensor],
              reward_fn: Callable[[str, list[int], Tensor], Tensor], s: Settings,
              advantage_fn: Callable[[Tensor], Tensor] = leave_one_out) -> Iterator[dict]:
    """The loop: s.steps updates of the matcher, in place. Yields the metrics of each step; step 0 validates
    the start, which is nearest neighbours.

    queries: the embedded "rl" and "val" (N, E). reward_fn(split, rows, picks (n, m)): the rewards (n) of
    these rows of a split; tests/experiment.py has a table instead of an LLM.
    """
    mlps = [*matcher.prompt_mlp.parameters(), *matcher.state_mlp.parameters()]
    optimizer = torch.optim.Adam([{"params": mlps}, {"params": [matcher.log_factors, matcher.trust]}])
    generator = torch.Generator().manual_seed(s.seed + 1)  # the policy's own; nothing else advances it

    def validate() -> float:
        with torch.no_grad():
            picks, _, _ = matcher.act(queries["val"], s.m, greedy=True)
        return reward_fn("val", list(range(len(picks))), picks).mean().item()

    yield {"step": 0, "val_reward": validate()}
    for step in range(1, s.steps + 1):
        # draw queries: in turn, since they are shuffled; each comes once before any comes twice
        rows = [((step - 1) * s.queries + i) % len(queries["rl"]) for i in range(s.queries)]
        rows = [row for row in rows for _ in range(s.samples)]  # (B K)

        # act: K episodes of each query, drawn from the policy as it is now
        picks, log_probs, entropy = matcher.act(queries["rl"][rows], s.m, generator=generator)
        log_prob = log_probs.sum(1)  # (B K): of the whole episode

        # ask the LLM; no gradient goes through it
        rewards = reward_fn("rl", rows, picks).view(-1, s.samples)  # (B, K)

        # advantage and loss: grad J is the mean of advantage * grad log pi; optimisers descend, hence the
        # minus. For m = 1 the entropy is exact; for m > 1 it is that of the drawn path, and its gradient
        # leaves out how the path was drawn.
        anneal = 1 - (step - 1) / s.steps
        advantages = advantage_fn(rewards).view(-1)  # (B K)
        loss = -(advantages * log_prob).mean() - s.entropy * anneal * entropy.mean()
        if not math.isfinite(loss.item()):
            raise ValueError(f"step {step}: the loss is {loss.item()}; lower --lr (the best matcher so far "
                             f"is in {s.out_dir}).")

        # step
        for group, times in zip(optimizer.param_groups, (1, FACTORS_LR), strict=True):
            group["lr"] = times * s.lr * anneal
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # log and validate. Collapse shows here first: entropy to 0, one set of picks in most of the episodes.
        counts = Counter(map(tuple, picks.tolist()))
        metrics = {"step": step, "reward": rewards.mean().item(), "advantage_std": advantages.std().item(),
                   "entropy": entropy.mean().item(), "top_share": counts.most_common(1)[0][1] / len(picks),
                   "distinct": len(counts), "picks": picks, "advantages": advantages}
        if step % EVAL_EVERY == 0 or step == s.steps:
            metrics["val_reward"] = validate()
        yield metrics


def audit(matcher: Matcher, pool: list[Record], draws: list[tuple[Tensor, Tensor]]) -> list[dict]:
    """What RL found out about each prompt of the pool, worst first. draws: each step's picks (B K, m) and
    advantages (B K).

    `usefulness` is what the policy adds to the prompt's score, `tried` how often it was drawn, `gain` the
    mean advantage of those episodes: by how many points they were better than the query's other episodes.
    `score` is the order: usefulness plus the gain over its standard error.
    """
    picks = torch.cat([p for p, _ in draws])  # (N, m): all episodes of the run
    advantages = torch.cat([a for _, a in draws])[:, None].expand_as(picks)  # (N, m)
    tried, gain = torch.zeros(2, len(pool))  # (P) each
    tried.index_add_(0, picks.flatten(), torch.ones(picks.numel()))
    gain.index_add_(0, picks.flatten(), advantages.flatten())
    gain, usefulness = gain / tried.clamp(min=1), matcher.usefulness()
    score = usefulness + gain * tried.sqrt() / advantages.std().clamp(min=1e-6)  # (P)
    columns = {"score": score, "usefulness": usefulness, "tried": tried, "gain": 100 * gain,
               "surprise": matcher.doubts[:, 0]}
    return [pool[j] | {name: round(column[j].item(), 3) for name, column in columns.items()}
            for j in score.argsort().tolist()]


# ---- the run ---------------------------------------------------------------------------------------------

def main(s: Settings) -> None:
    out = Path(s.out_dir)
    device, dtype = pick_device(s.device, s.dtype)
    rank, world, device = join_torchrun(device)
    if rank == 0:
        say_replaced(s, "base", "adapter", "data", "pool")
    if s.candidates <= s.m:
        raise ValueError(f"--candidates {s.candidates} must be above --m {s.m}: else there is no choice.")

    # the environment: frozen LLM, queries, pool
    with main_process_first(rank, world):
        base, data = ensure_base(s.base), ensure_data(s.data)
    tokenizer = Tokenizer(base)
    model, model_id = load_tuned(base, s.adapter, instructions.TEMPLATE, dtype, device)
    room = model.config.max_position_embeddings - s.max_new_tokens
    queries = instructions.load_queries(data, tokenizer, room, s.seed)
    instructions.say_long_answers(queries, tokenizer, s.max_new_tokens)
    seen_by(base if s.adapter == "none" else Path(s.adapter), "sft", data, queries)
    pool = read_pool(s.pool or data / "pool.jsonl", sum(queries.values(), []))
    if len(pool) <= s.m:
        raise ValueError(f"{s.pool or data}: {len(pool)} prompts are too few to choose {s.m}; give at least "
                         f"{s.m + 1} with --pool" + ", or lower --m" * (s.m > 1) + ".")
    if s.candidates > len(pool):
        ignored(s, f"with {len(pool)} prompts", "candidates")
    queries = {"rl": queries["rl"][:s.steps * s.queries], "val": queries["val"][:VAL_QUERIES],
               "test": queries["test"][:s.test_queries or None]}
    env = Environment(model, tokenizer, pool, s.max_new_tokens, f"{model_id} {dtype}", out / "rewards.jsonl")
    print(f"LLM {base} + {s.adapter} in {dtype} on {device}; pool of {len(pool)} prompts, m = {s.m}; "
          f"{len(queries['rl'])} queries to learn on; {len(env.known)} rewards known from earlier runs")
    vectors = {split: embed_records(model, tokenizer, records) for split, records in queries.items()}

    # train; the matcher with the best greedy validation reward is kept: training or test reward never choose
    matcher = Matcher(embed_records(model, tokenizer, pool), logit_scale=s.logit_scale,
                      candidates=s.candidates, generator=torch.Generator().manual_seed(s.seed),
                      doubts=matching.doubts(model, tokenizer, pool))
    best, best_step, kept, began = -1.0, 0, None, time.time()
    if rank == 0:
        for name in ("table.json", "pool.json"):  # of an earlier matcher
            (out / name).unlink(missing_ok=True)
        save_json(run_record(s, data, model_id), out / "run.json")
    log = open_log(out / "log.jsonl")

    def reward_fn(split: str, rows: list[int], picks: Tensor) -> Tensor:
        return env.rewards([queries[split][row] for row in rows], picks.tolist())
    draws = []
    print(f"answering {len(queries['val'])} validation queries with the nearest prompts", flush=True)
    for metrics in reinforce(matcher, vectors, reward_fn, s):
        step, seconds = metrics["step"], time.time() - began
        draws += [(metrics.pop("picks"), metrics.pop("advantages"))] if step else []
        metrics |= {"cache_hits": 1 - env.computed / env.asked, "seconds": seconds}
        log.write(json.dumps({key: round(value, 5) for key, value in metrics.items()}) + "\n")
        log.flush()
        if step == 0:
            print(f"step 0: nearest neighbours, validation reward {100 * metrics['val_reward']:.1f} of 100",
                  flush=True)
        else:
            print_step(metrics, s.steps, env.computed)
        if metrics.get("val_reward", -1.0) > best:
            best, best_step, kept = metrics["val_reward"], step, copy.deepcopy(matcher.state_dict())
            if rank == 0:
                matching.save(matcher, out, pool, s.m, model_id, step=step, val_reward=best)
    print(f"kept: the matcher of step {best_step}, the best on {len(queries['val'])} validation queries")
    audited = audit(matcher, pool, draws)  # by the last policy, which has learned from all draws
    if rank == 0:
        save_json({"prompts": audited}, out / "pool.json")
    matcher.load_state_dict(kept)

    # test, once
    test, m = queries["test"], s.m
    with torch.no_grad():
        learned = matcher.act(vectors["test"], m, greedy=True)[0].tolist()
    picks = {"no prompt": [[] for _ in test],
             "nearest": matching.nearest(vectors["test"], matcher.pool, m).tolist(), "learned": learned}
    entries = {}
    for name, chosen in picks.items():
        print(f"answering {len(test)} test queries: {name}", flush=True)
        entries[name] = env.scores(test, chosen)
    if env.shortened:
        print(f"({env.shortened} new answers were made without their first prompts: the context was full)")
    rows = print_table(entries, "nearest")
    print_harm(audited)
    if rank == 0:
        save_json({"settings": asdict(s), "rows": rows}, out / "table.json")
    print(f"\nsaved in {out}. next: {command('sample.py', s, 'base adapter device', matcher=s.out_dir)} "
          "--prompt \"...\" (or "
          + command("tests/compare.py", s, "base adapter data test_queries max_new_tokens seed device dtype",
                    matcher=s.out_dir) + ")")


if __name__ == "__main__":
    cli(Settings, main)
