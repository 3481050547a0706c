"""REINFORCE on a table of rewards, without an LLM: what it learns, how it collapses, and the cure.

assets/rewards.safetensors holds the rewards, m = 1, of queries of the default data with each of their 16
nearest prompts; the embeddings (as int8) and doubts; which answers of the pool are planted wrong; no text. So
the policy can be trained in seconds, without an LLM, many seeds over.

    python tests/experiment.py                            # play: REINFORCE, its collapse and the cure
    python tests/experiment.py --seeds 10                 # the same with more seeds
    python tests/experiment.py --make --adapter out/sft   # compute the table anew: 10,700 answers

Letters: N queries, P prompts, E width of an embedding, B rows, m picks.
"""
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this is tests/; the scripts lie above it
from data.cli import cli, opt

import torch
from compare import LPR, is_wrong, marks_of, plausible_scores
from torch import Tensor

import matcher as matching
import train_rl
from data.base_model import ensure_base
from data.device import pick_device
from data.files import open_tensors, save_tensors
from data.instructions import TEMPLATE, load_queries
from data.prepare import ensure_data
from data.records import Record, read_pool
from data.tokenizer import Tokenizer
from lora import load_tuned

RL_QUERIES = 320  # queries of the table to learn on


@dataclass
class Settings:
    table: str = opt(str(Path(__file__).resolve().parent.parent / "assets/rewards.safetensors"),
                     "the table of rewards")
    make: bool = opt(False, "compute the table with the LLM")
    adapter: str = opt("out/sft", "the LoRA adapter, for --make")
    seeds: int = opt(3, "seeds of the policy", 1)
    steps: int = opt(200, "updates of 16 queries, 8 episodes each; the collapse has twice as many", 1)
    lr: float = opt(1e-3, "Adam's learning rate, as in train_rl.py", 1e-12)
    out_dir: str = opt("out/experiment", "folder for --make's rewards so far")


# ---- the table -------------------------------------------------------------------------------------------

def name_of(record: Record) -> str:
    text = json.dumps([record["instruction"], record["input"], record["output"]])
    return f"{record['task']}:{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def make(s: Settings) -> None:
    """Asks the LLM about every query with each of its nearest prompts. Half of the `val` split chooses, as
    "val"; the other half stands for queries never seen, as "test": the test split is looked at once."""
    base, data = ensure_base("smollm2"), ensure_data("bigbench")
    device, dtype = pick_device("auto")
    model, model_id = load_tuned(base, s.adapter, TEMPLATE, dtype, device)
    tokenizer, of_rl = Tokenizer(base), train_rl.Settings()
    records = load_queries(data, tokenizer, model.config.max_position_embeddings, of_rl.seed)
    pool = read_pool(data / "pool.jsonl", sum(records.values(), []))
    queries = {"rl": records["rl"][:RL_QUERIES], "val": records["val"][::2], "test": records["val"][1::2]}
    env = train_rl.Environment(model, tokenizer, pool, of_rl.max_new_tokens, f"{model_id} {dtype}",
                               Path(s.out_dir, "rewards.jsonl"))
    vectors = {name: matching.embed_records(model, tokenizer, found)
               for name, found in [("pool", pool), *queries.items()]}
    scale = torch.cat(list(vectors.values())).abs().amax(0) / 127  # (E)
    tensors = {name: (v / scale).round().to(torch.int8) for name, v in vectors.items()}  # (P, E), (N, E)
    marks = marks_of(data)
    tensors |= {"scale": scale, "wrong": torch.tensor([is_wrong(p, marks) for p in pool]),
                "doubts": matching.doubts(model, tokenizer, pool)}
    for split, asked in queries.items():
        near = matching.nearest(tensors[split] * scale, tensors["pool"] * scale, of_rl.candidates)  # (N, 16)
        rewards = []
        for n in range(0, len(asked), 64):
            part = [q for q in asked[n:n + 64] for _ in range(of_rl.candidates)]
            picks = near[n:n + 64].reshape(-1, 1).tolist()
            rewards.append(env.rewards(part, picks).view(-1, of_rl.candidates))
            print(f"{split}: {n + len(rewards[-1])} of {len(asked)} queries answered", flush=True)
        tensors |= {f"near.{split}": near.short(), f"reward.{split}": torch.cat(rewards).half()}
    names = {name: [name_of(r) for r in found] for name, found in [("pool", pool), *queries.items()]}
    save_tensors(tensors, Path(s.table), {"names": json.dumps(names), "model": model_id})


def table_of(s: Settings) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """({"pool" (P, E), "doubts", "wrong", and for each split: embeddings (N, E) and "reward.split" (N, P),
    NaN for a prompt that is not near}, {"pool" and split: record ids})."""
    with open_tensors(Path(s.table)) as file:
        t, names = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["names"])
    for split in ("rl", "val", "test"):
        rewards = torch.full((len(t[split]), len(t["pool"])), torch.nan)
        t[f"reward.{split}"] = rewards.scatter(1, t[f"near.{split}"].long(), t[f"reward.{split}"].float())
    return t | {name: t[name] * t["scale"] for name in ("pool", "rl", "val", "test")}, names


# ---- REINFORCE on the table ------------------------------------------------------------------------------

class WithReplacement(matching.Matcher):
    """PromptPG's policy, whose scores do not see earlier picks, and its slip: pairs are drawn without
    replacement, but their log-probability is summed as if with it."""

    def __init__(self, *args):
        super().__init__(*args)
        def blind(_, x: Tensor) -> Tensor:  # (B, 2 E): the query and the mean of the picks, which is hidden
            return torch.cat((x[0][:, :self.state_mlp.width], 0 * x[0][:, self.state_mlp.width:]), dim=1)
        self.state_mlp.register_forward_pre_hook(blind)

    def act(self, query, m, picks=None, greedy=False, generator=None):
        with torch.no_grad():
            picks, _, _ = super().act(query, m, picks, greedy, generator)
        alone = [matching.Matcher.act(self, query, 1, pick) for pick in picks.split(1, dim=1)]
        return picks, torch.cat([log_prob for _, log_prob, _ in alone], dim=1), alone[0][2]


def run(t: dict[str, Tensor], s: train_rl.Settings, kind: type = matching.Matcher,
        advantage_fn: Callable = train_rl.leave_one_out) -> tuple[matching.Matcher, list[dict]]:
    """One training on the table: (matcher, log). A pair's reward is the mean of its two single rewards: an
    assumption, since only single prompts were asked about."""
    matcher = kind(t["pool"], 128, s.logit_scale, s.candidates, torch.Generator().manual_seed(s.seed),
                   t["doubts"])
    order = torch.randperm(len(t["rl"]), generator=torch.Generator().manual_seed(s.seed))  # mixes the tasks
    vectors = {"val": t["val"], "rl": t["rl"][order]}
    rewards = {"val": t["reward.val"], "rl": t["reward.rl"][order]}
    def reward_fn(split: str, rows: list[int], picks: Tensor) -> Tensor:
        return rewards[split][rows].gather(1, picks).mean(1)
    return matcher, [line | greedy(matcher, t, "val", s.m)
                     for line in train_rl.reinforce(matcher, vectors, reward_fn, s, advantage_fn)]


@torch.no_grad()
def greedy(matcher: matching.Matcher, t: dict[str, Tensor], split: str, m: int) -> dict[str, float]:
    picks = matcher.act(t[split], m, greedy=True)[0]  # (N, m)
    sets = [tuple(sorted(p)) for p in picks.tolist()]
    return {split: t[f"reward.{split}"].gather(1, picks).mean().item(),
            f"{split} top share": max(map(sets.count, sets)) / len(sets),
            f"{split} wrong": t["wrong"][picks].float().mean().item()}


@torch.no_grad()
def levels(t: dict[str, Tensor], *splits: str) -> dict[str, float]:
    """Mean reward on these splits of the two rules that learn nothing."""
    policy = matching.Matcher(t["pool"], 1, candidates=1, doubts=t["doubts"])
    queries = torch.cat([t[split] for split in splits])  # (N, E)
    rewards = torch.cat([t[f"reward.{split}"] for split in splits])  # (N, P)
    scores = plausible_scores(policy, queries).masked_fill(rewards.isnan(), -torch.inf)  # (N, P)
    return {name: rewards.gather(1, picks).mean().item() for name, picks in
            (("nearest", policy.act(queries, 1, greedy=True)[0]), (LPR, scores.argmax(1, keepdim=True)))}


def play(s: Settings) -> None:
    t, _ = table_of(s)
    settings = train_rl.Settings(steps=s.steps, lr=s.lr)
    untrained = matching.Matcher(t["pool"], 1, candidates=settings.candidates)
    start, test = greedy(untrained, t, "test", 1), t["reward.test"]  # (N, P)
    best = test.nan_to_num(0).amax(1).mean().item()
    print(f"{len(test)} test queries, their {settings.candidates} nearest of {test.size(1)} prompts, rewards "
          f"in points: random {test.nanmean() * 100:.1f}, nearest {start['test'] * 100:.1f} (planted "
          f"mistakes: {start['test wrong']:.0%}), {LPR} {levels(t, 'test')[LPR] * 100:.1f}, best of all "
          f"{best * 100:.1f}")
    learned = []
    for seed in range(s.seeds):
        matcher, log = run(t, replace(settings, seed=seed))
        end = greedy(matcher, t, "test", 1)
        learned.append(end["test"] * 100)
        worst = t["wrong"][matcher.usefulness().argsort()[:50]]
        print(f"seed {seed}: learned {learned[-1]:.1f} (planted mistakes: {end['test wrong']:.0%}), regret "
              f"{best * 100 - learned[-1]:.1f} (nearest: {(best - start['test']) * 100:.1f}), entropy "
              f"{log[-1]['entropy']:.2f}; of the 20 (50) prompts that it values least {worst[:20].sum()} "
              f"({worst.sum()}) are planted mistakes", flush=True)
    learned = torch.tensor(learned)
    print(f"learned {learned.mean():.1f} +- {learned.std(unbiased=False):.1f} over {s.seeds} seeds\n")


def collapse(s: Settings) -> dict[str, list[list[dict]]]:
    """The same loop with and without what keeps it from collapsing, m = 2. Chance decides much, hence several
    seeds. Returns {way: the seeds' logs}."""
    t, _ = table_of(s)
    ours = train_rl.Settings(m=2, steps=2 * s.steps, lr=s.lr)
    bare = replace(ours, entropy=0.0)
    def raw(rewards: Tensor) -> Tensor:
        return rewards
    ways = {"ours": (ours,), "no baseline, no entropy bonus": (bare, matching.Matcher, raw),
            "PromptPG: that, and its log-probability": (bare, WithReplacement, raw)}
    logs = {}
    for name, (settings, *how) in ways.items():
        logs[name] = [run(t, replace(settings, seed=seed), *how)[1] for seed in range(s.seeds)]
        print(f"{name}, {s.seeds} seeds: greedy on val {logs[name][0][0]['val'] * 100:.1f} at step 0, at the "
              f"end", [round(log[-1]["val"] * 100, 1) for log in logs[name]], "entropy",
              [round(log[-1]["entropy"], 2) for log in logs[name]], "share of the top pair, at most",
              [round(max(line["val top share"] for line in log), 2) for log in logs[name]], flush=True)
    return logs


def main(s: Settings) -> None:
    if s.make:
        make(s)
    else:
        play(s)
        collapse(s)


if __name__ == "__main__":
    cli(Settings, main)
