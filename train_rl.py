"""REINFORCE trains the matcher: the second half of PILLOW (paper, section 3.2).

The LLM (base + LoRA) is frozen and is part of the environment. For a query q the policy picks prompts a =
(a_1..a_m), the LLM answers with them in front, and the answer's similarity to the reference is the reward
R(q, a). Drawn picks are enough to climb its mean J, and no gradient goes through the LLM:

    J = E_q sum_a pi(a|q) R(q, a)
    grad J = E_q sum_a R grad pi = E_q E_{a ~ pi} [ R grad log pi(a|q) ]     as grad pi = pi grad log pi
    E_{a ~ pi} [ b grad log pi ] = b grad sum_a pi = b grad 1 = 0            for a b that does not depend on a
    grad J = E_q E [ 1/K sum_k (R_k - b_k) grad log pi(a_k|q) ]              K episodes a_k of each query

where log pi(a|q) is the sum over the m sequential picks, and the baseline b_k is the mean reward of the other
K - 1 episodes (leave-one-out): those are drawn independently of a_k, so it adds no bias, and it removes what
all of them share, how easy the query is. Without it the mean is the same, but every pick that was drawn is
reinforced, since R >= 0, good or bad; with few samples that noise feeds itself and the policy collapses
(tests/experiment.py shows it). An entropy bonus, annealed to zero, keeps it looking around.

Simplified: nothing else. No value network, no clipping, no KL. Answers are decoded greedily, so the reward
is a function of (query, picks): each is computed once and kept on disk, and the same command replays it.
With m = 1 and four candidates the sum over a has four terms and could be taken whole; we draw all the same,
since with more picks or more candidates nobody can afford that sum.

    python train_rl.py                  # needs out/sft, see train_sft.py
    python train_rl.py --eval_only      # no training: the whole comparison table, for the matcher in out/rl
"""
import hashlib
import json
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import lora
import matcher as matching
import model as llama
from data import instructions
from data.instructions import TEMPLATE, Record, length_sorted_batches, query_text, read_records
from data.prepare import cli, ensure_base, ensure_data, opt, record_of_run
from data.tokenizer import Tokenizer


@dataclass
class Settings:
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    adapter: str = opt("out/sft", "folder of the LoRA adapter, or none for the bare base")
    data: str = opt("bigbench", "data set: bigbench, alpaca, dolly, or a .json/.jsonl file of your own")
    pool: str = opt("", "file of the prompts to pick from; empty: the data set's own pool split")
    out_dir: str = opt("out/rl", "where matcher, reward cache, log and table go")
    eval_only: bool = opt(False, "no training: the whole comparison table for the matcher in out_dir")
    full: str = opt("out/full", "folder of train_sft.py --full's model, for --eval_only's table if there")
    # the policy
    m: int = opt(1, "prompts picked for each query")
    hidden: int = opt(128, "width of the towers' hidden layer; 512 is no better")
    scale: float = opt(50.0, "softmax over cosine * scale at the start; below 20 it is too flat")
    candidates: int = opt(4, "nearest prompts to choose among, more than m; few, so each is tried often")
    # REINFORCE
    steps: int = opt(50, "updates; each asks the LLM for up to queries x samples answers")
    queries: int = opt(16, "queries in a step, all different: many queries teach more than many passes")
    samples: int = opt(8, "episodes of a query, K; the baseline of one is the mean of the others")
    lr: float = opt(3e-4, "Adam's learning rate, falling linearly to zero; at 1e-2 the policy collapses")
    entropy: float = opt(0.02, "weight of the normalised entropy bonus, falling linearly to zero")
    # the reward
    textual: float = opt(0.5, "reward = textual * ROUGE-L + (1 - textual) * cosine of embeddings")
    max_new_tokens: int = opt(48, "longest answer; the default data's answers have at most 160 characters")
    rollout_batch: int = opt(32, "answers generated together, of near-equal length")
    # bookkeeping
    val_queries: int = opt(160, "validation queries; the step with the best mean over them is kept")
    eval_every: int = opt(10, "steps between validations (greedy picks)")
    test_queries: int = opt(256, "test queries in the table; 0: all of them")
    random_seeds: int = opt(5, "seeds of --eval_only's random row")
    fixed_tries: int = opt(16, "prompt sets tried on 32 validation queries for --eval_only's best fixed one")
    seed: int = opt(1337, "seed of towers, picks, order of queries, and which of val and test")
    device: str = opt("auto", "auto (cuda if there is one, else cpu), cpu, cuda, mps")
    dtype: str = opt("auto", "auto (bfloat16 where the machine has it), bfloat16, float32")


# ---- the reward -------------------------------------------------------------------------------------------

def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (a-z, 0-9, lower case); equals rouge-score's rougeL."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, reference))
    if not a or not b:
        return 0.0
    best = [0] * (len(b) + 1)  # best[j]: longest common subsequence of the words of a so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, best[j] = best[j], diagonal + 1 if word == other else max(best[j], best[j - 1])
    precision, recall = best[-1] / len(a), best[-1] / len(b)
    return 2 * precision * recall / (precision + recall) if best[-1] else 0.0


def read_rewards(file: Path) -> dict[str, dict]:
    """{key: entry} of what earlier runs have computed. Whole batches alone: the rest of a torn one, computed
    without its mates, might differ in a last bit."""
    known, batch = {}, {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            scores = sum(entry[k] for k in ("rouge", "semantic", "exact", "prompt_tokens"))
            if math.isfinite(scores):
                batch[entry["key"]] = entry
            if entry.pop("left", 0) == 0:
                known.update(batch)
                batch = {}
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            batch = {}  # the torn last line of a run that was killed: its batch is computed again
    return known


class Environment:
    """The frozen LLM as REINFORCE sees it: (query, picks) -> answer and scores, each computed once."""

    def __init__(self, model: llama.Transformer, tokenizer: Tokenizer, pool: list[Record], s: Settings,
                 identity: str, cache_file: Path, judge: "Environment | None" = None):
        self.judge = judge or self  # whose LLM embeds for the semantic score: one for all rows of a table
        self.model, self.tokenizer, self.pool, self.s = model, tokenizer, pool, s
        outputs = json.dumps([p["output"] for p in pool])  # the semantic score is standardised by them
        self.identity = [identity, hashlib.sha256(outputs.encode()).hexdigest()]
        self.stop = tokenizer.encode(instructions.NEXT_BLOCK)
        self.blocks = [instructions.exemplar_ids(tokenizer, [p]) for p in pool]
        self.groups = length_sorted_batches([len(ids) for ids in self.blocks], 4)  # prefilled together
        self.prefixes: dict[int, Tensor] = {}  # pool index -> keys and values of that prompt's block
        if self.judge is self:
            references = matching.embed(model, [[tokenizer.encode(p["output"])] for p in pool])
            self.mean, self.deviation = references.mean(0), references.std(0, unbiased=False).clamp(min=1e-3)
        self.asked = self.computed = self.shortened = 0
        self.known = read_rewards(cache_file) if cache_file.exists() else {}
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(cache_file, "a", encoding="utf-8")
        if cache_file.stat().st_size and not cache_file.read_bytes().endswith(b"\n"):
            self.file.write("\n")  # close the torn line, or the next entry would be lost with it

    def key(self, query: Record, picks: Sequence[int]) -> str:
        """What the answer and its scores depend on: weights, template, limits, the texts. Not the
        weights of the mix: both scores are stored. Not this code: who changes how an answer is made or scored
        deletes the file of rewards."""
        texts = [self.identity, TEMPLATE, self.s.max_new_tokens, query_text(query), query["output"],
                 [[query_text(self.pool[j]), self.pool[j]["output"]] for j in picks]]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:24]

    def scores(self, queries: Sequence[Record], picks: Sequence[Sequence[int]]) -> list[dict]:
        """One entry {answer, rouge, semantic, exact, prompt_tokens} for each (query, picks)."""
        keys = [self.key(q, p) for q, p in zip(queries, picks, strict=True)]
        todo = {k: (q, tuple(p)) for k, q, p in zip(keys, queries, picks, strict=True) if k not in self.known}
        self.asked, self.computed = self.asked + len(keys), self.computed + len(todo)
        jobs = [(key, query, *self.prompt(query, picks)) for key, (query, picks) in todo.items()]
        batches = length_sorted_batches([len(prompt) for *_, prompt in jobs], self.s.rollout_batch)
        world = dist.get_world_size() if dist.is_initialized() else 1
        for first in range(0, len(batches), world):  # torchrun's processes compute a batch each
            mine = first + (dist.get_rank() if world > 1 else 0)
            entries = self.compute([jobs[i] for i in batches[mine]]) if mine < len(batches) else []
            for entry in share(entries) if world > 1 else entries:
                self.file.write(json.dumps(entry) + "\n")
                del entry["left"]
                self.known[entry["key"]] = entry
            self.file.flush()
        return [self.known[k] for k in keys]

    def prompt(self, query: Record, picks: tuple[int, ...]) -> tuple[tuple[int, ...], list[int]]:
        """(the picks that fit the context with query and answer: others go, the farthest first; what the LLM
        reads after the first pick's block)."""
        room = self.model.config.max_position_embeddings - self.s.max_new_tokens
        ids, kept = instructions.answering_prompt(self.tokenizer, query, [self.pool[j] for j in picks], room)
        self.shortened += kept < len(picks)
        picks = picks[len(picks) - kept:]
        return picks, ids[len(self.blocks[picks[0]]) if picks else 0:]

    def prefill(self, firsts: set[int]) -> None:
        """Keys and values of prompts that come first: nothing stands before them, so they are computed once
        for all queries. With one prompt a query that is two thirds of a rollout's work. They come in fixed
        groups of the pool, so that no bit of them depends on what else is asked for."""
        over = max(0, len(self.prefixes) + len(firsts) - 1000)  # 1.4 MB each for 60 tokens of a 135M model
        for j in list(self.prefixes)[:over]:
            del self.prefixes[j]
        for group in self.groups:
            if firsts & set(group) - set(self.prefixes):
                made = llama.prefill(self.model, [self.blocks[j] for j in group])
                self.prefixes.update(zip(group, made, strict=True))

    def compute(self, jobs: list[tuple[str, Record, tuple[int, ...], list[int]]]) -> list[dict]:
        """One batch's answers and scores."""
        keys, queries, picks, prompts = zip(*jobs, strict=True)
        self.prefill({p[0] for p in picks if p})
        prefixes = [self.prefixes[p[0]] if p else None for p in picks]
        answers = llama.generate(self.model, prompts, self.s.max_new_tokens, self.tokenizer.eos, self.stop,
                                 prefixes)
        texts = [instructions.clean_answer(self.tokenizer, ids) for ids in answers]
        references = [query["output"] for query in queries]
        semantic = self.judge.similarity(texts, references)
        entries = []  # rounded before use: what is read back from the file is the same number
        for key, prompt, prefix, text, reference, sem in zip(
                keys, prompts, prefixes, texts, references, semantic, strict=True):
            spent = len(prompt) + (0 if prefix is None else prefix.size(3))
            entries.append({"key": key, "answer": text, "rouge": round(rouge_l(text, reference), 6),
                            "semantic": round(sem, 6), "exact": text == reference.strip(),
                            "prompt_tokens": spent,
                            "left": len(jobs) - len(entries) - 1})  # lines of this batch still to come
        return entries

    def similarity(self, answers: list[str], references: list[str]) -> list[float]:
        """Cosine of mean-pooled, standardised embeddings, negative ones cut to 0; 1 for equal texts."""
        pairs = [(a, r) for a, r in zip(answers, references, strict=True) if a and a != r]
        # of this batch alone: with embeddings kept from earlier ones a replay could differ in a last bit
        texts = list(dict.fromkeys(sum(pairs, ())))
        vectors = matching.embed(self.model, [[self.tokenizer.encode(t)] for t in texts])
        of = dict(zip(texts, F.normalize((vectors - self.mean) / self.deviation, dim=1), strict=True))
        return [1.0 if a == r else max(0.0, float(of[a] @ of[r])) if a else 0.0
                for a, r in zip(answers, references, strict=True)]

    def reward(self, entry: dict) -> float:
        """R(q, a), 0 to 1: the paper's mix of a textual and a semantic similarity to the reference."""
        return self.s.textual * entry["rouge"] + (1 - self.s.textual) * entry["semantic"]

    def rewards(self, queries: Sequence[Record], picks: Sequence[Sequence[int]]) -> Tensor:  # (N)
        return torch.tensor([self.reward(entry) for entry in self.scores(queries, picks)])

    def mean_reward(self, queries: Sequence[Record], picks: Sequence[Sequence[int]]) -> float:
        return sum(map(self.reward, self.scores(queries, picks))) / len(queries)


def share(entries: list[dict]) -> list[dict]:
    """What each of torchrun's processes has, joined, in all of them. As text: a pickle could run code."""
    text = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(text)]))
    longest = max(map(int, sizes))
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, F.pad(text, (0, longest - len(text))))
    return [e for t, size in zip(texts, sizes, strict=True) for e in json.loads(bytes(t[:size].tolist()))]


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards (B, K) -> advantages (B, K): each minus the mean of the query's other K - 1."""
    K = rewards.size(1)
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (K - 1)


def reinforce(matcher: matching.Matcher, queries: Tensor, pool: Tensor, blocked: Tensor,
              ask: Callable[[list[int], Tensor], Tensor], s: Settings,
              advantage: Callable[[Tensor], Tensor] = leave_one_out) -> Iterator[dict]:
    """The loop: s.steps updates of the matcher, in place; yields what each of them showed.

    queries (N, 2 C) and pool (P, 2 C) are embedded, blocked is (N, P); ask: the numbers of B queries, and
    picks (B K, m) for K episodes of each -> rewards (B K).
    """
    towers = [*matcher.prompt_tower.parameters(), *matcher.state_tower.parameters()]
    rates = s.lr, 100 * s.lr  # the factors are two numbers, the same for all queries: they may move fast
    optimizer = torch.optim.Adam([{"params": towers}, {"params": [matcher.log_factors]}])
    generator = torch.Generator().manual_seed(s.seed + 1)  # the policy's own; nothing else advances it
    for step in range(1, s.steps + 1):
        # in turn, not drawn: main has shuffled them, and none comes twice before all came once
        rows = [((step - 1) * s.queries + i) % len(queries) for i in range(s.queries)]
        left = 1 - (step - 1) / s.steps  # both the learning rates and the bonus fall to zero with it
        # act: K episodes of each of the B queries, drawn from the policy as it is now
        picks, log_prob, entropy = matcher.episodes(
            queries[rows].repeat_interleave(s.samples, 0), pool, s.m, generator=generator,
            blocked=blocked[rows].repeat_interleave(s.samples, 0))  # (B K, m), (B K), (B K)
        # ask the LLM: no gradient goes through it, the reward is a number
        rewards = ask(rows, picks).view(-1, s.samples)  # (B, K)
        # learn: grad J is the mean of advantage * grad log pi, and optimisers descend, hence the minus
        # (the entropy is a sum over all prompts and no estimate, so autograd differentiates it as it is)
        advantages = advantage(rewards).view(-1)  # (B K)
        loss = -(advantages * log_prob).mean() - s.entropy * left * entropy.mean()
        if not math.isfinite(loss.item()):
            raise ValueError(f"step {step}: the loss is {loss.item()}; lower --lr (the best matcher so far "
                             f"is in {s.out_dir}).")
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * left
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # collapse shows here first: entropy to 0, one set of picks with most of the episodes
        counts = Counter(map(tuple, picks.tolist()))
        yield {"step": step, "reward": rewards.mean().item(), "advantage_std": advantages.std().item(),
               "entropy": entropy.mean().item(), "top_share": counts.most_common(1)[0][1] / len(picks),
               "distinct": len(counts)}


# ---- the comparison ---------------------------------------------------------------------------------------

def ways_to_pick(env: Environment, matcher: matching.Matcher, vectors: Tensor, pool: Tensor,
                 test: list[Record], val: list[Record], s: Settings) -> dict[str, tuple[str, list]]:
    """{name: (which LLM answers, the picks for all test queries, in one or more runs)}: three ways, with
    --eval_only all of them. vectors (N, 2 C) and pool (P, 2 C) are the test queries and prompts, embedded."""
    blocked = matching.same_question(test, env.pool)  # (N, P)
    none, nearest = [[]] * len(test), matching.knn(vectors, pool, s.m, blocked).tolist()
    with torch.no_grad():
        learned = matcher.episodes(vectors, pool, s.m, greedy=True, blocked=blocked)[0].tolist()
    trained = {"nearest (kNN)": ("LoRA", [nearest]), "learned": ("LoRA", [learned])}
    if not s.eval_only:
        return {"no prompt": ("LoRA", [none])} | trained

    def seeded(n: int) -> torch.Generator:
        return torch.Generator().manual_seed(s.seed + n)
    random = [matching.random_picks(len(test), len(env.pool), s.m, seeded(n), blocked).tolist()
              for n in range(s.random_seeds)]
    # Best fixed: one set for everybody, the best of a few on 32 queries from all over `val`. A prompt that is
    # the query itself is left out for it.
    some = val[::max(1, len(val) // 32)][:32]
    def for_all(picks: list[int], blocked: Tensor) -> list[list[int]]:
        return [[j for j in picks if not row[j]] for row in blocked.tolist()]
    tries = matching.random_picks(s.fixed_tries, len(env.pool), s.m, seeded(0)).tolist()
    own = matching.same_question(some, env.pool)
    fixed = max(tries, key=lambda picks: env.mean_reward(some, for_all(picks, own)))
    return {"no prompt": ("LoRA", [none]), "random": ("LoRA", random),
            "best fixed": ("LoRA", [for_all(fixed, blocked)]),
            "same words (BM25)": ("LoRA", [matching.bm25(test, env.pool, s.m, blocked).tolist()]), **trained,
            "base, no prompt": ("base", [none]),
            "full fine-tuning, no prompt": ("full", [none]),
            "full fine-tuning, nearest": ("full", [nearest]),
            "full fine-tuning, learned": ("full", [learned])}


def interval(differences: Tensor) -> list[float]:
    """Paired differences (N) -> [mean, low, high] in points: the 95% interval by bootstrap."""
    draws = torch.randint(len(differences), (2000, len(differences)),
                          generator=torch.Generator().manual_seed(0))
    low, high = differences[draws].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(100 * x, 2) for x in (differences.mean().item(), low, high)]


def cell(value: object) -> str:
    """A figure of the tables as text."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*value) if isinstance(value, list) else str(value)


def show(table: dict[str, dict]) -> None:
    columns = list(table["learned"])
    print(f"| prompts | {' | '.join(columns)} |\n|---" + "|---:" * len(columns) + "|")
    for name, row in table.items():
        print(f"| {name} | {' | '.join(cell(row.get(k, '')) for k in columns)} |")
    print()


def comparison(envs: dict[str, Environment], ways: dict[str, tuple[str, list]], test: list[Record],
               seen_tasks: set[str], s: Settings) -> dict:
    """All ways on the same test queries through the same code; prints two tables, returns what is in them.
    envs: "LoRA", and maybe "base" and "full" to compare it with."""
    seen, pool = torch.tensor([q["task"] in seen_tasks for q in test]), envs["LoRA"].pool
    rows, rouge, oracle = {}, {}, torch.zeros(len(test))
    for name, (which, runs) in ways.items():
        if which not in envs:
            continue
        print(f"answering {len(test)} test queries: {name}", flush=True)
        entries = [envs[which].scores(test, picks) for picks in runs]
        def column(key: str, entries=entries) -> Tensor:  # (runs, N)
            return torch.tensor([[float(e[key]) for e in run] for run in entries])
        rouge[name], exact = column("rouge").mean(0), column("exact").mean(0)  # (N): the mean over runs
        if which == "LoRA":
            oracle = torch.maximum(oracle, column("rouge").amax(0))
        own_task = [any(pool[j]["task"] == query["task"] for j in picks)
                    for run in runs for query, picks in zip(test, run, strict=True)]
        words = [len(e["answer"].split()) for run in entries for e in run]
        rows[name] = {"rouge_seen": rouge[name][seen].mean(), "rouge_new": rouge[name][~seen].mean(),
                      "exact_seen": exact[seen].mean(), "exact_new": exact[~seen].mean(),
                      "semantic": column("semantic").mean(), "right_task": sum(own_task) / len(own_task),
                      "prompt_tokens": column("prompt_tokens").mean() / 100,
                      "answer_words": sum(words) / len(words) / 100}
    if s.eval_only:
        rows["best of LoRA's"] = {"rouge_seen": oracle[seen].mean(), "rouge_new": oracle[~seen].mean()}
    # without new tasks (or seen ones) their mean is NaN, which is no JSON: such a column is left out
    rows = {name: {k: round(100 * float(v), 2) for k, v in row.items() if v == v}
            for name, row in rows.items()}
    print(f"\n{len(test)} test queries, {int(seen.sum())} of them of tasks seen in fine-tuning; m = {s.m}, "
          f"pool of {len(pool)}; points of 100, prompt_tokens and answer_words counted\n")
    show(rows)

    gaps: dict[str, dict] = {name: {} for name in rouge}
    for other in ("no prompt", "nearest (kNN)"):
        for part, of in (("seen", seen), ("new", ~seen)):
            for name in rouge if of.any() else ():
                gaps[name][f"{part} minus {other}"] = interval((rouge[name] - rouge[other])[of])
    for name in rouge:
        gap = rouge[name] - rouge["nearest (kNN)"]
        gaps[name]["won / tied / lost to kNN"] = f"{(gap > 0).sum()} / {(gap == 0).sum()} / {(gap < 0).sum()}"
    print("differences in ROUGE-L points with their 95% intervals (paired bootstrap over the queries)\n")
    show(gaps)
    scores = {name: [round(x, 4) for x in of_all.tolist()] for name, of_all in rouge.items()}
    return {"rows": rows, "gaps": gaps, "rouge of each query": scores, "seen": seen.tolist(),
            "picks": {name: ways[name][1][0] for name in ("nearest (kNN)", "learned")}}


# ---- the run ----------------------------------------------------------------------------------------------

def main(s: Settings) -> None:
    out = Path(s.out_dir)
    device, dtype = llama.pick_device(s.device, s.dtype)
    rank, world, device = llama.join(device)
    ones = ("m", "steps", "queries", "eval_every", "val_queries", "hidden", "max_new_tokens", "rollout_batch",
            "random_seeds", "fixed_tries", "candidates")
    if s.samples < 2 or s.textual > 1 or min(s.lr, s.scale) <= 0 or min(getattr(s, k) for k in ones) < 1:
        raise ValueError("--samples must be 2 or more (the baseline is the mean of the others), --lr and "
                         f"--scale above 0, --textual 0 to 1, and 1 or more: --{', --'.join(ones)}.")
    if s.candidates <= s.m and not s.eval_only:
        raise ValueError(f"--candidates {s.candidates} must be above --m {s.m}: else there is no choice.")

    # ---- the environment: frozen LLM, pool, queries ------------------------------------------------------
    with llama.first_alone(rank, world):
        base, data = ensure_base(s.base), ensure_data(s.data)
    if world > 1:
        # All do the same, the LLM's answers apart, which they share; only the first one's files are kept.
        scratch = TemporaryDirectory()
        out = out if rank == 0 else shutil.copytree(out, Path(scratch.name, "out"))
        dist.barrier()
    tokenizer = Tokenizer(base)
    model, model_id = matching.load_tuned(base, s.adapter, TEMPLATE, dtype, device)
    records = {split: read_records(data / f"{split}.jsonl") for split in ("rl", "val", "test")}
    room = model.config.max_position_embeddings - s.max_new_tokens
    for split, found in records.items():
        records[split] = [r for r in found if len(tokenizer.bos + tokenizer.encode(query_text(r))) <= room]
        if len(records[split]) < len(found):
            print(f"({split}: {len(found) - len(records[split])} of {len(found)} queries do not fit the "
                  f"context of {room + s.max_new_tokens} tokens, left out)")
        if not records[split]:
            raise ValueError(f"{data}/{split}.jsonl: no query fits the context; lower --max_new_tokens.")
    if s.eval_only:  # the pool it was trained on, unless --pool names another
        matcher, pool, s.m = matching.load(out, model_id)
        pool = matching.read_pool(s.pool) if s.pool else pool
    else:
        pool = matching.read_pool(s.pool or data / "pool.jsonl")
    if len(pool) < s.m:
        raise ValueError(f"{s.pool or data}: {len(pool)} prompts are too few to pick {s.m}; lower --m.")
    seen_tasks = {r["task"] for r in read_records(data / "sft.jsonl")}
    order = torch.Generator().manual_seed(s.seed)
    # val and test lie in the file task by task: a random part of them has all kinds
    for split, n in (("val", s.val_queries), ("test", s.test_queries or len(records["test"])), ("rl", None)):
        rows = torch.randperm(len(records[split]), generator=order)[:n].tolist()
        records[split] = [records[split][row] for row in (rows if split == "rl" else sorted(rows))]
    env = Environment(model, tokenizer, pool, s, f"{model_id} {dtype}", out / "rewards.jsonl")
    print(f"LLM {base} + {s.adapter} in {dtype} on {device}; pool of {len(pool)} prompts, m = {s.m}; "
          f"{len(records['rl'])} queries to learn on; {len(env.known)} rewards known from earlier runs")

    def embed(queries: list[Record]) -> Tensor:  # (N, 2 C)
        return matching.embed_records(model, tokenizer, queries)
    pool_vectors = matcher.pool if s.eval_only and not s.pool else embed(pool)  # (P, 2 C)

    if not s.eval_only:
        # ---- the loop ------------------------------------------------------------------------------------
        val_vectors, val_blocked = embed(records["val"]), matching.same_question(records["val"], pool)

        def validate(matcher: matching.Matcher) -> float:
            with torch.no_grad():
                picks = matcher.episodes(val_vectors, pool_vectors, s.m, greedy=True, blocked=val_blocked)[0]
            return env.mean_reward(records["val"], picks.tolist())

        matcher = matching.Matcher(pool_vectors, s.hidden, s.scale, s.candidates,
                                   torch.Generator().manual_seed(s.seed))
        began = time.time()  # of the rollouts; validation's are some of them
        best = first = validate(matcher)
        lora.save_json(record_of_run(s, data, model_id), out / "run.json")
        matching.save(matcher, out, pool, s.m, model_id, step=0, val_reward=best)
        print(f"step 0 is kNN: validation reward {best:.4f}")

        queries = records["rl"][:s.steps * s.queries]  # more will not be asked
        vectors, blocked = embed(queries), matching.same_question(queries, pool)  # (N, 2 C), (N, P)

        def ask(rows: list[int], picks: Tensor) -> Tensor:  # rewards (B K), K episodes of each query
            return env.rewards([queries[row] for row in rows for _ in range(s.samples)], picks.tolist())

        log = open(out / "log.jsonl", "w", encoding="utf-8")
        for line in reinforce(matcher, vectors, pool_vectors, blocked, ask, s):
            step = line["step"]
            line |= {"cache_hits": 1 - env.computed / env.asked, "seconds": time.time() - began}
            if step % s.eval_every == 0 or step == s.steps:
                line |= {"val_reward": validate(matcher), "val_reward_knn": first}
                if line["val_reward"] > best:  # chosen by greedy validation reward, never by training or test
                    best = line["val_reward"]
                    matching.save(matcher, out, pool, s.m, model_id, step=step, val_reward=best)
            note = f"  validation {line['val_reward']:.4f} (kNN {first:.4f})" if "val_reward" in line else ""
            print(f"step {step}/{s.steps}  reward {line['reward']:.3f}  "
                  f"entropy {line['entropy']:.2f} (1: uniform)  "
                  f"{line['distinct']} different picks of {s.queries * s.samples}, "
                  f"top one {line['top_share']:.0%}  "
                  f"{env.computed / line['seconds']:.1f} rollouts/s{note}", flush=True)
            log.write(json.dumps({k: round(v, 5) for k, v in line.items()}) + "\n")
            log.flush()
        lora.plot_log(out / "log.jsonl", "reward", "reward", "val_reward", "val_reward_knn")
        matcher, _, _ = matching.load(out, model_id)  # the best one, which may be step 0: kNN
    envs = {"LoRA": env}
    others = {"base": base if s.adapter != "none" else "", "full": s.full} if s.eval_only else {}
    for name, folder in others.items():
        if folder and Path(folder).is_dir():  # what LoRA with prompts is compared with
            other, other_id = matching.load_tuned(folder, "none", TEMPLATE, dtype, device)
            envs[name] = Environment(other, tokenizer, pool, s, f"{other_id} {dtype}, judge {model_id}",
                                     out / "rewards.jsonl", judge=env)
    test, val = records["test"], records["val"]
    ways = ways_to_pick(env, matcher, embed(test), pool_vectors, test, val, s)
    tables = comparison(envs, ways, test, seen_tasks, s)
    if env.shortened:
        print(f"({env.shortened} times the farthest prompts were left out: the context was full)")
    lora.save_json({"settings": asdict(s)} | tables, out / "table.json")
    print(f"saved in {out}. next: python sample.py --prompt \"...\"")


if __name__ == "__main__":
    cli(Settings, main)
