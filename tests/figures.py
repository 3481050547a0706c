"""The figures of README.md and assets/: each is drawn from files that a script here has written.

    python tests/figures.py                            # pipeline.png, audit.png, collapse.png
    python tests/figures.py --logs out/sft,out/rl      # sft.png, rl.png: of the log.jsonl of several runs
    python tests/figures.py --compared out/compare     # comparison.png, matched.png
    python tests/figures.py --shares 0=out/compare_0,40=out/compare  # shares.png: wrong prompts in %

Colours are those of Okabe and Ito, which can be told apart without colour sight. The background is white in a
dark page too, since black text needs it.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this is tests/; the scripts lie above it
from data.cli import cli, opt

import experiment
import torch
from compare import LPR, RIGHT
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

import train_rl
from data.files import read_json
from data.prepare import TASKS
from data.scores import interval

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"


@dataclass
class Settings:
    logs: str = opt("", "comma-separated folders of train_sft.py and train_rl.py")
    compared: str = opt("", "folder of compare.py with runs.json, table.json or both")
    shares: str = opt("", "SHARE=FOLDER,..: wrong prompts in the pool in %, compare.py's folder")
    seeds: int = opt(3, "seeds of the collapse; each takes a minute or two", 1)
    out_dir: str = opt("assets", "folder for the figures")


def panels(n: int, height: float = 3.4, width: float = 5.5):
    figure, axes = pyplot.subplots(1, n, figsize=(width * n, height), layout="constrained", squeeze=False)
    return figure, axes[0]


def finish(figure, file: Path, grid: bool = True) -> None:
    for axis in figure.axes if grid else ():
        axis.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, facecolor="white")
    pyplot.close(figure)
    print(f"(figure {file})")


def seeds_and_mean(axis, lines: list[list[tuple[float, float]]], color: str, label: str) -> None:
    """Each seed's (step, value) thin, and their mean thick where all have a value."""
    for line in lines:
        axis.plot(*zip(*line, strict=True), color=color, alpha=0.35, linewidth=0.8)
    values = [dict(line) for line in lines]  # {step: value} of each seed
    common = sorted(set.intersection(*map(set, values)))
    mean = [sum(of[x] for of in values) / len(values) for x in common]
    axis.plot(common, mean, color=color, linewidth=2.2, label=label)


# ---- the pipeline ----------------------------------------------------------------------------------------

def draw_pipeline(out: Path) -> None:
    """The two trainings and the use, one row each: what goes in, what learns, what comes out."""
    figure, axis = pyplot.subplots(figsize=(10, 3.9), layout="constrained")
    axis.set(xlim=(0, 100), ylim=(0, 39))
    axis.axis("off")

    def box(x: float, y: float, width: float, text: str, color: str) -> None:
        axis.add_patch(FancyBboxPatch((x, y), width, 7, boxstyle="round,pad=0.3,rounding_size=1",
                                      facecolor="white", edgecolor=color, linewidth=2))
        axis.text(x + width / 2, y + 3.5, text, ha="center", va="center", fontsize=9)

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str = "black") -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.5})

    for y, script in ((30, "train_sft.py"), (16, "train_rl.py"), (2, "sample.py")):
        axis.text(0, y + 3.5, script, fontsize=10, family="monospace", va="center")
    box(16, 30, 17, "training records", GREY)
    box(42, 30, 24, "int8 base, frozen\n+ LoRA, which learns", ORANGE)
    arrow((34, 33.5), (41.5, 33.5))
    for y in (16, 2):
        box(16, y, 9, "query", GREY)
        box(29, y, 16, "matcher\npicks m prompts", BLUE)
        box(52, y, 21, "base + LoRA read\nthe prompts, then the query", ORANGE)
        box(80, y, 9, "answer", GREY)
        for start, end in ((26, 28.5), (46, 51.5), (74, 79.5)):
            arrow((start, y + 3.5), (end, y + 3.5))
        arrow((37, 12.5), (37, 15.3 if y == 16 else 9.7))
    axis.text(38, 12.4, "your pool of prompts", fontsize=9, va="center")
    arrow((60, 29.3), (60, 23.9), ORANGE)  # what was trained goes down: out/sft, out/rl
    arrow((60, 15.3), (60, 9.9), ORANGE)
    axis.text(61, 12.4, "out/sft", fontsize=9, va="center", color=ORANGE)
    arrow((31.5, 15.3), (31.5, 9.9), BLUE)
    axis.text(31, 12.4, "out/rl", fontsize=9, va="center", ha="right", color=BLUE)
    axis.plot([84.5, 84.5, 37], [24, 27, 27], color=BLUE, linewidth=1.5)
    arrow((37, 27.2), (37, 23.8), BLUE)
    axis.text(62, 27.8, "REINFORCE; reward: similarity to the reference", fontsize=9, color=BLUE)
    finish(figure, out / "pipeline.png", grid=False)


# ---- figures of the reward table -------------------------------------------------------------------------

def draw_audit(out: Path) -> None:
    """How useful a trained policy holds each prompt of the pool, right ones and planted mistakes apart."""
    t, _ = experiment.table_of(experiment.Settings())
    matcher, _ = experiment.run(t, train_rl.Settings())
    useful, wrong = matcher.usefulness(), t["wrong"].bool()  # (P), (P)
    figure, axes = panels(1, width=8)
    bins = torch.linspace(useful.quantile(0.005).item(), useful.max().item(), 40).tolist()
    ways = ((~wrong, BLUE, "right answer", ""), (wrong, RED, "planted mistake", "//"))
    for mask, color, label, hatch in ways:
        axes[0].hist(useful[mask].clamp(min=bins[0]).tolist(), bins, color=color, alpha=0.55, hatch=hatch,
                     label=f"{label} ({mask.sum()} prompts)")
    axes[0].set(xlabel="usefulness (0: trusted; far to the left: hardly ever picked; -15: or less)",
                ylabel="prompts")
    axes[0].legend()
    finish(figure, out / "audit.png")


def draw_collapse(seeds: int, out: Path) -> None:
    """With and without what keeps the policy from collapsing."""
    figure, axes = panels(2)
    shown = {"entropy": "entropy (1: uniform)", "val": "reward on val, greedy"}
    logs = experiment.collapse(experiment.Settings(seeds=seeds))
    for color, (name, of_seeds) in zip((BLUE, RED, ORANGE), logs.items(), strict=True):
        for axis, (key, title) in zip(axes, shown.items(), strict=True):
            axis.set(title=title, xlabel="step")
            if (key, color) != ("entropy", ORANGE):  # PromptPG's is of single picks: not comparable
                lines = [[(line["step"], line[key]) for line in log if key in line] for log in of_seeds]
                seeds_and_mean(axis, lines, color, name)
    axes[1].legend(fontsize=8)
    finish(figure, out / "collapse.png")


# ---- figures of logs -------------------------------------------------------------------------------------

def draw_logs(folders: list[str], out: Path) -> None:
    """sft.png of the runs of train_sft.py, rl.png of those of train_rl.py."""
    logs = [[json.loads(line) for line in Path(folder, "log.jsonl").read_text("utf-8").splitlines()]
            for folder in folders]
    def lines(key: str) -> list[list[tuple[float, float]]]:
        found = [[(line["step"], line[key]) for line in log if key in line] for log in logs]
        return [line for line in found if line]

    if lines("loss"):
        figure, axes = panels(2)
        for key, color, label in (("loss", GREY, "in training"), ("val_loss", BLUE, "val, without prompts")):
            if lines(key):
                seeds_and_mean(axes[0], lines(key), color, label)
        axes[0].set(title="loss of the answers, nats a token", xlabel="step")
        axes[0].legend()
        seeds_and_mean(axes[1], lines("grad_norm"), GREY, "")
        axes[1].set(title="norm of the gradient", xlabel="step")
        finish(figure, out / "sft.png")
    if lines("val_reward"):
        figure, axes = panels(2)
        validated = lines("val_reward")
        seeds_and_mean(axes[0], validated, BLUE, "learned, greedy")
        start = sum(line[0][1] for line in validated) / len(validated)  # step 0 is nearest neighbours
        axes[0].axhline(start, color=GREY, linestyle="--", label="nearest")
        levels = experiment.levels(experiment.table_of(experiment.Settings())[0], "val", "test")
        axes[0].axhline(start + levels[LPR] - levels["nearest"], color=ORANGE, linestyle=":", label=LPR)
        axes[0].set(title="reward on val (1: best)", xlabel="step")
        axes[0].legend()
        seeds_and_mean(axes[1], lines("entropy"), BLUE, "")
        axes[1].set(title="entropy of the policy (1: uniform)", xlabel="step", ylim=(0, 1))
        finish(figure, out / "rl.png")


# ---- figures of compare.py -------------------------------------------------------------------------------

def draw_compared(folder: Path, out: Path) -> None:
    """comparison.png: runs.json's intervals, or else table.json's. matched.png: table.json's picks."""
    means, table = folder / "runs.json", folder / "table.json"
    gaps = read_json(means if means.exists() else table, gaps=dict)["gaps"]
    # the bare base is 30 points below all others: with it the rest could not be told apart
    gaps = {name: gap for name, gap in reversed(gaps.items()) if name not in ("base, no prompt", "no prompt")}
    groups = [key for key in ("seen tasks", "new tasks", "all queries")
              if f"{key} minus no prompt" in next(iter(gaps.values()))]
    figure, axes = panels(len(groups), 1 + 0.32 * len(gaps), 4.8)
    for axis, group in zip(axes, groups, strict=True):
        for y, (name, gap) in enumerate(gaps.items()):
            mean, low, high = gap[f"{group} minus no prompt"]
            color = {"learned": BLUE, RIGHT: GREEN}.get(name, GREY)
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3,
                          linewidth=2 if name == "learned" else 1.2)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=group, xlabel="points of ROUGE-L above no prompt", yticks=range(len(gaps)),
                 yticklabels=gaps if axis is axes[0] else [])
    ends = [end for axis in axes for end in axis.get_xlim()]
    for axis in axes:  # equal gains stand at equal places
        axis.set_xlim(min(ends), max(ends))
    finish(figure, out / "comparison.png")
    if table.exists():
        draw_matched(*what_is_learned(folder), out / "matched.png")


def what_is_learned(folder: Path) -> tuple[Tensor, list[str]]:
    """Does the pick depend on the query? Prints the mutual information of task asked and task picked, and
    where the learned pick beats the nearest prompt most, and loses most. Returns the counts (tasks, tasks) of
    query and prompt, and the tasks."""
    table = read_json(folder / "table.json", queries=list, pool=list, picks=dict)
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
    def shown(record: dict) -> str:
        return f"{record['task']}: {record['instruction']} | {record['input']} -> {record['output']}"
    order = sorted(range(len(test)), key=lambda i: gaps[i])
    for what, rows in (("beats the nearest prompt", [i for i in order[-5:] if gaps[i] > 0]),
                       ("loses to it", [i for i in order[:5] if gaps[i] < 0])):
        for i in rows:
            print(f"{what} by {abs(gaps[i]) * 100:.0f} points: {shown(test[i])}\n"
                  f"  learned {shown(pool[learned[i][0]])}\n  nearest {shown(pool[nearest[i][0]])}")
    return counts, tasks


def draw_matched(counts: Tensor, tasks: list[str], file: Path) -> None:
    """The 24 tasks with the most test queries, by name: whose prompts do their queries get?"""
    rows = counts.sum(1).argsort(descending=True, stable=True)[:24].sort().values  # (24)
    shares = counts[rows] / counts[rows].sum(1, keepdim=True).clamp(min=1)  # (24, tasks)
    own = shares[torch.arange(len(rows)), rows]  # (24): of its own task
    shares[torch.arange(len(rows)), rows] = 0
    other, which = shares.max(1)  # (24): the other task that is picked most
    figure, axes = panels(1, 1 + 0.26 * len(rows), 8)
    axes[0].barh(range(len(rows)), own.tolist(), color=BLUE, label="a prompt of the query's own task")
    axes[0].barh(range(len(rows)), other.tolist(), left=own.tolist(), color=ORANGE, hatch="//",
                 label="of the task named there; the rest: of others")
    for y, (left, share, j) in enumerate(zip(own.tolist(), other.tolist(), which.tolist(), strict=True)):
        if share:
            axes[0].text(left + share + 0.01, y, tasks[j], fontsize=7, va="center")
    axes[0].set(xlabel="share of the task's test queries", xlim=(0, 1.35), ylim=(len(rows) + 1.2, -0.6),
                xticks=[0, 0.25, 0.5, 0.75, 1])
    axes[0].set_yticks(range(len(rows)), [tasks[i] for i in rows], fontsize=7)
    axes[0].legend(loc="lower right", fontsize=8)
    finish(figure, file)


def draw_shares(folders: dict[float, str], out: Path) -> None:
    """ROUGE-L against the share of wrong prompts in the pool, with 95% intervals over queries."""
    tables = {x: read_json(Path(folder, "table.json"), rows=dict)["rouge of each query"]
              for x, folder in sorted(folders.items())}
    figure, axes = panels(1, width=8)
    rows = (("no prompt", GREY, "s-"), ("nearest", RED, "v-"), (LPR, ORANGE, "o-"), ("learned", BLUE, "D-"))
    for n, (name, color, style) in enumerate(rows):
        scores = [torch.tensor(table[name]) for table in tables.values()]
        mean, low, high = torch.tensor([interval(score) for score in scores]).T  # (S) each, S shares
        at = [x + 0.6 * (n - 1.5) for x in tables]  # side by side, so that no interval hides another
        axes[0].errorbar(at, mean, yerr=torch.stack((mean - low, high - mean)), fmt=style, color=color,
                         capsize=3, label=name)
    axes[0].set(xlabel="wrong prompts in the pool, %", ylabel="ROUGE-L on test", xticks=list(tables))
    axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes: nothing is hidden
    finish(figure, out / "shares.png")


def main(s: Settings) -> None:
    out = Path(s.out_dir)
    if s.logs:
        draw_logs(s.logs.split(","), out)
    if s.compared:
        draw_compared(Path(s.compared), out)
    if s.shares:
        pairs = [pair.split("=", 1) for pair in s.shares.split(",")]
        if any(len(pair) != 2 or not pair[0].isdigit() for pair in pairs):
            raise ValueError(f"--shares {s.shares}: write 0=FOLDER,20=FOLDER,..")
        draw_shares({int(share): folder for share, folder in pairs}, out)
    if not (s.logs or s.compared or s.shares):
        draw_pipeline(out)
        draw_audit(out)
        draw_collapse(s.seeds, out)


if __name__ == "__main__":
    cli(Settings, main)
