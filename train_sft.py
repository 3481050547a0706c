"""Supervised fine-tuning: the first half of PILLOW (paper, section 3.1). LoRA on a frozen int8 base.

The loss is the mean negative log-likelihood of the answers' tokens, given all that stands before them:

    loss = - 1/N * sum over answers, sum over t of log p(token_t | prompts, question, answer before t)

where N counts the answer tokens, EOS too, of a whole step, over all of its micro-batches.
The loop is nanoGPT's: draw a step's records, sum the loss, step, log. What PILLOW adds: a part of the
samples is read with prompts in front (--shots), since that is how the model will be used. A LoRA that never
saw prompts loses by them what matching could gain.

Simplified: AdamW, cosine with warm-up. Of several processes (torchrun) each takes its share of a step's
records; what they add up is what one process would have. Writes out/sft: the adapter in PEFT's format,
log.jsonl (a line a step: loss, val_loss, lr, grad_norm, tokens, seconds), and the state for --resume.

    python train_sft.py
    python train_sft.py --full --out_dir out/full --lr 5e-5     # all weights, what LoRA is compared with
    torchrun --nproc_per_node=4 train_sft.py                    # four GPUs of one machine
"""
import json
import math
import os
import random
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import lora
import model as llama
from data.instructions import TEMPLATE, Record, collate, length_sorted_batches, read_records, training_example
from data.prepare import cli, ensure_base, ensure_data, opt, record_of_run
from data.tokenizer import Tokenizer


@dataclass
class Settings:
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    data: str = opt("bigbench", "data set: bigbench, alpaca, dolly, or a .json/.jsonl file of your own")
    out_dir: str = opt("out/sft", "where adapter, log and state go")
    resume: bool = opt(False, "continue the run in out_dir from its last save")
    # what is trained
    full: bool = opt(False, "train all weights instead of LoRA (about 3.4 GB; give it --lr 5e-5)")
    no_int8: bool = opt(False, "keep the frozen base as it is instead of int8 (LoRA only)")
    r: int = opt(8, "rank of the LoRA matrices; 8 is the paper's and PEFT's")
    alpha: float = opt(16.0, "LoRA output is scaled by alpha / r; 2 r is the usual choice")
    targets: str = opt("all-linear", "linears that get LoRA, comma-separated, or all-linear")
    # prompts in front of training samples
    shots: int = opt(1, "up to this many prompts before a sample; as many as train_rl.py will match")
    shots_share: float = opt(0.5, "share of the samples that get prompts; the rest keeps zero-shot use alive")
    # optimisation
    epochs: int = opt(1, "passes over the records")
    batch_size: int = opt(8, "records in a step; 8, since more steps a pass learn more (16: worse)")
    micro_tokens: int = opt(384, "tokens of a micro-batch: fewer take less memory and more time")
    lr: float = opt(1e-3, "peak learning rate; LoRA takes ten times that of full fine-tuning")
    warmup: float = opt(0.05, "share of the steps with a rising learning rate; then a cosine to a tenth")
    weight_decay: float = opt(0.0, "AdamW's decay; LoRA's low rank is regulariser enough")
    grad_clip: float = opt(1.0, "gradients are scaled down to this norm")
    max_length: int = opt(512, "tokens of a sample; prompts that do not fit are left out, farthest first")
    # bookkeeping
    eval_every: int = opt(40, "steps between validation losses (each also saves)")
    max_steps: int = opt(0, "stop after this many steps (to --resume later); 0: when the epochs are over")
    seed: int = opt(1337, "seed of LoRA's start, the order of records and their prompts")
    device: str = opt("auto", "auto (cuda if there is one, else cpu), cpu, cuda, mps")
    dtype: str = opt("auto", "auto (bfloat16 where the machine has it), bfloat16, float32")


def pick_exemplars(records: list[Record], i: int, shots: int, share: float,
                   rng: random.Random) -> list[Record]:
    """Prompts for record i: none, or 1 to `shots`. Three in four are of its own task, as good matching
    would give; the fourth is any record, so that the model learns to look at a prompt before it copies."""
    if shots == 0 or rng.random() >= share or len(records) == 1:
        return []
    own = [r for r in records if r["task"] == records[i]["task"] and r is not records[i]]
    others = [r for r in records if r is not records[i]]
    return [rng.choice(own if own and rng.random() < 0.75 else others) for _ in range(rng.randint(1, shots))]


def epoch_steps(records: list[Record], tokenizer: Tokenizer, s: Settings, epoch: int) -> list[list]:
    """One epoch's optimiser steps, each a list of up to batch_size examples (ids, n) of near-equal length.

    A function of (seed, epoch) alone: a resumed run skips to its step and sees what it would have seen.
    """
    rng = random.Random(f"{s.seed}:{epoch}")
    examples = [training_example(tokenizer, record, pick_exemplars(records, i, s.shots, s.shots_share, rng),
                                 s.max_length) for i, record in enumerate(records)]
    order = length_sorted_batches([len(ids) for ids, _ in examples], s.batch_size,
                                  torch.Generator().manual_seed(rng.getrandbits(63)))
    return [[examples[i] for i in step] for step in order]


def micro_batches(examples: list, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Examples of one step -> (ids, targets) pieces of at most `tokens` tokens, padding included, or of one.

    What autograd keeps until backward grows with the tokens of a piece, so this bounds the memory of a run.
    """
    pieces = []
    for example in sorted(examples, key=lambda e: -len(e[0])):  # the first of a piece is its longest
        if not pieces or (len(pieces[-1]) + 1) * len(pieces[-1][0][0]) > tokens:
            pieces.append([])
        pieces[-1].append(example)
    return [collate(piece) for piece in pieces]


def answer_loss(model: llama.Transformer, ids: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy (nats) of the answers' tokens; ids, targets (B, T), targets -1 where no loss.

    The head, a quarter of a token's work, sees the N answer positions alone, and not the prompts.
    """
    hidden = model(ids)[targets >= 0]  # (N, C)
    # float: a softmax over 49,152 logits in bf16 would lose what tells them apart
    return F.cross_entropy(model.head(hidden).float(), targets[targets >= 0], reduction="sum")


def learning_rate(step: int, steps: int, s: Settings) -> float:
    """Linear warm-up, then a cosine from lr down to lr / 10."""
    warmup = max(1, int(s.warmup * steps))
    if step < warmup:
        return s.lr * (step + 1) / warmup
    return s.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def restore(out: Path, names: dict[Tensor, str], optimizer: torch.optim.Optimizer,
            facts: dict) -> tuple[int, int, float, list[str]]:
    """Weights and AdamW's moments as `save` left them in `out`; (steps, tokens, seconds, the log's lines).

    facts: what both runs must share, or it would be another run: not the same bits, a log that tells of two.
    """
    kept, log = out / "state.safetensors", out / "log.jsonl"
    if not kept.exists():
        if not log.exists():
            raise FileNotFoundError(f"{kept} is missing: no run to resume; run it without --resume.")
        print(f"(the run in {out} had not saved anything yet: from the beginning)")
        return 0, 0, 0.0, []
    state, meta = lora.load_tensors(kept)
    try:
        changed = [k for k, v in json.loads(meta["facts"]).items() if v != facts[k]
                   and k not in ("resume", "max_steps", "device", "eval_every", "out_dir")]
        done = int(meta["step"]), int(meta["tokens"]), float(meta["seconds"])
        for p in optimizer.param_groups[0]["params"] if not changed else ():
            p.data.copy_(state[f"weight.{names[p]}"])
            if done[0]:  # an interrupt before the first step leaves AdamW without moments
                optimizer.state[p] = {k: state[f"{k}.{names[p]}"].to(p.device if k != "step" else "cpu")
                                      for k in ("step", "exp_avg", "exp_avg_sq")}
    except (KeyError, RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(f"{kept}: not the state of such a run ({error}); train without --resume.") from None
    if changed:
        raise ValueError(f"{out}: the run to resume had other settings for {changed}; use the same, or "
                         "another --out_dir.")
    # steps after the last save are done again, so their lines go
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return *done, lines[:done[0]]


def main(s: Settings) -> None:
    out = Path(s.out_dir)
    device, dtype = llama.pick_device(s.device, s.dtype)
    if min(s.epochs, s.batch_size, s.micro_tokens, s.eval_every, s.r) < 1 or (
            max(s.warmup, s.shots_share) > 1) or min(s.lr, s.alpha, s.grad_clip) <= 0:
        raise ValueError("--epochs, --batch_size, --micro_tokens, --eval_every and --r must be 1 or more, "
                         "--lr, --alpha and --grad_clip above 0, --warmup and --shots_share at most 1.")

    rank, world, device = llama.join(device)

    # ---- data: records -> examples with masks ------------------------------------------------------------
    with llama.first_alone(rank, world):
        base, data = ensure_base(s.base), ensure_data(s.data)
    tokenizer = Tokenizer(base)
    s.max_length = min(s.max_length, llama.Config.read(base).max_position_embeddings)
    if s.full and out.resolve() == base.resolve():
        raise ValueError(f"--full would overwrite its own base {base}; choose another --out_dir.")

    def fitting(split: str) -> list[tuple[Record, tuple[list[int], int]]]:
        """The split's records that fit, each with its example (ids, n) without prompts in front; a cut answer
        would lose its EOS, so the others are left out."""
        records = read_records(data / f"{split}.jsonl")
        examples = [(r, training_example(tokenizer, r, [], s.max_length)) for r in records]
        kept = [(record, example) for record, example in examples if example]
        if not kept:
            raise ValueError(f"{data}/{split}.jsonl: no record fits in --max_length; raise it.")
        print(f"{split}: {len(kept)} records ({len(records) - len(kept)} longer than {s.max_length} tokens)")
        return kept

    records = [record for record, _ in fitting("sft")]
    # Validation is without prompts in front: the plainest number, the same whatever --shots is.
    val = [example for _, example in fitting("val")]
    val_batches = [batch for rows in length_sorted_batches([len(ids) for ids, _ in val], s.batch_size)
                   for batch in micro_batches([val[i] for i in rows], s.micro_tokens)]
    # Steps are counted, not read off an iterator: a resumed run knows its epoch and place from a number.
    steps_per_epoch = math.ceil(len(records) / s.batch_size)
    schedule = s.epochs * steps_per_epoch  # the learning rate's; --max_steps stops earlier on the same curve
    steps = min(schedule, s.max_steps or schedule)

    # ---- model: frozen base + LoRA, or all weights -------------------------------------------------------
    if s.full:
        # fp32 weights: an update of 5e-5 is lost in bf16's 8 bits. The products run in bf16 all the same
        # (autocast below). AdamW keeps two more fp32 numbers a weight: 16 bytes a weight with the gradient,
        # which LoRA spends on 2% of the weights.
        model = llama.load(base, torch.float32, device).requires_grad_(True)
        trained = list(model.parameters())
    else:
        model = llama.load(base, dtype, device)
        if not s.no_int8:
            lora.quantize(model)  # first int8, then LoRA around it: the adapter learns on what will be used
        targets = lora.ALL_LINEAR if s.targets == "all-linear" else s.targets.split(",")
        trained = lora.add_lora(model, s.r, s.alpha, targets, torch.Generator().manual_seed(s.seed))
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=s.full and dtype != torch.float32)
    # 0.95, not AdamW's 0.999: a hundred steps are too few for a memory of a thousand
    optimizer = torch.optim.AdamW(trained, lr=s.lr, betas=(0.9, 0.95), weight_decay=s.weight_decay)
    names = {p: name for name, p in model.named_parameters()}
    run = record_of_run(s, data, llama.fingerprint(base))  # reads the whole base: once, not at every save
    # what a resumed run must share with the run that it goes on with
    facts = asdict(s) | {"base weights": run["base_id"], "records": run["data"]}

    def add_up(*numbers: float) -> list[float]:
        """Each number's sum over the processes."""
        if world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float32, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def save(line: dict) -> None:
        """After the step of this log line: weights for use, and weights + moments for --resume. All under
        temporary names, then renamed."""
        if rank:
            return
        if s.full:
            lora.save_model(model, out, base)
        else:
            lora.save_adapter(model, out, str(base), run["base_id"], TEMPLATE)
        lora.save_json(run, out / "run.json")
        state = {f"weight.{names[p]}": p for p in trained}
        for p, moments in optimizer.state.items():
            state |= {f"{key}.{names[p]}": value for key, value in moments.items()}
        # this one file is all that --resume reads: whatever moment a kill comes at, it is of one step
        lora.save_tensors(state, out / "state.safetensors", {
            "step": line["step"], "tokens": line["tokens"], "seconds": line["seconds"],
            "facts": json.dumps(facts)})

    # steps, tokens and seconds that lie behind this run, and the log's lines of them
    start, tokens, seconds, lines = restore(out, names, optimizer, facts) if s.resume else (0, 0, 0.0, [])

    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    print(f"base {base} in {dtype} on {device}: weights of {held / 1e6:.0f} MB, "
          f"{sum(p.numel() for p in trained) / 1e6:.2f} million of them trained; "
          f"{steps} steps of {s.batch_size} records")
    # By eye: the answer and EOS inside the marks, nothing else, in a sample as it is trained on.
    ids, n = epoch_steps(records, tokenizer, s, 0)[0][0]
    print(f"one sample as the model reads it, the part with loss between >>> and <<<:\n"
          f"{tokenizer.decode(ids[:-n])}>>>{tokenizer.decode(ids[-n:-1])}<EOS><<<\n")

    # ---- the loop ----------------------------------------------------------------------------------------
    if rank == 0:
        with lora.replacing(out / "log.jsonl") as file:
            file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    log = open(os.devnull if rank else out / "log.jsonl", "a", encoding="utf-8")
    began = time.time() - seconds
    # Ctrl-C (torchrun: SIGTERM) lets the step finish: half an update can be neither saved nor repeated
    pressed = []
    handlers = {sig: signal.signal(sig, lambda *_: pressed.append(True))
                for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in range(start, steps):
            epoch, place = divmod(step, steps_per_epoch)
            if place == 0 or step == start:
                order = epoch_steps(records, tokenizer, s, epoch)
            mine = order[place][rank::world]  # a short last step may leave a process without any
            # Divide by the answer tokens of ALL micro-batches (of all processes); a mean of their
            # means would weigh short answers more.
            answer_tokens = sum(n for _, n in order[place])
            loss = 0.0
            for ids, targets in micro_batches(mine, s.micro_tokens) if mine else []:
                with autocast:
                    part = answer_loss(model, ids.to(device), targets.to(device)) / answer_tokens
                part.backward()  # gradients add up over the micro-batches
                loss += part.item()
            # pressed is looked at once: any later it counts for the next step, in all processes alike
            loss, stop = add_up(loss, float(bool(pressed)))
            if world > 1:
                for p in trained:  # a sum, since parts are divided by the whole step's tokens; all take part
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    dist.all_reduce(p.grad)
            # Above 1 a few strange records would set the direction; the log shows the norm before clipping.
            norm = torch.nn.utils.clip_grad_norm_(trained, s.grad_clip).item()
            # NaN stays NaN: better no step at all than one that spoils the adapter and the next save. A
            # finite loss may have an infinite gradient, which clipping turns into NaN.
            if not math.isfinite(loss + norm):
                raise ValueError(f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}; lower "
                                 f"--lr (the last good save is in {out}).")
            optimizer.param_groups[0]["lr"] = lr = learning_rate(step, schedule, s)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            tokens += sum(len(ids) for ids, _ in order[place])
            line = {"step": done, "loss": round(loss, 4), "lr": round(lr, 7),
                    "grad_norm": round(norm, 3), "tokens": tokens, "seconds": round(time.time() - began, 2)}
            if done % s.eval_every == 0 or done == steps:
                with torch.no_grad(), autocast:
                    part = sum(answer_loss(model, ids.to(device), targets.to(device)).item()
                               for ids, targets in val_batches[rank::world])
                line["val_loss"] = round(add_up(part)[0] / sum(n for _, n in val), 4)
            log.write(json.dumps(line) + "\n")
            log.flush()
            if "val_loss" in line or stop:
                save(line)
            print(f"step {done}/{steps}  loss {loss:.3f} (nats a token)  lr {line['lr']:.1e}  "
                  f"{tokens / max(line['seconds'], 0.01):.0f} tokens/s  {line['seconds'] / 60:.1f} min"
                  + (f"  val loss {line['val_loss']:.3f}, saved" if "val_loss" in line else ""), flush=True)
            if stop:
                print(f"stopped after step {done}, saved in {out}; continue with --resume")
                raise KeyboardInterrupt
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)
    if rank == 0:
        lora.plot_log(out / "log.jsonl", "nats a token", "loss", "val_loss")
    print(f"saved in {out}. next: python train_rl.py"
          + (f" --base {out} --adapter none --out_dir out/rl_full" if s.full else ""))


if __name__ == "__main__":
    cli(Settings, main)
