"""The data sets: fetch the base model and the instruction data, and split the data for the other files.

    python data/prepare.py                                 # SmolLM2-135M-Instruct and a BIG-bench selection
    python data/prepare.py --data bigbench-clean           # one wording a task, a pool without mistakes
    python data/prepare.py --base HuggingFaceTB/SmolLM2-135M --data alpaca
    python data/prepare.py --data my_records.jsonl         # instruction / input / output records of your own

Makes data/base/ (a Hugging Face folder) and data/<name>/ (sft, pool, rl, val, test .jsonl). Downloads stay in
data/.downloads/ until you delete them: nothing is fetched twice, and a file may be put there by hand.
Simplified: the paper uses Alpaca, Dolly and a company's data; our default is short human-written tasks from
BIG-bench, which asks not to be in training corpora: a model tuned here must not be scored on BIG-bench.
"""
import json
import random
import re
import sys
import tarfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else it looks in data/

from data.cli import cli, opt  # noqa: E402

from data import download  # noqa: E402
from data.base_model import ensure_base, read_config  # noqa: E402
from data.files import atomic_replace, scratch_folder  # noqa: E402
from data.records import FIELDS, question, read_records  # noqa: E402
from data.runs import command  # noqa: E402
from data.styles import HELD_OUT, KINDS  # noqa: E402
from data.styles import records as house_styles  # noqa: E402

SETS = {  # name: address, what it is, sha256 where the file cannot change
    "bigbench": (f"{download.INDEX}/bigbench/bigbench-1.0.0.tar.gz",
                 "BIG-bench (358 MB, Apache-2.0), default data",
                 "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"),
    "bigbench-clean": None,  # the same archive
    "alpaca": ("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json",
               "Alpaca (23 MB, CC BY-NC 4.0), the data you asked for"),
    "dolly": (f"{download.HUB}/datasets/databricks/databricks-dolly-15k/resolve/main/"
              "databricks-dolly-15k.jsonl", "Dolly (13 MB, CC BY-SA 3.0), the data you asked for")}

# The selection of BIG-bench: short rewriting and generation, which a small model can do when it is shown how.
# {"seen" or "new": operations}; an operation is {"tasks": {task: style number}, "clean": one instruction,
# "known" and "new": wordings of ours, as different users would type them}. The LoRA sees no "new" operation.
# A style number names an answer's form without showing it; a prompt shows it. assets/EXPERIMENTS.md says how
# the tasks were chosen.
OPERATIONS = json.loads((download.DATA / "bigbench_tasks.json").read_text(encoding="utf-8"))
TASKS = {task: operation | {"n": n, "kind": kind} for kind, operations in OPERATIONS.items()
         for operation in operations for task, n in operation["tasks"].items()}
# a task is its folder's name up to "_json", "_1" (_2: the same examples, prompted otherwise) or "subtask003"
TASK_PATH = r"[\w.-]+/bigbench/benchmark_tasks/(?:\w+/)?(\w+?)(?:_json|_1|(?<=subtask\d\d\d)_\w+)?/task\.json"
MAX_CHARS = 400  # of input + output: two such examples and a query fit a short context
MAX_OUTPUT = 160  # characters: a 135M model cannot keep to the point for longer
# Two variants. "bigbench" is as people have it: many wordings, house styles, mistakes in the pool.
# "bigbench-clean" has one wording a task and no mistake. A task's shuffled records, mostly 32, are dealt in
# this order.
PLANS = {"bigbench": {"seen": {"pool": 5, "val": 2, "test": 4, "sft": 5, "rl": 16},
                      "new": {"pool": 5, "val": 2, "test": 4, "rl": 21}},
         "bigbench-clean": {"seen": {"pool": 3, "val": 2, "test": 4, "sft": 10, "rl": 14},
                            "new": {"pool": 3, "val": 2, "test": 4, "rl": 24}}}
SPLITS = ("sft", "pool", "rl", "val", "test")
SFT_STYLES = 450  # house styles to fine-tune on, four records each
STYLE_PLAN = {"pool": 5, "val": 2, "test": 3, "rl": 6}  # of a style that the LoRA never saw
MISTAKES = 0.4  # share of a task's prompts in the pool that get a wrong answer


# ---- the data --------------------------------------------------------------------------------------------

def clean(task: str, example: dict) -> dict | None:
    """One BIG-bench example -> a record of ours, or None: it has no answer, or is long for a small model."""
    output = example.get("target") or max(example["target_scores"], key=example["target_scores"].get)
    output = (output if isinstance(output, str) else output[0]).strip()  # of several references the first
    text = example["input"].strip().removeprefix("Utterance: ")
    if all(re.fullmatch("'.*'", field) for field in (text, output)):  # data wrangling's '18:55' -> 18:55
        text, output = (field[1:-1].replace("', '", ", ").strip() for field in (text, output))
    fill = {"n": TASKS[task]["n"], "tense": ""}
    if match := re.fullmatch(r"(.+?)\s*Change tense to ([A-Z ]+):", text):  # the instruction is in the input
        text, fill["tense"] = match[1], match[2].lower()
    instruction = TASKS[task]["clean"]
    if not output or len(output) > MAX_OUTPUT or len(text + output) > MAX_CHARS or (
            "{tense}" in instruction and not fill["tense"]):  # three records name no tense
        return None
    return {"task": task, "instruction": instruction.format(**fill), "input": text, "output": output,
            "fill": fill}


@download.reading("BIG-bench's archive")
def read_bigbench(archive: Path) -> list[dict]:
    """The records of the selected tasks. The archive is read as a stream, never unpacked."""
    records = []
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            # names from an archive are compared, never used as paths; links and devices are not regular files
            match = re.fullmatch(TASK_PATH, member.name)
            if match and member.isreg() and (task := match[1]) in TASKS:
                examples = json.load(tar.extractfile(member))["examples"]
                records += [clean(task, example) for example in examples]
    return [record for record in records if record]


def read_set(file: Path) -> list[dict]:
    """Alpaca's .json list, or Dolly's .jsonl with other field names -> the records that have an output."""
    ours = {"category": "task", "context": "input", "response": "output"}
    try:  # TRAP: str.splitlines would also split at characters like U+2028 inside a JSON string
        text = file.read_text("utf-8")
        rows = json.loads(text) if file.suffix == ".json" else map(json.loads, text.strip().split("\n"))
        records = [{"task": ""} | {ours.get(key, key): row[key].strip() for key in row} for row in rows]
        kept = [{key: record[key] for key in FIELDS} for record in records if record["output"]]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:  # or of another shape
        raise ValueError(f"{file}: not JSON records ({error}); delete it and run this again") from None
    if len(kept) < len(records):
        print(f"({file.name}: {len(records) - len(kept)} records without an output are left out)")
    return kept


def split(data: str, records: list[dict]) -> dict[str, list[dict]]:
    """Records -> {split: records}. Nothing sits in two splits: the first of twins (same query) counts."""
    first = {}
    for record in records:
        first.setdefault(question(record), record)
    twins, records, n = len(records) - len(first), list(first.values()), len(first)
    if n < 10:
        raise ValueError(f"{data}: {n} different {'record is' if n == 1 else 'records are'} too few for five "
                         f"splits ({twins} more ask what another one asks); give it at least 10 questions")
    if twins:
        print(f"({data}: {twins} records are left out: they ask what an earlier one asks)")
    if data in PLANS:  # task by task
        deals = [(f"0:{task}", PLANS[data][of["kind"]], [r for r in records if r["task"] == task])
                 for task, of in TASKS.items()]
    else:  # free tasks: 10% pool, 5% val, 10% test, 25% rl, the rest sft
        deals = [("0", {"pool": max(1, min(500, n // 10)), "val": max(1, min(300, n // 20)),
                        "test": max(1, min(1000, n // 10)), "rl": n // 4, "sft": n}, records)]
    splits = {name: [] for name in SPLITS}
    for seed, plan, pile in deals:  # one deal for everybody: results can be compared, a rerun changes nothing
        pile = random.Random(seed).sample(pile, len(pile))
        for name, size in plan.items():
            splits[name] += pile[:size]
            pile = pile[size:]
    return splits


def as_people_have_it(splits: dict[str, list[dict]]) -> None:
    """Rewords the records, adds house styles (data/styles.py) and plants mistakes in the pool, in place.

    A record's "mark" says what it is. It goes to marks.json, which only the evaluation reads."""
    rng = random.Random("as people have it")
    for name, records in splits.items():
        for i, record in enumerate(records):  # half of val and test have wordings that nothing else has
            task, wording = TASKS[record["task"]], "new" if name in ("val", "test") and i % 2 else "known"
            record["instruction"] = rng.choice(task[wording]).format(**record["fill"])
            record["mark"] = f"{task['kind']} task, {wording} wording"

    kept, size = [kind for kind in KINDS if kind not in HELD_OUT], sum(STYLE_PLAN.values())
    splits["sft"] += house_styles(kept, SFT_STYLES, 4, seed=1)
    for what, kinds, seed in (("a known", kept, 2), ("a held-out", HELD_OUT, 3)):
        made = house_styles(kinds, 2 * len(kinds), size, seed)  # two styles of each kind
        for i, record in enumerate(made):
            name = [part for part, n in STYLE_PLAN.items() for _ in range(n)][i % size]
            splits[name].append(record | {"mark": f"style of {what} kind"})

    prompts = {}
    for prompt in splits["pool"]:
        prompts.setdefault(prompt["task"], []).append(prompt)
    for of_task in prompts.values():
        answers = [prompt["output"] for prompt in of_task]
        for prompt in rng.sample(of_task, round(MISTAKES * len(of_task))):
            right = prompt["output"]
            wrong = {"another prompt's answer": rng.choice(answers), "the input copied": prompt["input"],
                     "the answer cut in half": right[:len(right) // 2].strip()}
            possible = [kind for kind, answer in wrong.items() if answer not in ("", right)]
            if possible:
                kind = rng.choice(possible)
                prompt |= {"output": wrong[kind], "mark": f"wrong answer: {kind}"}


def ensure_data(data: str) -> Path:
    """"bigbench", "alpaca", "dolly", or a file of one's own records -> the folder of its five splits."""
    file = Path(data)
    if data in SETS:
        target, read = download.DATA / data, read_bigbench if data in PLANS else read_set
    elif file.is_file():  # when it changes it gets a new folder
        digest = sha256(file.read_bytes()).hexdigest()[:8]
        read, target = read_records, download.DATA / f"own-{file.stem}-{digest}"
    else:
        raise ValueError(f"--data {data} is neither {', '.join(SETS)} nor a file of records; check the path")
    if target.is_dir():  # it is renamed into place when it is finished, so it was whole
        lost = [f"{name}.jsonl" for name in SPLITS if not (target / f"{name}.jsonl").is_file()]
        if lost:
            raise ValueError(f"{target}: {', '.join(lost)} is missing; delete the folder and run this again.")
        return target
    splits = split(data, read(download.fetch(*SETS[data.removesuffix("-clean")]) if data in SETS else file))
    if data == "bigbench":
        as_people_have_it(splits)
    with scratch_folder(download.DATA) as temp:
        folder = temp / target.name
        folder.mkdir()
        for name, records in splits.items():
            lines = (json.dumps({field: record[field] for field in FIELDS}, ensure_ascii=False) + "\n"
                     for record in records)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        if data == "bigbench":
            marks = {name: [r["mark"] for r in splits[name]] for name in ("pool", "val", "test")}
            (folder / "marks.json").write_text(json.dumps(marks, indent=0), encoding="utf-8")
        atomic_replace(folder, target)
    print(f"{data}: {', '.join(f'{len(records):,} {name}' for name, records in splits.items())} records")
    return target


# ---- the command line ------------------------------------------------------------------------------------

@dataclass
class Settings:
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    data: str = opt("bigbench", "bigbench, bigbench-clean, alpaca, dolly, or a .json/.jsonl file of your own")


def main(settings: Settings) -> None:
    with scratch_folder(download.DATA):  # clears away what killed runs left, also when there is nothing to do
        base, data = ensure_base(settings.base), ensure_data(settings.data)
    read_config(base)  # refuses what the next command could not load
    print(f"base model in {base}\ndata in {data}\ndata/.downloads may go; next: "
          + command("train_sft.py", settings, "base data"))


if __name__ == "__main__":
    cli(Settings, main)
