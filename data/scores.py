"""How good an answer is beside its reference, how sure a mean over queries is, and how both are printed.

Try: python -c "from data.scores import *; print(rouge_l('the dog sat', 'the cat then sat'))"
"""
import re
import unicodedata

import torch
from torch import Tensor

# Scripts without blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
NO_BLANKS = ("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
             "\U00020000-\U0003ffff]")


def words(text: str) -> list[str]:
    """The words of a text, in lower case: runs of letters, marks and digits of any script. Where a
    script has no blanks each character is a word; a text of symbols only is cut at its blanks."""
    text = re.sub(NO_BLANKS, r" \g<0> ", unicodedata.normalize("NFC", text.lower()))
    found = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    return found or text.split()


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; for ASCII words it equals rouge-score's rougeL."""
    a, b = words(answer), words(reference)
    best = [0] * (len(b) + 1)  # best[j]: longest common subsequence of the words of a so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, best[j] = best[j], diagonal + 1 if word == other else max(best[j], best[j - 1])
    return 2 * best[-1] / (len(a) + len(b)) if best[-1] else 0.0


def interval(differences: Tensor) -> list[float]:
    """Paired differences (N) -> [mean, low, high] in points: a 95% interval by bootstrap over the queries.
    One query says nothing about others: any difference is possible."""
    if len(differences) == 1:
        return [round(100 * differences.item(), 2), -100.0, 100.0]
    draws = torch.randint(len(differences), (2000, len(differences)),
                          generator=torch.Generator().manual_seed(0))
    low, high = differences[draws].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(100 * x, 2) for x in (differences.mean().item(), low, high)]


def print_step(metrics: dict, steps: int, answers: int) -> None:
    """A line for a step of REINFORCE; answers: how many the LLM has given so far."""
    step, seconds = metrics["step"], metrics["seconds"]
    validated = f"  validation {100 * metrics['val_reward']:.1f}" if "val_reward" in metrics else ""
    print(f"step {step}/{steps}  reward {100 * metrics['reward']:.1f}  entropy {metrics['entropy']:.2f} "
          f"(1: uniform)  {metrics['distinct']} different picks, the most frequent in "
          f"{metrics['top_share']:.0%}  {answers / seconds:.1f} answers/s  "
          f"{seconds / step * (steps - step) / 60:.1f} min left{validated}", flush=True)


def print_table(entries: dict[str, list[dict]], other: str) -> dict[str, dict]:
    """Means over the same queries, in points, and each row's gap to the row `other`. entries: {row: an entry
    with "rouge" and "exact" for each query}. Returns what is printed."""
    few, rows = len(entries[other]) < 30, {}
    print(f"\n{len(entries[other])} test queries, points of 100; brackets are 95% intervals"
          + " (of so few queries they say little)" * few + f"\n\n| prompts | ROUGE-L | exact | ROUGE-L minus "
          f"{other} |\n|---|---:|---:|---:|")
    score = {name: {key: torch.tensor([float(e[key]) for e in found]) for key in ("rouge", "exact")}  # (N)
             for name, found in entries.items()}
    for name, of in score.items():
        gap = interval(of["rouge"] - score[other]["rouge"])
        rows[name] = {key: round(100 * of[key].mean().item(), 2) for key in of} | {f"minus {other}": gap}
        print(f"| {name} | {rows[name]['rouge']:.1f} | {rows[name]['exact']:.1f} | "
              + "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gap) * (name != other) + " |")
    return rows


def print_harm(audited: list[dict]) -> None:
    """The five worst prompts of train_rl.py's audit, of those that harmed or were never tried."""
    harmful = [entry for entry in audited if entry["gain"] < 0 or not entry["tried"]]
    print("\nprompts that seem to do harm, worst first (all in pool.json); check their answers:"
          if harmful else "\nno prompt seems to do harm (pool.json)")
    for entry in harmful[:5]:
        why = (f"tried {entry['tried']:.0f} times, mean reward {entry['gain']:+.1f} against the queries' "
               "other picks" if entry["tried"] else "never tried, but its answer surprises the LLM")
        print(f"  {why}: {entry['instruction']} | {entry['input']} -> {entry['output']}")
