"""A pool of one's own: are new queries of its kinds answered right, with prompts and without?

data/example_pool.jsonl has 12 kinds of a house's writing, 4 prompts each; data/example_queries.jsonl has 3
new queries of each kind. Six kinds put contents into a house style, as data/styles.py does; no generator
makes the other six. Rows: no prompt; the m prompts nearest to the query; the m that the matcher picks, which
never saw this pool; m prompts of the query's kind, by hand.

    python tests/own_pool.py                        # out/sft and out/rl
    python tests/own_pool.py --adapter none --matcher none  # the bare base
    python tests/own_pool.py --pool mine.jsonl --queries my_queries.jsonl

Letters: N queries, P prompts, C width of the LLM, m picks.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this is tests/; the scripts lie above it
from data.cli import cli, opt

import torch

import matcher as matching
from data.base_model import ensure_base
from data.device import pick_device
from data.download import DATA
from data.files import save_json
from data.instructions import TEMPLATE
from data.records import Record, read_records
from data.scores import interval
from data.tokenizer import Tokenizer
from lora import load_tuned
from train_rl import Environment

STYLED = ("house dates", "meeting times", "names", "order codes", "phone numbers", "amounts of money")


@dataclass
class Settings:
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    adapter: str = opt("out/sft", "folder of the LoRA adapter, or none for the bare base")
    matcher: str = opt("out/rl", "folder of the trained matcher, or none: without its rows")
    pool: str = opt(str(DATA / "example_pool.jsonl"), "file of prompts; `task` names the kind")
    queries: str = opt(str(DATA / "example_queries.jsonl"), "file of queries with their right answers")
    out_dir: str = opt("out/own_pool", "folder for the answers and own_pool.json")
    max_new_tokens: int = opt(48, "longest answer", 1)
    device: str = opt("auto", "auto (cuda if there is one, else cpu), cpu, cuda or mps")
    dtype: str = opt("auto", "auto (bfloat16 where the machine has it), bfloat16 or float32")


def points(entries: list[dict]) -> dict:
    """How many answers are right, of how many, and their mean ROUGE-L."""
    n = max(1, len(entries))
    return {"right": sum(e["exact"] for e in entries), "of": len(entries),
            "ROUGE-L": round(100 * sum(e["rouge"] for e in entries) / n, 1)}


def of_kind(queries: list[Record], pool: list[Record], m: int) -> list[list[int]]:
    """The first m prompts of each query's kind. (N, m)"""
    return [[j for j, prompt in enumerate(pool) if prompt["task"] == query["task"]][:m] for query in queries]


def main(s: Settings) -> None:
    device, dtype = pick_device(s.device, s.dtype)
    base, pool, queries = ensure_base(s.base), read_records(s.pool), read_records(s.queries)
    tokenizer = Tokenizer(base)
    model, model_id = load_tuned(base, s.adapter, TEMPLATE, dtype, device)
    env = Environment(model, tokenizer, pool, s.max_new_tokens, f"{model_id} {dtype}",
                      Path(s.out_dir, "rewards.jsonl"))
    vectors = matching.embed_records(model, tokenizer, queries)  # (N, E)
    prompts = matching.embed_records(model, tokenizer, pool)  # (P, E)
    picks = {"no prompt": [[] for _ in queries]}
    sizes = (1, 2)[:len(pool)]
    picks |= {f"{m} nearest": matching.nearest(vectors, prompts, m).tolist() for m in sizes}
    if s.matcher != "none":
        matcher, _, _ = matching.load(s.matcher, model_id)
        matcher.use_pool(prompts, matching.doubts(model, tokenizer, pool))
        with torch.no_grad():
            picks |= {f"{m} learned": matcher.act(vectors, m, greedy=True)[0].tolist() for m in sizes}
    picks |= {f"{m} of the kind": of_kind(queries, pool, m) for m in (1, 2, 3)}
    print("| prompts | all: right, ROUGE-L | kinds like data/styles.py's | other kinds |\n|---|---|---|---|")
    rows, answers, rouge = {}, [], {}
    for name, picked in picks.items():
        entries = env.scores(queries, picked)
        parts = [[e for e, q in zip(entries, queries, strict=True) if (q["task"] in STYLED) == like]
                 for like in (True, False)]
        rows[name] = [points(part) for part in (entries, *parts)]
        cells = [f"{p['right']} of {p['of']}, {p['ROUGE-L']}" for p in rows[name]]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        answers.append([e["answer"] for e in entries])
        rouge[name] = torch.tensor([e["rouge"] for e in entries])  # (N)
    gaps = {f"{m} learned minus {m} nearest": interval(rouge[f"{m} learned"] - rouge[f"{m} nearest"])
            for m in sizes if f"{m} learned" in rouge}
    for name, gap in gaps.items():
        print("{}, ROUGE-L with its 95% interval: {:+.1f} [{:+.1f}, {:+.1f}]".format(name, *gap))
    for i, query in enumerate(queries):
        print(f"\n{query['task']}: {query['instruction']} | {query['input']} -> {query['output']}")
        for name, of_way in zip(picks, answers, strict=True):
            print(f"  {'right' if of_way[i] == query['output'].strip() else 'wrong'}, {name}: {of_way[i]}")
    save_json({"adapter": s.adapter, "rows": rows, "gaps": gaps}, Path(s.out_dir, "own_pool.json"))


if __name__ == "__main__":
    cli(Settings, main)
