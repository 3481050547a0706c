"""All ways to choose prompts, on the same test queries and through the same code: what does matching add?

A row of the table is an LLM together with a way to choose its prompts:

    LoRA               no prompt, random, best fixed, same words (BM25), nearest, learned
    base               no prompt                       what does fine-tuning add?
    full fine-tuning   no prompt, nearest, learned     is LoRA as good? (only if the folder --full exists)

"best of LoRA's" is an oracle: for each query it takes the best answer of LoRA's rows, by the reference.
"Seen" are the adapter's training tasks. The default data's marks.json says what each record is: from it come
the groups of wordings and styles, and the rows that are told the right task. What train_rl.py has answered is
known from its rewards.jsonl.

    python tests/compare.py --test_queries 0   # out/sft and out/rl on the whole test split: table.json
    python tests/compare.py --runs out/compare,out/compare_2   # the mean over two seeds' tables: runs.json

Letters: N test queries, P prompts, C width of the LLM, m picks, R runs.
"""
import math
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this is tests/; the scripts lie above it
from data.cli import cli, opt

import torch
from torch import Tensor

import matcher as matching
from data.base_model import ensure_base
from data.device import pick_device
from data.files import lock_folder, read_json, save_json
from data.instructions import TEMPLATE, load_queries, query_text, say_long_answers
from data.prepare import ensure_data
from data.records import Record, read_pool, read_records
from data.runs import ignored, seen_by
from data.scores import interval, words
from data.tokenizer import Tokenizer
from lora import load_tuned
from train_rl import Environment


@dataclass
class Settings:
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    adapter: str = opt("out/sft", "folder of the LoRA adapter, or none for the bare base")
    data: str = opt("bigbench", "bigbench, bigbench-clean, alpaca, dolly, or a .json/.jsonl file of your own")
    pool: str = opt("", "file of the prompts to pick from; empty: the pool that the matcher was trained on")
    matcher: str = opt("out/rl", "folder of train_rl.py's run: the matcher, and the rewards known so far")
    full: str = opt("out/full", "folder of train_sft.py --full's model, if there is one")
    out_dir: str = opt("out/compare", "folder for table.json")
    runs: str = opt("", "comma-separated folders of earlier comparisons: their mean instead of a new one")
    test_queries: int = opt(256, "test queries; 0: all of them")
    max_new_tokens: int = opt(48, "longest answer; as in train_rl.py, or nothing is known from there", 1)
    seed: int = opt(1337, "seed of the random prompts, and which test queries; as in train_rl.py")
    device: str = opt("auto", "auto (cuda if there is one, else cpu), cpu, cuda or mps")
    dtype: str = opt("auto", "auto (bfloat16 where the machine has it), bfloat16 or float32")


LPR = "nearest of the plausible (LPR)"
SELECTORS = ("no prompt", "random", "best fixed", "same words (BM25)", "nearest", LPR, "learned")
RIGHT, WRONG = "right task, right answer", "right task, wrong answer"  # only where marks.json tells
PAIRS = (("learned", LPR), ("learned", "full fine-tuning, no prompt"), (RIGHT, f"full fine-tuning, {RIGHT}"),
         ("learned", "full fine-tuning, learned"))  # shown as differences too, where both rows exist
RANDOM_SEEDS, FIXED_TRIES, FIXED_QUERIES = 2, 8, 32  # best fixed: the best of 8 sets on 32 val queries


# ---- the selectors ---------------------------------------------------------------------------------------

def bm25(queries: list[Record], pool: list[Record], m: int) -> Tensor:
    """The m prompts that share the most telling words with each query (Okapi BM25, k1 1.5, b 0.75). (N, m)"""
    def count(record: Record) -> Counter:
        return Counter(words(f"{record['instruction']} {record['input']}"))
    prompts = [count(p) for p in pool]
    mean = sum(p.total() for p in prompts) / len(pool)
    holders = Counter(word for p in prompts for word in p)  # in how many prompts a word stands
    rarity = {word: math.log(1 + (len(pool) - n + 0.5) / (n + 0.5)) for word, n in holders.items()}
    scores = [[sum(rarity[w] * p[w] * 2.5 / (p[w] + 1.5 * (0.25 + 0.75 * p.total() / mean))
                   for w in query.keys() & p.keys()) for p in prompts] for query in map(count, queries)]
    return torch.tensor(scores).topk(m).indices  # of (N, P)


def random_picks(n_queries: int, n_prompts: int, m: int, generator: torch.Generator) -> Tensor:
    """m different prompts for each query, every set equally likely. (N, m)"""
    return torch.rand(n_queries, n_prompts, generator=generator).argsort(1)[:, :m]


def plausible_scores(matcher: matching.Matcher, queries: Tensor) -> Tensor:
    """Local Perplexity Ranking (arXiv 2405.17264): the nearest of the prompts whose answer surprises the LLM
    less than the median of their five neighbours' answers do, the prompt itself included. (N, P)"""
    pool, surprise = matcher.standardise(matcher.pool), matcher.doubts[:, 0]  # (P, E), (P)
    near = (pool @ pool.T).topk(min(5, len(pool))).indices  # (P, 5)
    doubtful = surprise > surprise[near].median(1).values  # (P)
    return matcher.standardise(queries) @ pool.T - 2.0 * doubtful  # (N, P); a cosine spans 2


@torch.no_grad()
def choose(env: Environment, matcher: matching.Matcher, vectors: Tensor, test: list[Record],
           val: list[Record], m: int, seed: int) -> dict[str, list]:
    """{selector: its runs (R, N, m)}. vectors (N, E): the embedded test queries."""
    pool = matcher.pool  # (P, E)
    def drawn(n_queries: int, n: int) -> list[list[int]]:
        return random_picks(n_queries, len(pool), m, torch.Generator().manual_seed(seed + n)).tolist()
    some, tries = val[:FIXED_QUERIES], drawn(FIXED_TRIES, 0)
    print(f"answering {len(some)} validation queries with {len(tries)} fixed sets of prompts", flush=True)
    rewards = env.rewards(some * len(tries), [picks for picks in tries for _ in some])  # (tries some)
    fixed = tries[rewards.view(len(tries), -1).mean(1).argmax()]
    return dict(zip(SELECTORS, (
        [[[]] * len(test)], [drawn(len(test), n) for n in range(RANDOM_SEEDS)], [[fixed] * len(test)],
        [bm25(test, env.pool, m).tolist()], [matching.nearest(vectors, pool, m).tolist()],
        [plausible_scores(matcher, vectors).topk(m).indices.tolist()],
        [matcher.act(vectors, m, greedy=True)[0].tolist()]), strict=True))


def marks_of(data: Path) -> dict[str, str]:
    """{question: what the default data's marks.json says about its record}; other data sets have no marks."""
    marks = {}
    if (data / "marks.json").exists():
        for split, found in read_json(data / "marks.json", pool=list, val=list, test=list).items():
            records = read_records(data / f"{split}.jsonl")
            marks |= {query_text(record): mark for record, mark in zip(records, found, strict=True)}
    return marks


def is_wrong(prompt: Record, marks: dict[str, str]) -> bool:
    """Whether its answer is one of the planted mistakes."""
    return marks.get(query_text(prompt), "").startswith("wrong answer")


def told(test: list[Record], pool: list[Record], marks: dict[str, str], m: int, seed: int) -> dict[str, list]:
    """What a selector could do that is told each query's task, and which of the pool's answers are wrong. If
    the pool has too few such prompts, a query gets those; a row without any is left out."""
    rng, prompts = random.Random(seed), {}
    for j, prompt in enumerate(pool):
        prompts.setdefault((prompt["task"], is_wrong(prompt, marks)), []).append(j)
    def drawn(task: str, wrong: bool) -> list[int]:
        found = prompts.get((task, wrong), [])
        return rng.sample(found, min(m, len(found)))
    rows = {name: [drawn(query["task"], wrong) for query in test]
            for name, wrong in ((RIGHT, False), (WRONG, True))}
    for name, picks in rows.items():
        if few := sum(len(picked) < m for picked in picks):
            print(f"({name}: for {few} of {len(test)} queries the pool has fewer than {m} such prompts, for "
                  f"{picks.count([])} none: they get those)")
    return {name: [picks] for name, picks in rows.items() if any(picks)}


# ---- the table -------------------------------------------------------------------------------------------

def summarise(picks: dict[str, list], entries: dict[str, list], test: list[Record], pool: list[Record],
              groups: dict[str, Tensor], marks: dict[str, str]) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """({row: {column: figure}}, {row: ROUGE-L (N)}). picks and entries: {row: its runs (R, N, ..)}."""
    rows, rouge, oracle = {}, {}, torch.zeros(len(test))  # (N)
    for name, runs in entries.items():
        r, exact, semantic, tokens = (torch.tensor([[float(e[key]) for e in run] for run in runs])  # (R, N)
                                      for key in ("rouge", "exact", "semantic", "prompt_tokens"))
        rouge[name] = r.mean(0)
        oracle = oracle.maximum(r.amax(0)) if name in SELECTORS else oracle
        rows[name] = {f"{title}, {group}": 100 * score[:, mask].mean() for title, score in
                      (("ROUGE-L", r), ("exact", exact)) for group, mask in groups.items()}
        rows[name]["semantic"] = 100 * semantic.mean()
        if any(query["task"] for query in test):  # how often a query gets a prompt of its own task
            own = [any(pool[j]["task"] == query["task"] for j in picked)
                   for run in picks[name] for query, picked in zip(test, run, strict=True)]
            rows[name]["right task"] = 100 * sum(own) / len(own)
        picked = [j for run in picks[name] for of_query in run for j in of_query]
        if marks and picked:
            wrong = [is_wrong(pool[j], marks) for j in picked]
            rows[name]["wrong answer"] = 100 * sum(wrong) / len(wrong)
        lengths = [len(e["answer"].split()) for run in runs for e in run]
        rows[name] |= {"prompt tokens": tokens.mean(), "answer words": sum(lengths) / len(lengths)}
    rows["best of LoRA's"] = {f"ROUGE-L, {g}": 100 * oracle[mask].mean() for g, mask in groups.items()}
    return {name: {key: round(float(x), 2) for key, x in row.items()} for name, row in rows.items()}, rouge


def interval_over_runs(gaps: Tensor) -> list[float]:
    """(R, N) -> [mean, low, high] in points. Other seeds and other queries would both change a mean, so the
    bootstrap draws both anew."""
    (R, N), generator = gaps.shape, torch.Generator().manual_seed(0)
    if R == 1:
        return interval(gaps[0])
    runs = torch.randint(R, (2000, R, 1), generator=generator)
    queries = torch.randint(N, (2000, 1, N), generator=generator)
    low, high = gaps[runs, queries].mean((1, 2)).quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(100 * x, 2) for x in (gaps.mean().item(), low, high)]


def differences(rouge: dict[str, Tensor], groups: dict[str, Tensor]) -> dict[str, dict]:
    """{row: {"group minus other": interval}} of scores {row: (R, N)}."""
    gaps = {name: {f"{group} minus {other}": interval_over_runs((score - rouge[other])[:, mask])
                   for other in ("no prompt", "nearest") for group, mask in groups.items()}
            for name, score in rouge.items()}
    for name, gap in gaps.items():
        signs = (rouge[name] - rouge["nearest"]).sign()  # (R, N)
        gap["won / tied / lost to nearest"] = " / ".join(str(int((signs == x).sum())) for x in (1, 0, -1))
    return gaps


def pairs(rouge: dict[str, Tensor], groups: dict[str, Tensor]) -> dict[str, dict]:
    """{"row minus other row": {group: interval}} of PAIRS."""
    return {f"{one} minus {other}": {group: interval_over_runs((rouge[one] - rouge[other])[:, mask])
                                     for group, mask in groups.items()}
            for one, other in PAIRS if one in rouge and other in rouge}


def show(title: str, table: dict[str, dict]) -> None:
    columns = list(max(table.values(), key=len))
    print(f"\n{title}\n\n| prompts | {' | '.join(columns)} |\n|---" + "|---:" * len(columns) + "|")
    for name, row in table.items():
        cells = (row.get(key, "") for key in columns)
        cells = ("{:+.1f} [{:+.1f}, {:+.1f}]".format(*x) if isinstance(x, list) else str(x) for x in cells)
        print(f"| {name} | {' | '.join(cells)} |")


# ---- the run ---------------------------------------------------------------------------------------------

def over_runs(folders: list[str]) -> dict:
    """The mean of earlier comparisons, without rows that one of them lacks."""
    tables = [read_json(Path(folder, "table.json"), rows=dict, queries=list) for folder in folders]
    # another --seed shuffles the queries: places[r] says where run r has each of them
    places = [{query_text(query): i for i, query in enumerate(t["queries"])} for t in tables]
    if any(place.keys() != places[0].keys() for place in places):
        raise ValueError(f"{folders}: not on the same test queries; compare with --test_queries 0 first.")
    rows = {name: {key: round(sum(t["rows"][name][key] for t in tables) / len(tables), 2) for key in row}
            for name, row in tables[0]["rows"].items() if all(name in t["rows"] for t in tables)}
    rouge = {name: torch.tensor([[t["rouge of each query"][name][place[q]] for q in places[0]]
                                 for t, place in zip(tables, places, strict=True)])  # (R, N)
             for name in tables[0]["rouge of each query"] if name in rows}
    groups = {group: torch.tensor(mask) for group, mask in tables[0]["groups"].items()}
    return {"runs": folders, "rows": rows, "gaps": differences(rouge, groups), "pairs": pairs(rouge, groups)}


def compare(s: Settings) -> dict:
    """Answers all rows' queries and returns what table.json holds."""
    device, dtype = pick_device(s.device, s.dtype)
    base, data, file = ensure_base(s.base), ensure_data(s.data), Path(s.matcher, "rewards.jsonl")
    tokenizer = Tokenizer(base)
    model, model_id = load_tuned(base, s.adapter, TEMPLATE, dtype, device)
    matcher, pool, m = matching.load(s.matcher, model_id)
    room = model.config.max_position_embeddings - s.max_new_tokens
    queries = load_queries(data, tokenizer, room, s.seed)  # the same seed: the same queries as in train_rl.py
    test = queries["test"][:s.test_queries or None]
    say_long_answers({"test": test}, tokenizer, s.max_new_tokens)
    if s.pool:
        pool = read_pool(s.pool, sum(queries.values(), []))
        matcher.use_pool(matching.embed_records(model, tokenizer, pool),
                         matching.doubts(model, tokenizer, pool))
    asked = {query_text(query) for query in test}
    if len(pool) <= m or any(query_text(prompt) in asked for prompt in pool):
        raise ValueError(f"{s.pool or s.matcher}: {len(pool)} prompts are too few to choose {m}, or some ask "
                         "what test queries ask; name another --pool.")
    env = Environment(model, tokenizer, pool, s.max_new_tokens, f"{model_id} {dtype}", file)
    print(f"pool of {len(pool)} prompts, m = {m}; {len(env.known)} rewards known from earlier runs")
    embedded = matching.embed_records(model, tokenizer, test)  # (N, E)
    picks = choose(env, matcher, embedded, test, queries["val"], m, s.seed)
    envs, entries, marks = {}, {}, marks_of(data)
    ignored(s, "as there is no such folder", *["full"] * (s.full != "" and not Path(s.full).is_dir()))
    if marks:
        picks |= told(test, pool, marks, m, s.seed)
    for llm, folder, selectors in (("base", base if s.adapter != "none" else "", ("no prompt",)),
                                   ("full fine-tuning", s.full, ("no prompt", "nearest", "learned", RIGHT))):
        if folder and Path(folder).is_dir():  # LoRA's embeddings judge its answers too
            other, other_id = load_tuned(folder, "none", TEMPLATE, dtype, device)
            envs[llm] = Environment(other, Tokenizer(folder), pool, s.max_new_tokens,
                                    f"{other_id} {dtype}, judge {model_id}", file, judge=env)
            picks |= {f"{llm}, {name}": picks[name] for name in selectors if name in picks}
    for name, runs in picks.items():
        print(f"answering {len(test)} test queries: {name}", flush=True)
        entries[name] = [envs.get(name.split(",")[0], env).scores(test, run) for run in runs]
    if shortened := sum(e.shortened for e in (env, *envs.values())):
        print(f"({shortened} times the first prompts were left out: the context was full)")
    seen_by(Path(s.matcher), "rl", data, {"test": test})
    seen = seen_by(base if s.adapter == "none" else Path(s.adapter), "sft", data, {"test": test})
    named = seen and any(query["task"] for query in test)
    kinds = [("seen tasks" if q["task"] in seen else "new tasks") if named else "all queries" for q in test]
    groups = {kind: torch.tensor([k == kind for k in kinds]) for kind in sorted(set(kinds), reverse=True)}
    for mark in sorted({marks[query_text(query)] for query in test} if marks else ()):
        groups[mark] = torch.tensor([marks[query_text(query)] == mark for query in test])
    if few := [f"{int(mask.sum())} of {name}" for name, mask in groups.items() if mask.sum() < 30]:
        print(f"(few queries, whose intervals say little: {', '.join(few)})")
    rows, rouge = summarise(picks, entries, test, pool, groups, marks)
    runs = {name: score[None] for name, score in rouge.items()}  # (1, N)
    return {"settings": asdict(s), "rows": rows, "queries": test, "pool": pool,
            "gaps": differences(runs, groups), "pairs": pairs(runs, groups),
            "rouge of each query": {name: score.tolist() for name, score in rouge.items()},
            "groups": {name: mask.tolist() for name, mask in groups.items()},
            "picks": {name: picks[name][0] for name in SELECTORS}}


def main(s: Settings) -> None:
    if s.runs:
        ignored(s, "with --runs", *(asdict(s).keys() - {"runs", "out_dir"}))
        table, name = over_runs(s.runs.split(",")), "runs.json"
    else:
        with lock_folder(Path(s.matcher)):  # train_rl.py writes there too
            table, name = compare(s), "table.json"
    show("points of 100; prompt tokens and answer words are counted", table["rows"])
    show("differences of ROUGE-L in points, with 95% intervals", table["gaps"])
    if table["pairs"]:
        show("the same between other rows", table["pairs"])
    save_json(table, Path(s.out_dir, name))
    print(f"\nsaved in {Path(s.out_dir, name)}")


if __name__ == "__main__":
    cli(Settings, main)
