"""The experiments behind the README's figures: REINFORCE on a table of rewards, its collapse, curves of runs.

assets/rewards.safetensors holds the rewards, m = 1, of queries of the default data with each of their 16
nearest prompts; the embeddings (as int8) and doubts; which answers of the pool are planted wrong; no text. So
the policy can be trained in seconds, without an LLM, many seeds over.

    python tests/experiment.py                            # play: REINFORCE, its collapse and the cure
    python tests/experiment.py --seeds 10                 # the same with more seeds
    python tests/experiment.py --make --adapter out/sft   # compute the table anew: 10,700 answers
    python tests/experiment.py --logs out/sft,out/rl      # draw the curves of log.jsonl
    python tests/experiment.py --compared out/compare     # draw compare.py's table; what has been learned?

Letters: N queries, P prompts, E width of an embedding, B rows, m picks.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this is tests/; the scripts lie above it
from compare import marks_of

import matcher as matching
import train_rl
from data.cli import cli, opt, pick_device
from data.files import open_tensors, read_json, save_tensors
from data.instructions import TEMPLATE, Record, query_text
from data.prepare import TASKS, ensure_base, ensure_data
from data.tokenizer import Tokenizer
from lora import load_tuned

RL_QUERIES = 320  # queries of the table to learn on


@dataclass
class Settings:
    table: str = opt(str(Path(__file__).resolve().parent.parent / "assets/rewards.safetensors"),
                     "the table of rewards")
    make: bool = opt(False, "compute the table with the LLM")
    adapter: str = opt("out/sft", "the LoRA adapter, for --make")
    logs: str = opt("", "comma-separated folders of train_sft.py and train_rl.py: draw their logs")
    compared: str = opt("", "folder of compare.py: draw its table")
    seeds: int = opt(3, "seeds of the policy", 1)
    steps: int = opt(200, "updates of 16 queries, 8 episodes each; the collapse has twice as many", 1)
    lr: float = opt(1e-3, "Adam's learning rate, as in train_rl.py", 1e-12)
    out_dir: str = opt("out/experiment", "folder for the figures")


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
    records = train_rl.load_queries(data, tokenizer, model.config.max_position_embeddings, of_rl.seed)
    pool = matching.read_pool(data / "pool.jsonl", sum(records.values(), []))
    queries = {"rl": records["rl"][:RL_QUERIES], "val": records["val"][::2], "test": records["val"][1::2]}
    env = train_rl.Environment(model, tokenizer, pool, of_rl.max_new_tokens, f"{model_id} {dtype}",
                               Path(s.out_dir, "rewards.jsonl"))
    vectors = {name: matching.embed_records(model, tokenizer, found)
               for name, found in [("pool", pool), *queries.items()]}
    scale = torch.cat(list(vectors.values())).abs().amax(0) / 127  # (E)
    tensors = {name: (v / scale).round().to(torch.int8) for name, v in vectors.items()}  # (P, E), (N, E)
    marks = marks_of(data)
    wrong = [marks[query_text(p)].startswith("wrong answer") for p in pool]
    tensors |= {"scale": scale, "wrong": torch.tensor(wrong),
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


def play(s: Settings) -> None:
    t, _ = table_of(s)
    settings = train_rl.Settings(steps=s.steps, lr=s.lr)
    untrained = matching.Matcher(t["pool"], 1, candidates=settings.candidates)
    start, test = greedy(untrained, t, "test", 1), t["reward.test"]  # (N, P)
    best = test.nan_to_num(0).amax(1).mean().item()
    print(f"{len(test)} test queries, their {settings.candidates} nearest of {test.size(1)} prompts, rewards "
          f"in points: random {test.nanmean() * 100:.1f}, nearest {start['test'] * 100:.1f} (planted "
          f"mistakes: {start['test wrong']:.0%}), best of all {best * 100:.1f}")
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


# ---- what was learned ------------------------------------------------------------------------------------

def what_is_learned(folder: str) -> tuple[Tensor, dict]:
    """Does the pick depend on the query? Mutual information of task asked and task picked; examples where the
    learned pick beats the nearest prompt most, and loses most. Returns the counts (tasks, tasks) of query and
    prompt, and compare.py's table."""
    table = read_json(Path(folder, "table.json"), queries=list, pool=list, picks=dict, gaps=dict)
    test, pool, scores = table["queries"], table["pool"], table["rouge of each query"]
    new = {task for task, of in TASKS.items() if of["kind"] == "new"}
    tasks = sorted({r["task"] for r in test + pool}, key=lambda task: (task in new, task))
    counts = torch.zeros(len(tasks), len(tasks))
    learned, nearest = (table["picks"][name] for name in ("learned", "nearest"))  # (N, m)
    for query, picks in zip(test, learned, strict=True):
        for j in picks:
            counts[tasks.index(query["task"]), tasks.index(pool[j]["task"])] += 1
    p = counts / counts.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    bits = (p * (p / independent).log2())[p > 0].sum().item()
    entropy = -torch.special.xlogy(p.sum(1), p.sum(1)).sum().item() / torch.log(torch.tensor(2.0)).item()
    changed = sum(a != b for a, b in zip(learned, nearest, strict=True))
    print(f"{folder}: another prompt than the nearest for {changed} of {len(test)} queries; "
          f"{len(set(map(tuple, learned)))} different picks; the pick tells {bits:.2f} of the {entropy:.2f} "
          "bits of the query's task")
    gaps = [a - b for a, b in zip(scores["learned"], scores["nearest"], strict=True)]
    def shown(record: Record) -> str:
        return f"{record['task']}: {record['instruction']} | {record['input']} -> {record['output']}"
    order = sorted(range(len(test)), key=lambda i: gaps[i])
    for what, rows in (("beats the nearest prompt", [i for i in order[-5:] if gaps[i] > 0]),
                       ("loses to it", [i for i in order[:5] if gaps[i] < 0])):
        for i in rows:
            print(f"{what} by {abs(gaps[i]) * 100:.0f} points: {shown(test[i])}\n"
                  f"  learned {shown(pool[learned[i][0]])}\n  nearest {shown(pool[nearest[i][0]])}")
    return counts, table


# ---- figures ---------------------------------------------------------------------------------------------

def panels(n: int, height: float = 3.2):
    figure, axes = pyplot.subplots(1, n, figsize=(5.5 * n, height), layout="constrained", squeeze=False)
    return figure, axes[0]


def finish(figure, file: Path) -> None:
    for axis in figure.axes:
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
    for axis, (key, title) in zip(axes, shown.items(), strict=True):
        for color, (name, of_seeds) in enumerate(logs.items()):
            lines = torch.tensor([[line[key] for line in log[1:]] for log in of_seeds])  # (seeds, steps)
            axis.plot(lines.T, color=f"C{color}", alpha=0.2, linewidth=0.7)
            axis.plot(lines.mean(0), color=f"C{color}", label=name)
        axis.set(title=title, xlabel="step")
    axes[2].legend(fontsize=7)
    finish(figure, file)


def draw_logs(folders: list[str], out: Path) -> None:
    """The curves of runs: sft.png of those of train_sft.py, rl.png of those of train_rl.py."""
    logs = {folder: [json.loads(line) for line in Path(folder, "log.jsonl").read_text("utf-8").splitlines()]
            for folder in folders}
    curves = {
        "sft": {"loss of the answers, nats a token: line in training, dots on val": ("loss", "val_loss"),
                "norm of the gradient": ("grad_norm",)},
        "rl": {"reward: line in training, dots on val with greedy picks": ("reward", "val_reward"),
               "entropy, 1 is uniform": ("entropy",)}}
    for name, titles in curves.items():
        mark = next(iter(titles.values()))[0]  # what only such a log has
        chosen = {folder: log for folder, log in logs.items() if any(mark in line for line in log)}
        if not chosen:
            continue
        figure, axes = panels(len(titles))
        for axis, (title, keys) in zip(axes, titles.items(), strict=True):
            for color, (folder, log) in enumerate(chosen.items()):
                for key in keys:
                    style = {"marker": "o", "label": Path(folder).name} if key == keys[-1] else {"alpha": 0.3}
                    style |= {"marker": "", "alpha": 0.6} if len(keys) == 1 else {}
                    points = [(line["step"], line[key]) for line in log if key in line]
                    axis.plot(*zip(*points, strict=True), color=f"C{color}", **style)
            axis.set(title=title, xlabel="step")
            axis.legend(fontsize=7)
        finish(figure, out / f"{name}.png")


def draw_compared(folder: str, out: Path) -> None:
    """compare.py's intervals (comparison.png), and which tasks' prompts the queries get (matched.png)."""
    counts, table = what_is_learned(folder)
    groups = [group for group in table["groups"] if group in ("seen tasks", "new tasks", "all queries")]
    figure, axes = panels(len(groups), 4.2)
    for axis, group in zip(axes, groups, strict=True):
        gaps = {name: row[f"{group} minus no prompt"] for name, row in reversed(table["gaps"].items())}
        for y, (mean, low, high) in enumerate(gaps.values()):
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3)
        axis.set(title=group, xlabel="ROUGE-L minus LoRA without prompts, 95% interval",
                 yticks=range(len(gaps)))
        axis.set_yticklabels(gaps)
        axis.axvline(0, color="grey")
    finish(figure, out / "comparison.png")

    figure, axis = pyplot.subplots(figsize=(7, 6), layout="constrained")
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)  # (tasks, tasks)
    axis.imshow(shares.numpy(), cmap="viridis", interpolation="nearest")
    axis.set(title="share of a task's test queries that get a prompt of a task",
             xlabel="task of the prompt", ylabel="task of the query", xticks=[], yticks=[])
    finish(figure, out / "matched.png")


def main(s: Settings) -> None:
    if s.make:
        make(s)
    elif s.logs:
        draw_logs(s.logs.split(","), Path(s.out_dir))
    elif s.compared:
        draw_compared(s.compared, Path(s.out_dir))
    else:
        play(s)
        draw_collapse(collapse(s), Path(s.out_dir, "collapse.png"))


if __name__ == "__main__":
    cli(Settings, main)
