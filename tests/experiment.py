"""The experiments behind the README's figures: REINFORCE on a table of rewards, collapse, seeds, pictures.

assets/rewards.safetensors holds *all* rewards, m = 1, of 168 queries and 36 prompts (12 tasks of the default
data, every tenth or so), their embeddings and record ids; no text. So the policy can be
trained in seconds, without an LLM, many seeds over, and its regret against the exact optimum is known.

    python tests/experiment.py                            # play: ten seeds; collapse and its cure
    python tests/experiment.py --make --adapter out/sft   # compute the table anew: 6,048 answers, 7 minutes
    python tests/experiment.py --runs out/rl,out/rl_1338  # a table and figures over runs of train_rl.py
"""
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib import pyplot
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lora
import matcher as matching
import model as llama
import train_rl
from data.instructions import TEMPLATE, Record, read_records
from data.prepare import TASKS, cli, ensure_base, ensure_data, opt
from data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Settings:
    table: str = opt(str(ROOT / "assets/rewards.safetensors"), "the table of rewards")
    make: bool = opt(False, "compute the table with the LLM")
    adapter: str = opt("out/sft", "the LoRA adapter, for --make")
    runs: str = opt("", "comma-separated folders of train_rl.py runs: averages their --eval_only tables")
    sft: str = opt("", "with --runs: comma-separated folders of train_sft.py runs, for their losses")
    seeds: int = opt(10, "seeds of the policy")
    steps: int = opt(200, "updates of 16 queries, 8 episodes each")
    lr: float = opt(3e-4, "Adam's learning rate, as in train_rl.py; the collapse has 1e-3")
    figures: str = opt("out", "folder for the figures")


# ---- the table --------------------------------------------------------------------------------------------

def name_of(record: Record) -> str:
    text = json.dumps([record["instruction"], record["input"], record["output"]])
    return f"{record['task']}:{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def make(s: Settings) -> None:
    base, data = ensure_base("smollm2"), ensure_data("bigbench")
    device, dtype = llama.pick_device("auto", "auto")
    model, model_id = matching.load_tuned(base, s.adapter, TEMPLATE, dtype, device)
    tokenizer = Tokenizer(base)
    tasks = [*list(TASKS["seen"])[::14], *list(TASKS["new"])[::10]]
    def of_tasks(split: str, n: int) -> list[Record]:
        records = read_records(data / f"{split}.jsonl")
        return [r for task in tasks for r in [r for r in records if r["task"] == task][:n]]
    pool, queries = of_tasks("pool", 3), {k: of_tasks(k, n) for k, n in (("rl", 8), ("val", 2), ("test", 4))}
    env = train_rl.Environment(model, tokenizer, pool, train_rl.Settings(), f"{model_id} {dtype}",
                               Path(s.figures, "table.jsonl"))
    tensors = {"pool": matching.embed_records(model, tokenizer, pool).half()}
    names = {"pool": [name_of(r) for r in pool]}
    for split, asked in queries.items():
        print(f"{split}: {len(asked)} queries x {len(pool)} prompts", flush=True)
        each = [[j] for j in range(len(pool))]
        rewards = env.rewards([q for q in asked for _ in pool], each * len(asked))
        tensors[f"reward.{split}"] = rewards.view(len(asked), len(pool)).half()
        tensors[split] = matching.embed_records(model, tokenizer, asked).half()
        names[split] = [name_of(r) for r in asked]
    lora.save_tensors(tensors, Path(s.table), {"names": json.dumps(names), "model": model_id})


def table_of(s: Settings) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    tensors, meta = lora.load_tensors(Path(s.table))
    return {name: tensor.float() for name, tensor in tensors.items()}, json.loads(meta["names"])


# ---- REINFORCE on the table -------------------------------------------------------------------------------

class WithReplacement(matching.Matcher):
    """PromptPG's policy, whose scores do not see earlier picks, and its slip: pairs are drawn without
    replacement, their log-probability is summed as if with it."""

    def episodes(self, query, pool, m, blocked=None, **how):
        taken = torch.zeros(len(query), len(pool), dtype=torch.bool) if blocked is None else blocked
        drawn, log_prob = [], 0.0
        for _ in range(m):
            pick, _, _ = super().episodes(query, pool, 1, blocked=taken, **how)
            _, one, entropy = super().episodes(query, pool, 1, picks=pick, blocked=blocked)
            taken, log_prob = taken.scatter(1, pick, True), log_prob + one
            drawn.append(pick)
        return torch.cat(drawn, dim=1), log_prob, entropy


def run(t: dict[str, Tensor], s: train_rl.Settings, kind: type = matching.Matcher,
        advantage: Callable = train_rl.leave_one_out) -> tuple[matching.Matcher, list[dict]]:
    """One training on the table. A pair's reward is the mean of its two single rewards: an assumption, since
    only single prompts were asked about."""
    matcher = kind(t["pool"], s.hidden, s.scale, s.candidates, torch.Generator().manual_seed(s.seed))
    rewards, log = t["reward.rl"], []
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(s.seed))  # tasks are mixed
    def ask(rows: list[int], picks: Tensor) -> Tensor:
        return rewards[order[rows]].repeat_interleave(s.samples, 0).gather(1, picks).mean(1)
    blocked = torch.zeros(len(rewards), len(t["pool"]), dtype=torch.bool)
    for line in train_rl.reinforce(matcher, t["rl"][order], t["pool"], blocked, ask, s, advantage):
        log.append(line | greedy(matcher, t, "val", s.m))
    return matcher, log


@torch.no_grad()
def greedy(matcher: matching.Matcher, t: dict[str, Tensor], split: str, m: int) -> dict[str, float]:
    picks = matcher.episodes(t[split], t["pool"], m, greedy=True)[0]  # (N, m)
    sets = [tuple(sorted(p)) for p in picks.tolist()]
    return {split: t[f"reward.{split}"].gather(1, picks).mean().item(),
            f"{split} top share": max(map(sets.count, sets)) / len(sets), f"{split} sets": len(set(sets))}


def play(s: Settings) -> None:
    t, _ = table_of(s)
    settings = train_rl.Settings(m=1, steps=s.steps, lr=s.lr)
    test, trained = t["reward.test"], t["reward.rl"]
    nearest = greedy(matching.Matcher(t["pool"], 1), t, "test", 1)["test"]
    best = test.amax(1).mean().item()
    fixed = test[:, trained.mean(0).argmax()].mean().item()
    print(f"{len(test)} test queries, {test.size(1)} prompts, rewards in points: "
          f"random {test.mean() * 100:.1f}, best fixed {fixed * 100:.1f}, nearest (kNN) "
          f"{nearest * 100:.1f}, optimum {best * 100:.1f}")
    learned = []
    for seed in range(s.seeds):
        matcher, log = run(t, replace(settings, seed=seed))
        learned.append(greedy(matcher, t, "test", 1)["test"] * 100)
        print(f"seed {seed}: learned {learned[-1]:.1f}, regret {best * 100 - learned[-1]:.1f} "
              f"(kNN's {(best - nearest) * 100:.1f}), entropy {log[-1]['entropy']:.2f}", flush=True)
    learned = torch.tensor(learned)
    print(f"learned {learned.mean():.1f} +- {learned.std(unbiased=False):.1f} over {s.seeds} seeds\n")


def collapse(s: Settings, seeds: int = 5) -> dict[str, list[list[dict]]]:
    """The same loop with and without what keeps it from collapsing: m = 2, all 36 prompts, PromptPG's
    learning rate 1e-3. Chance decides much, hence several seeds."""
    t, _ = table_of(s)
    ours = train_rl.Settings(m=2, steps=2 * s.steps, lr=1e-3, scale=20.0, candidates=1 << 20)
    bare = replace(ours, entropy=0.0)
    def raw(rewards: Tensor) -> Tensor:
        return rewards
    ways = {"ours": lambda seed: run(t, replace(ours, seed=seed)),
            "no baseline, no entropy bonus": lambda seed: run(t, replace(bare, seed=seed), advantage=raw),
            "PromptPG: that, and its log-probability": lambda seed: run(
                t, replace(bare, seed=seed), WithReplacement, raw)}
    logs = {name: [way(seed)[1] for seed in range(seeds)] for name, way in ways.items()}
    for name, of_seeds in logs.items():
        print(f"{name}, {seeds} seeds: greedy on val {of_seeds[0][0]['val'] * 100:.1f} at step 1, at the end",
              [round(log[-1]["val"] * 100, 1) for log in of_seeds], "entropy",
              [round(log[-1]["entropy"], 2) for log in of_seeds], "share of the top pair, at most",
              [round(max(line["val top share"] for line in log), 2) for log in of_seeds], flush=True)
    return logs


# ---- over runs of train_rl.py -----------------------------------------------------------------------------

def over_runs(folders: list[str]) -> dict[str, dict]:
    """Mean of each row over runs (seeds), and 95% intervals of the mean differences, by a bootstrap over
    queries. All runs must be on the whole test split (--test_queries 0)."""
    tables = [json.loads(Path(folder, "table.json").read_text("utf-8")) for folder in folders]
    if any(t["settings"]["test_queries"] for t in tables):
        raise ValueError(f"{folders}: not all on the whole test split: --eval_only --test_queries 0.")
    seen, rows = torch.tensor(tables[0]["seen"]), {}
    for name, columns in tables[0]["rows"].items():
        if any(name not in t["rows"] for t in tables):  # full fine-tuning, say, was run beside one seed
            continue
        rows[name] = {c: f"{sum(t['rows'][name][c] for t in tables) / len(tables):.1f}" for c in columns}
        for other in ("no prompt", "nearest (kNN)") if name in tables[0]["rouge of each query"] else ():
            gap = torch.stack([torch.tensor(t["rouge of each query"][name])  # (runs, N) -> (N)
                               - torch.tensor(t["rouge of each query"][other]) for t in tables]).mean(0)
            for part, of in (("seen", seen), ("new", ~seen)):
                rows[name][f"{part} minus {other}"] = train_rl.interval(gap[of])
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(map(train_rl.cell, row.values()))} |")
    print(f"columns: {', '.join(rows['learned'])}")
    return rows


def what_is_learned(folder: str) -> Tensor:
    """Does the pick depend on the query? Mutual information of task asked and task picked; examples where the
    learned pick beats the nearest prompt most, and loses most. Returns the counts (asked, picked)."""
    table = json.loads(Path(folder, "table.json").read_text("utf-8"))
    pool = json.loads(Path(folder, "matcher.json").read_text("utf-8"))["pool"]
    test, tasks = read_records(ensure_data("bigbench") / "test.jsonl"), list(TASKS["seen"] | TASKS["new"])
    counts = torch.zeros(len(tasks), len(tasks))
    learned, nearest = (table["picks"][name] for name in ("learned", "nearest (kNN)"))
    for query, picks in zip(test, learned, strict=True):
        for j in picks:
            counts[tasks.index(query["task"]), tasks.index(pool[j]["task"])] += 1
    p = counts / counts.sum()
    of_asked, of_picked = p.sum(1, keepdim=True), p.sum(0, keepdim=True)
    there = p > 0
    bits = (p[there] * (p / (of_asked * of_picked))[there].log2()).sum().item()
    entropy = -(of_asked * of_asked.log2()).sum().item()
    changed = sum(a != b for a, b in zip(learned, nearest, strict=True))
    print(f"\n{folder}: another prompt than the nearest for {changed} of {len(test)} queries; "
          f"{len(set(map(tuple, learned)))} different picks; the pick tells {bits:.2f} of the {entropy:.2f} "
          "bits of the query's task")
    scores = table["rouge of each query"]
    gaps = [a - b for a, b in zip(scores["learned"], scores["nearest (kNN)"], strict=True)]
    def shown(record: Record) -> str:
        return f"{record['task']}: {record['instruction']} | {record['input']} -> {record['output']}"
    order = sorted(range(len(test)), key=lambda i: gaps[i])
    for what, rows in (("beats the nearest prompt", [i for i in order[-5:] if gaps[i] > 0]),
                       ("loses to it", [i for i in order[:5] if gaps[i] < 0])):
        for i in rows:
            print(f"{what} by {abs(gaps[i]) * 100:.0f} points: {shown(test[i])}\n"
                  f"  learned {shown(pool[learned[i][0]])}\n  nearest {shown(pool[nearest[i][0]])}")
    return counts


# ---- figures ----------------------------------------------------------------------------------------------

def panels(n: int, height: float = 3.2):
    return pyplot.subplots(1, n, figsize=(5.5 * n, height), layout="constrained", squeeze=False)


def finish(figure, axes, file: Path) -> None:
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, facecolor="white")  # white in a dark page too: black text needs it
    pyplot.close(figure)
    print(f"(figure {file})")


def draw_collapse(logs: dict[str, list[list[dict]]], file: Path) -> None:
    """The mean over seeds, and each seed thin behind it."""
    figure, axes = panels(3)
    shown = {"entropy": "entropy, 1 is uniform", "val": "greedy reward on val",
             "val top share": "share of the most frequent pair, greedy, val"}
    for axis, (key, title) in zip(axes.flat, shown.items(), strict=True):
        for color, (name, of_seeds) in enumerate(logs.items()):
            lines = torch.tensor([[line[key] for line in log] for log in of_seeds])
            axis.plot(lines.T, color=f"C{color}", alpha=0.2, linewidth=0.7)
            axis.plot(lines.mean(0), color=f"C{color}", label=name)
        axis.set(title=title, xlabel="step")
    axes[0, 2].legend(fontsize=7)
    finish(figure, axes, file)


def log_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text("utf-8").splitlines()]


def draw_runs(s: Settings) -> None:
    """The learning curves of all runs; of the first one the comparison and what is matched."""
    folder, runs = Path(s.figures), s.runs.split(",")
    figure, axes = panels(1)
    for run in runs:
        log = [line for line in log_of(run) if "val_reward" in line]
        [line] = axes[0, 0].plot([x["step"] for x in log], [x["val_reward"] * 100 for x in log], "o-",
                                 label=Path(run).name)
        axes[0, 0].axhline(log[0]["val_reward_knn"] * 100, color=line.get_color(), linestyle="--")
    axes[0, 0].set(title="validation reward, greedy picks (dashed: kNN)", xlabel="step", ylabel="points")
    axes[0, 0].legend()
    finish(figure, axes, folder / "rl.png")

    gaps = json.loads(Path(runs[0], "table.json").read_text("utf-8"))["gaps"]
    figure, axes = panels(2, 3.6)
    for axis, part in zip(axes.flat, ("seen", "new"), strict=True):
        named = [(name, row) for name, row in gaps.items() if f"{part} minus no prompt" in row]
        for y, (_, row) in enumerate(reversed(named)):
            mean, low, high = row[f"{part} minus no prompt"]
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3)
        axis.set(title=f"{part} tasks", xlabel="ROUGE-L minus LoRA without prompts, 95% interval",
                 yticks=range(len(named)))
        axis.set_yticklabels([name for name, _ in reversed(named)])
        axis.axvline(0, color="grey")
    finish(figure, axes, folder / "comparison.png")

    counts = what_is_learned(runs[0])
    figure, axes = pyplot.subplots(figsize=(7, 6), layout="constrained", squeeze=False)
    axes[0, 0].imshow(counts / counts.sum(1, keepdim=True), cmap="viridis", interpolation="nearest")
    axes[0, 0].set(title="share of a task's test queries that get a prompt of a task",
                   xlabel="task of the prompt", ylabel="task of the query", xticks=[], yticks=[])
    finish(figure, axes, folder / "matched.png")

    if s.sft:
        figure, axes = panels(1)
        for color, run in enumerate(s.sft.split(",")):
            dots = {"marker": "o", "label": Path(run).name}
            for key, style in (("loss", {"alpha": 0.25}), ("val_loss", dots)):
                line = [(x["step"], x[key]) for x in log_of(run) if key in x]
                axes[0, 0].plot(*zip(*line, strict=True), color=f"C{color}", **style)
        axes[0, 0].set(title="loss of the answers: thin in training, dots on val", xlabel="step",
                       ylabel="nats a token", ylim=(0, 3))
        axes[0, 0].legend(fontsize=7)
        finish(figure, axes, folder / "sft.png")


def main(s: Settings) -> None:
    if s.make:
        make(s)
    elif s.runs:
        over_runs(s.runs.split(","))
        draw_runs(s)
    else:
        play(s)
        draw_collapse(collapse(s), Path(s.figures, "collapse.png"))


if __name__ == "__main__":
    cli(Settings, main)
