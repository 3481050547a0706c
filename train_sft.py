"""Supervised fine-tuning: the first half of PILLOW (paper, section 3.1). LoRA on a frozen int8 base.

The loss is the mean negative log-likelihood of the answers' tokens, given everything that stands before them:

    loss = - 1/N * sum over answers, sum over t of log p(token_t | prompts, question, answer before t)

where N counts the answer tokens, EOS included, of a whole step, over all of its micro-batches. The loop is
nanoGPT's: take a step's samples, sum the loss, step, log. PILLOW's addition: a sample is 1 + --shots related
records in a row, since prompts before a query are how the model will be used. Each record is an answer to
learn, and a prompt of those behind it; so one pass trains with 0, 1, 2 .. prompts. A LoRA trained without
prompts gets worse when it is given them.

Simplified: plain AdamW and a cosine with warm-up, no weight decay, no dropout. With torchrun each process
takes its share of a step's samples; together they compute what one process would. Writes out/sft: the adapter
in PEFT's format, log.jsonl (a line for each step) and the state for --resume.

    python train_sft.py
    python train_sft.py --full --out_dir out/full --lr 5e-5     # all weights, what LoRA is compared with
    torchrun --nproc_per_node=4 train_sft.py                    # four GPUs of one machine
"""
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from data.cli import cli, opt

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data import runs
from data.base_model import ensure_base, fingerprint, hub_name, read_config
from data.device import all_reduce_sum, join_torchrun, main_process_first, pick_device
from data.files import save_json
from data.instructions import BLOCK_END, TEMPLATE, read_fitting, training_example
from data.prepare import ensure_data
from data.samples import (
    count_targets,
    length_sorted_batches,
    marked,
    micro_batches,
    plan_steps,
    related_records,
    say_cut_samples,
)
from data.tokenizer import Tokenizer
from lora import add_lora, quantize, save_adapter
from model import Transformer, load, save


@dataclass
class Settings:
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    data: str = opt("bigbench", "bigbench, bigbench-clean, alpaca, dolly, or a .json/.jsonl file of your own")
    out_dir: str = opt("out/sft", "folder for the adapter, the log and the state")
    resume: bool = opt(False, "continue the run in out_dir from its last save")
    # what is trained
    full: bool = opt(False, "train all weights instead of LoRA (about 3.4 GB; use --lr 5e-5)")
    no_int8: bool = opt(False, "keep the frozen base in float instead of int8 (LoRA only)")
    r: int = opt(8, "rank of the LoRA matrices; 8 as in the paper and in PEFT", 1)
    alpha: float = opt(16.0, "LoRA's output is scaled by alpha / r; 2 r is the usual choice", 1e-6)
    shots: int = opt(3, "prompts before the last record of a sample; as many as will be matched, or more")
    # optimisation
    epochs: int = opt(1, "passes over the records", 1)
    batch_size: int = opt(4, "samples in a step; with 8 a pass has too few steps and ends worse", 1)
    micro_tokens: int = opt(480, "tokens of a micro-batch: fewer take less memory and more time", 1)
    lr: float = opt(1e-3, "peak learning rate; LoRA wants ten times that of full fine-tuning", 1e-12)
    max_steps: int = opt(0, "stop after this many steps (to --resume later); 0: when the epochs are over")
    seed: int = opt(1337, "seed of LoRA's start, of the order of records and of their prompts")
    device: str = opt("auto", "auto (cuda if there is one, else cpu), cpu, cuda or mps")
    dtype: str = opt("auto", "auto (bfloat16 where the machine has it), bfloat16 or float32")


WARMUP = 0.05  # share of the steps in which the learning rate rises
GRAD_CLIP = 1.0  # longest gradient: above it a few strange records would set the direction
MAX_LENGTH = 512  # tokens of a sample; prompts that do not fit are left out
EVAL_EVERY = 40  # steps between validation losses; each also saves


# ---- the loss and the learning rate ----------------------------------------------------------------------

def answer_loss(model: Transformer, ids: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy (nats) of the answers' tokens; ids, targets (B, T), targets -1 where no loss.

    The head is a quarter of a token's work, so it sees only the N answer positions.
    """
    hidden = model(ids)[targets >= 0]  # (N, C)
    # in fp32: a softmax over 49,152 logits in bf16 would lose what tells them apart
    return F.cross_entropy(model.logits(hidden).float(), targets[targets >= 0], reduction="sum")


def learning_rate(step: int, steps: int, lr: float) -> float:
    """Linear warm-up, then a cosine from lr down to lr / 10."""
    warmup = max(1, int(WARMUP * steps))
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- the run ---------------------------------------------------------------------------------------------

def main(s: Settings) -> None:
    out = Path(s.out_dir)
    device, dtype = pick_device(s.device, s.dtype)
    rank, world, device = join_torchrun(device)
    if rank == 0 and not s.resume:
        runs.say_replaced(s, "base", "adapter", "data", "full")
    if s.full:
        runs.ignored(s, "with --full", "r", "alpha", "no_int8")

    # data: records -> examples with masks
    with main_process_first(rank, world):
        base, data = ensure_base(s.base), ensure_data(s.data)
    if s.full and out.resolve() == base.resolve():
        raise ValueError(f"--full would overwrite its own base {base}; choose another --out_dir.")
    tokenizer = Tokenizer(base)
    max_length = min(MAX_LENGTH, read_config(base)["max_position_embeddings"])
    records = read_fitting(data / "sft.jsonl", tokenizer, max_length)
    lengths = [len(training_example(tokenizer, [record], max_length)[0]) for record in records]
    plan = plan_steps(records, related_records(records), lengths, s.shots, s.batch_size, s.epochs, s.seed)
    say_cut_samples(sum(plan, []), lengths, len(tokenizer.encode(BLOCK_END)) - len(tokenizer.bos), max_length)
    schedule = len(plan)  # of the learning rate; --max_steps stops earlier on the same curve
    steps = min(schedule, s.max_steps or schedule)
    # Validation is without prompts: the plainest number, the same whatever --shots is.
    val = [training_example(tokenizer, [record], max_length)
           for record in read_fitting(data / "val.jsonl", tokenizer, max_length)]
    val_batches = [batch for rows in length_sorted_batches([len(ids) for ids, _ in val], s.batch_size)
                   for batch in micro_batches([val[i] for i in rows], s.micro_tokens)]

    # model: frozen base + LoRA, or all weights
    if s.full:
        # fp32 weights, since an update of 5e-5 is lost in bf16's 8 bits; the products still run in bf16
        # (autocast). Weight, gradient and two moments take 16 bytes a weight; LoRA needs them for 2% of all.
        model = load(base, torch.float32, device).requires_grad_(True)
        trained = list(model.parameters())
    else:
        model = load(base, dtype, device)
        if not s.no_int8:
            quantize(model)  # before LoRA: the adapter learns on what it will be used with
        trained = add_lora(model, s.r, s.alpha, generator=torch.Generator().manual_seed(s.seed))
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=s.full and dtype != torch.float32)
    # 0.95, not AdamW's 0.999: a hundred steps are too few for a memory of a thousand. LoRA's low rank is
    # regulariser enough, so there is no weight decay.
    optimizer = torch.optim.AdamW(trained, lr=s.lr, betas=(0.9, 0.95), weight_decay=0.0)
    names = {p: name for name, p in model.named_parameters()}
    run = runs.run_record(s, data, fingerprint(base))
    signature = {key: value for key, value in asdict(s).items()
                 if key not in ("resume", "max_steps", "device", "out_dir")}
    signature |= {"dtype": str(dtype), "base weights": run["base_id"], "records": run["data"]}
    start, tokens, seconds = runs.load_state(out, optimizer, names, signature) if s.resume else (0, 0, 0.0)
    if start >= steps:
        print(f"(the run in {out} has made all of its {steps} steps: nothing is left to do)")

    def save_all(progress: list[float]) -> None:
        if s.full:
            save(model, out, base)
        else:
            save_adapter(model, out, hub_name(base), run["base_id"], TEMPLATE)
        save_json(run, out / "run.json")
        runs.save_state(out, optimizer, names, progress, signature)

    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    print(f"base {base} in {dtype} on {device}: weights of {held / 1e6:.0f} MB, "
          f"{sum(p.numel() for p in trained) / 1e6:.2f} million of them trained; "
          f"{steps} steps of {s.batch_size} samples")
    example = training_example(tokenizer, [records[i] for i in plan[0][0]], max_length)
    print("one sample as the model reads it; only what stands between >>> and <<< has loss:\n"
          f"{marked(tokenizer, *example)}\n")
    log = runs.open_log(out / "log.jsonl", start)
    began = time.time() - seconds
    with runs.whole_steps() as interrupted:  # Ctrl-C lets a step finish
        for step in range(start, steps):
            # the step's samples; each of torchrun's processes takes its share
            examples = [training_example(tokenizer, [records[i] for i in sample], max_length)
                        for sample in plan[step]]
            mine = examples[rank::world]

            # forward and backward. Divide by the answer tokens of ALL micro-batches (and processes): a mean
            # of their means would weigh short answers more.
            answer_tokens = count_targets(examples)
            loss = 0.0
            for ids, targets in micro_batches(mine, s.micro_tokens):
                with autocast:
                    part = answer_loss(model, ids.to(device), targets.to(device)) / answer_tokens
                part.backward()  # gradients add up over the micro-batches
                loss += part.item()
            loss = all_reduce_sum(loss, device)
            for p in trained if world > 1 else ():  # a process without a record has no gradient yet
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
            norm = torch.nn.utils.clip_grad_norm_(trained, GRAD_CLIP).item()  # as it was before clipping
            # NaN stays NaN: better no step than one that spoils the adapter and the next save. A finite loss
            # may have an infinite gradient, which clipping turns into NaN.
            if not math.isfinite(loss + norm):
                raise ValueError(f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}; lower "
                                 f"--lr (the last good save is in {out}).")

            # update
            optimizer.param_groups[0]["lr"] = lr = learning_rate(step, schedule, s.lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # validate, log, save
            done, tokens = step + 1, tokens + sum(len(ids) for ids, _ in examples)
            line = {"step": done, "loss": round(loss, 4), "lr": round(lr, 7), "grad_norm": round(norm, 3),
                    "tokens": tokens, "seconds": round(time.time() - began, 2)}
            if done % EVAL_EVERY == 0 or done == steps:
                with torch.no_grad(), autocast:
                    part = sum(answer_loss(model, ids.to(device), targets.to(device)).item()
                               for ids, targets in val_batches[rank::world])
                line["val_loss"] = round(all_reduce_sum(part, device) / count_targets(val), 4)
            log.write(json.dumps(line) + "\n")
            log.flush()
            stop = all_reduce_sum(float(bool(interrupted)), device)  # once a step: all processes agree
            if rank == 0 and ("val_loss" in line or stop):
                save_all([done, tokens, line["seconds"]])
            left = (line["seconds"] - seconds) / (done - start) * (steps - done) / 60
            print(f"step {done}/{steps}  loss {loss:.3f} (nats a token)  lr {line['lr']:.1e}  "
                  f"{tokens / max(line['seconds'], 0.01):.0f} tokens/s  {left:.1f} min left"
                  + (f"  val loss {line['val_loss']:.3f}, saved" if "val_loss" in line else ""), flush=True)
            if stop:
                print(f"stopped after step {done}, saved in {out}; continue with --resume")
                raise KeyboardInterrupt
    tuned = {"base": s.out_dir, "adapter": "none", "out_dir": "out/rl_full"} if s.full else {
        "adapter": s.out_dir}
    if steps < schedule:
        print(f"(stopped by --max_steps after {steps} of {schedule} steps; --resume goes on)")
    print(f"saved in {out}. next: " + runs.command("train_rl.py", s, "base data seed device dtype", **tuned))


if __name__ == "__main__":
    cli(Settings, main)
