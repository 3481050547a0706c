"""Supervised fine-tuning: the first half of PILLOW (paper, section 3.1). LoRA on a frozen int8 base.

The loop is nanoGPT's: draw batches, sum the loss of the answers' tokens, step, log. What PILLOW adds: a
part of the samples is read with prompts in front (--shots), since that is how the model will be used. A
LoRA that never saw prompts loses by them what matching could gain.

Simplified: AdamW, cosine with warm-up, one process. Writes out/sft: the adapter in PEFT's format,
log.jsonl, and the state that --resume continues from.

    python train_sft.py
    python train_sft.py --full --out_dir out/full --lr 5e-5     # all weights, what LoRA is compared with
"""
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import model as llama
from data.instructions import TEMPLATE, Record, collate, length_sorted_batches, read_records, training_example
from data.prepare import cli, ensure_base, ensure_data, opt
from data.tokenizer import Tokenizer


@dataclass
class Settings:
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    data: str = opt("bigbench", "data set: bigbench, alpaca, dolly, or a .json/.jsonl file of your own")
    out_dir: str = opt("out/sft", "where adapter, log and state go")
    resume: bool = opt(False, "continue the run in out_dir from its last save")
    # what is trained
    full: bool = opt(False, "train all weights instead of LoRA (about 2.2 GB; lr 5e-5 suits it)")
    no_int8: bool = opt(False, "keep the frozen base as it is instead of int8 (LoRA only)")
    r: int = opt(8, "rank of the LoRA matrices; 8 is the paper's and PEFT's")
    alpha: float = opt(16.0, "LoRA output is scaled by alpha / r; 2 r is the usual choice")
    targets: str = opt("all-linear", "linears that get LoRA, comma-separated, or all-linear")
    # prompts in front of training samples
    shots: int = opt(1, "up to this many prompts before a sample; as many as train_rl.py will match")
    shots_share: float = opt(0.5, "share of the samples that get prompts; the rest keeps zero-shot use alive")
    # optimisation
    epochs: int = opt(2, "passes over the records; a third one overfits 1,000 records")
    batch_size: int = opt(16, "records in a micro-batch, of near-equal length")
    grad_accum: int = opt(1, "micro-batches in a step")
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
    would give; the fourth is any record, so that the model learns to look at a prompt before copying from
    it."""
    if shots == 0 or rng.random() >= share or len(records) == 1:
        return []
    own = [r for r in records if r["task"] == records[i]["task"] and r is not records[i]]
    others = [r for r in records if r is not records[i]]
    return [rng.choice(own if own and rng.random() < 0.75 else others) for _ in range(rng.randint(1, shots))]


def epoch_batches(records: list[Record], tokenizer: Tokenizer, s: Settings, epoch: int) -> list[list]:
    """One epoch's optimiser steps, each a list of micro-batches (ids, targets).

    A function of (seed, epoch) alone: a resumed run skips to its step and sees what it would have seen.
    """
    rng = random.Random(f"{s.seed}:{epoch}")
    examples = [training_example(tokenizer, record, pick_exemplars(records, i, s.shots, s.shots_share, rng),
                                 s.max_length) for i, record in enumerate(records)]
    examples = [e for e in examples if e is not None]
    order = length_sorted_batches([len(ids) for ids, _ in examples], s.batch_size,
                                  torch.Generator().manual_seed(rng.getrandbits(63)))
    micro = [[examples[i] for i in batch] for batch in order]
    return [micro[i:i + s.grad_accum] for i in range(0, len(micro), s.grad_accum)]


def answer_loss(model: llama.Transformer, ids: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of the answers' tokens. The head, a quarter of the work, sees those positions
    alone."""
    hidden = model(ids)[targets >= 0]  # (N, C): N answer tokens of the whole batch
    return F.cross_entropy(model.head(hidden).float(), targets[targets >= 0], reduction="sum")


def learning_rate(step: int, steps: int, s: Settings) -> float:
    warmup = max(1, int(s.warmup * steps))
    if step < warmup:
        return s.lr * (step + 1) / warmup
    return s.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def main(s: Settings) -> None:
    out = Path(s.out_dir)
    device, dtype = llama.pick_device(s.device, s.dtype)
    if min(s.epochs, s.batch_size, s.grad_accum, s.eval_every, s.r) < 1:
        raise ValueError("--epochs, --batch_size, --grad_accum, --eval_every and --r must be 1 or more.")

    # ---- data: records -> examples with masks ------------------------------------------------------------
    base, data = ensure_base(s.base), ensure_data(s.data)
    tokenizer = Tokenizer(base)
    records, val_records = read_records(data / "sft.jsonl"), read_records(data / "val.jsonl")
    fitting = [r for r in records if training_example(tokenizer, r, [], s.max_length)]
    if not fitting:
        raise ValueError(f"{data / 'sft.jsonl'}: no record fits in --max_length {s.max_length}; raise it.")
    val = [training_example(tokenizer, r, [], s.max_length) for r in val_records]
    val = [e for e in val if e is not None]
    val_batches = [collate([val[i] for i in batch])
                   for batch in length_sorted_batches([len(ids) for ids, _ in val], 32)]
    steps_per_epoch = math.ceil(math.ceil(len(fitting) / s.batch_size) / s.grad_accum)
    schedule = s.epochs * steps_per_epoch  # the learning rate's; --max_steps stops earlier on the same curve
    steps = min(schedule, s.max_steps or schedule)

    # ---- model: frozen base + LoRA, or all weights -------------------------------------------------------
    if s.full:  # fp32 weights: an update of lr * 1 is lost in bf16's 8 bits; the products still run in bf16
        model = llama.load(base, torch.float32, device).requires_grad_(True)
        trained = list(model.parameters())
    else:
        model = llama.load(base, dtype, device)
        if not s.no_int8:
            lora.quantize(model)
        targets = lora.ALL_LINEAR if s.targets == "all-linear" else s.targets.split(",")
        trained = lora.add_lora(model, s.r, s.alpha, targets, torch.Generator().manual_seed(s.seed))
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=s.full and dtype != torch.float32)
    optimizer = torch.optim.AdamW(trained, lr=s.lr, betas=(0.9, 0.95), weight_decay=s.weight_decay)
    names = {id(p): n for n, p in model.named_parameters()}

    base_id = "" if s.full else llama.fingerprint(base)  # reads the whole base: once, not at every save

    def save(step: int) -> None:
        """Weights for use, and weights + optimiser for --resume. All under temporary names, then renamed."""
        if s.full:
            lora.save_model(model, out, base)
        else:
            lora.save_adapter(model, out, str(base), base_id, TEMPLATE)
        state = {f"weight.{names[id(p)]}": p for p in trained}
        for p, moments in optimizer.state.items():
            state |= {f"{key}.{names[id(p)]}": value for key, value in moments.items()}
        lora.save_tensors(state, out / "state.safetensors", {"step": step, "settings": json.dumps(asdict(s))})

    start = 0
    if s.resume:
        state, meta = lora.load_tensors(out / "state.safetensors")
        changed = [k for k, v in json.loads(meta["settings"]).items()
                   if v != getattr(s, k)
                   and k not in ("resume", "max_steps", "device", "eval_every", "out_dir")]
        if changed:
            raise ValueError(f"{out}: the run to resume had other settings for {changed}; use the same, "
                             "or another --out_dir.")
        start = int(meta["step"])
        for p in trained:
            name = names[id(p)]
            p.data.copy_(state[f"weight.{name}"])
            if start:  # an interrupt before the first step leaves AdamW without moments
                optimizer.state[p] = {k: state[f"{k}.{name}"].to(p.device if k != "step" else "cpu")
                                      for k in ("step", "exp_avg", "exp_avg_sq")}

    print(f"base {base} in {dtype}, {lora.memory(model)}, device {device}")
    print(f"{len(fitting)} records ({len(records) - len(fitting)} too long), {len(val)} for validation; "
          f"{steps} steps of {s.batch_size * s.grad_accum} records")
    ids, n = epoch_batches(fitting, tokenizer, s, 0)[0][0][0]
    print(f"one sample as the model reads it, the part with loss between >>> and <<<:\n"
          f"{tokenizer.decode(ids[:-n])}>>>{tokenizer.decode(ids[-n:-1])}<EOS><<<\n")

    @torch.no_grad()
    def validation_loss() -> float:
        with autocast:
            total = sum(answer_loss(model, i.to(device), t.to(device)).item() for i, t in val_batches)
        return total / sum((t >= 0).sum().item() for _, t in val_batches)

    # ---- the loop ----------------------------------------------------------------------------------------
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log.jsonl", "a" if s.resume else "w", encoding="utf-8")
    step, began, tokens_seen = start, time.time(), 0
    try:
        for epoch in range(start // steps_per_epoch, s.epochs):
            for place, micro_batches in enumerate(epoch_batches(fitting, tokenizer, s, epoch)):
                if epoch * steps_per_epoch + place < start or step >= steps:
                    continue
                batches = [collate(examples) for examples in micro_batches]
                tokens_seen += sum(len(ids) for examples in micro_batches for ids, _ in examples)
                # Trap 3: divide by the answer tokens of ALL micro-batches; a mean of means weighs short
                # ones more.
                answer_tokens = sum((targets >= 0).sum().item() for _, targets in batches)
                loss = 0.0
                for ids, targets in batches:
                    with autocast:
                        part = answer_loss(model, ids.to(device), targets.to(device)) / answer_tokens
                    part.backward()
                    loss += part.item()
                if not math.isfinite(loss):
                    raise ValueError(f"step {step}: the loss is {loss}; the last save is in {out}, "
                                     "lower --lr and --resume.")
                norm = torch.nn.utils.clip_grad_norm_(trained, s.grad_clip).item()
                lr = learning_rate(step, schedule, s)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                line = {"step": step, "loss": round(loss, 4), "lr": round(lr, 7), "grad_norm": round(norm, 3),
                        "tokens": tokens_seen, "seconds": round(time.time() - began, 2)}
                if step % s.eval_every == 0 or step == steps:
                    line["val_loss"] = round(validation_loss(), 4)
                    save(step)
                note = f"  val loss {line['val_loss']:.3f}, saved" if "val_loss" in line else ""
                print(f"step {step}/{steps}  loss {loss:.3f} (nats a token)  lr {lr:.1e}  "
                      f"{tokens_seen / max(line['seconds'], 0.01):.0f} tokens/s  "
                      f"{line['seconds'] / 60:.1f} min{note}",
                      flush=True)
                log.write(json.dumps(line) + "\n")
                log.flush()
    except KeyboardInterrupt:
        save(step)
        print(f"\nstopped at step {step}, saved in {out}; continue with --resume")
        raise
    print(f"saved in {out}. next: python train_rl.py"
          + (f" --base {out} --adapter none --out_dir out/rl_full" if s.full else ""))


if __name__ == "__main__":
    cli(Settings, main)
