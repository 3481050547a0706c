"""All of PILLOW on one query (paper, figure 2): match prompts of the pool, show them, stream the answer.

    your instruction --> matcher --> m prompts of the pool --+
            |                                                v
            +-----------------------------------> [prompts, instruction] --> base + LoRA --> answer

It works at every stage: with nothing trained the base model answers alone; with out/sft the tuned model does;
with out/rl the matcher picks from the pool that it was trained on, or from any file given with --pool, since
it embeds prompts and does not number them. Without --prompt it asks for instructions until an empty line.

    python sample.py --pool data/example_pool.jsonl --prompt "Write the order code." --input "7 red tables"
    python sample.py --no_match --prompt "Write the order code." --input "7 red tables"
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from data.cli import cli, opt, typed

import torch
from torch import Tensor

import matcher as matching
from data.base_model import ensure_base
from data.device import pick_device
from data.instructions import NEXT_BLOCK, TEMPLATE, at_next_block, clean_answer, join_ids, query_text
from data.records import Record, read_pool
from data.runs import command, ignored
from data.tokenizer import Tokenizer
from lora import load_tuned
from model import generate


@dataclass
class Settings:
    prompt: str = opt("", "the query's instruction; empty: ask for queries; each line of a pipe is one")
    input: str = opt("", "the text that the instruction is about, if it needs one")
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    adapter: str = opt("out/sft", "folder of the LoRA adapter, or none for the bare base")
    matcher: str = opt("out/rl", "folder of the trained matcher, or none: the nearest prompts of --pool")
    pool: str = opt("", ".json/.jsonl file of prompts to pick from; empty: those the matcher was trained on")
    m: int = opt(0, "prompts to match; 0: as many as the matcher was trained with")
    no_match: bool = opt(False, "answer without matched prompts, to see what they do")
    max_new_tokens: int = opt(128, "longest answer, in tokens", 1)
    temperature: float = opt(0.0, "0: always the likeliest token; 1: draw as the model predicts")
    top_k: int = opt(0, "draw among the k likeliest tokens; 0: all")
    top_p: float = opt(1.0, "draw among the fewest tokens with this much probability; 1: all", 1e-6)
    device: str = opt("auto", "auto (cuda if there is one, else cpu), cpu, cuda or mps")


def draw(logits: Tensor, s: Settings, generator: torch.Generator | None) -> Tensor:
    """Logits (B, V) -> ids (B), drawn from softmax(logits / temperature) of the tokens that are left in."""
    if s.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / max(s.temperature, 0.01)  # x / 1e-39 would be infinite
    if 0 < s.top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(s.top_k).values[:, -1:], -torch.inf)
    probs = logits.softmax(-1)  # (B, V)
    if s.top_p < 1:  # the fewest tokens whose probabilities reach top_p; the likeliest one always stays
        ordered, index = probs.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= s.top_p] = 0  # minus its own: who crosses top_p stays
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


class Stream:
    """Prints an answer while it grows, holding back what may still become the template's next block."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def __call__(self, _row: int, token: int) -> None:
        self.ids.append(token)
        text = clean_answer(self.tokenizer, self.ids)  # the whole answer anew: a character may span tokens
        held = next((k for k in range(len(NEXT_BLOCK), 0, -1) if text.endswith(NEXT_BLOCK[:k])), 0)
        # nor half a character, nor white space that may turn out to be the end
        text = text[:len(text) - held].rstrip("\ufffd").rstrip()
        if text.startswith(self.shown):
            print(text[len(self.shown):], end="", flush=True)
            self.shown = text

    def end(self) -> None:
        print(clean_answer(self.tokenizer, self.ids)[len(self.shown):])


def main(s: Settings) -> None:
    device, dtype = pick_device(s.device)
    if s.top_p > 1:
        raise ValueError(f"--top_p {s.top_p} must be at most 1.")
    if s.input and not s.prompt.strip():
        raise ValueError("--input is given without --prompt; give both, or neither and type them.")
    if s.no_match:
        ignored(s, "with --no_match", "pool", "m", "matcher")
    if s.temperature == 0:
        ignored(s, "at --temperature 0", "top_k", "top_p")

    # what has been trained so far
    base = ensure_base(s.base)
    adapter = s.adapter
    if adapter != "none" and not Path(adapter, "adapter_config.json").exists():
        print(f"(no adapter in {s.adapter}: the base model answers; to tune it, run "
              + command("train_sft.py", s, "base device", out_dir=s.adapter) + ")")
        adapter = "none"
    model, model_id = load_tuned(base, adapter, TEMPLATE, dtype, device)
    tokenizer, generator = Tokenizer(base), torch.Generator(device).manual_seed(1337)
    matcher, pool, m = None, [], 1
    if not s.no_match and Path(s.matcher, "matcher.json").exists():
        matcher, pool, m = matching.load(s.matcher, model_id)  # with the pool it was trained on
    elif not s.no_match:
        what = "the nearest prompts of the pool are taken" if s.pool else "no prompts are matched"
        how = command("train_rl.py", s, "base adapter pool device", out_dir=s.matcher)
        print(f"(--matcher none: {what})" if s.matcher == "none"
              else f"(no matcher in {s.matcher}: {what}; to train one, run {how})")
    trained = matcher is not None
    if s.pool and not s.no_match:
        pool = read_pool(s.pool)
        vectors = matching.embed_records(model, tokenizer, pool)  # (P, E)
        matcher = matcher or matching.Matcher(vectors, hidden=1)  # untrained: nearest neighbours
        matcher.use_pool(vectors, matching.doubts(model, tokenizer, pool))
    if not s.no_match and not pool:
        ignored(s, "without a matcher or --pool", "m")
    m = s.m or m
    if 0 < len(pool) < m:
        print(f"(m = {m}, but the pool has {len(pool)} prompts: all are taken)")
        m = len(pool)

    @torch.no_grad()
    def answer(query: Record) -> None:
        prompts = []
        if matcher:
            vector = matching.embed_records(model, tokenizer, [query])  # (1, E)
            picks, log_probs, _ = matcher.act(vector, m, greedy=True)  # (1, m), (1, m)
            prompts = [pool[j] for j in picks[0].tolist()]
            # the policy's probability at this step, not a confidence in the answer
            for p, share in zip(prompts, log_probs[0].exp().tolist(), strict=True):
                print(f"matched with probability {share:.0%}" if trained else "nearest", end=": ")
                print(f"{p['instruction']} | {p['input']} -> {p['output']}")
        ids, kept = join_ids(tokenizer, prompts, tokenizer.encode(query_text(query)),
                             model.config.max_position_embeddings - s.max_new_tokens)
        if kept < len(prompts):
            print(f"(the first {len(prompts) - kept} matched prompts are left out: the context is full)")
        stream = Stream(tokenizer)
        def over(ids: list[int]) -> bool:
            return at_next_block(tokenizer, ids)
        [new] = generate(model, [ids], s.max_new_tokens, tokenizer.ends, over,
                         choose=lambda logits: draw(logits, s, generator), on_token=stream)
        stream.end()
        if len(new) == s.max_new_tokens and new[-1] not in tokenizer.ends and not over(new):
            print(f"(cut off after --max_new_tokens {s.max_new_tokens})", file=sys.stderr)

    if s.prompt.strip():
        answer({"task": "", "instruction": s.prompt, "input": s.input, "output": ""})
        return
    for instruction, text in typed():
        try:
            answer({"task": "", "instruction": instruction, "input": text, "output": ""})
        except ValueError as error:  # a query that is too long must not end the session
            print(error)
        except KeyboardInterrupt:  # nor must Ctrl-C, which ends the answer
            print("\n(stopped; an empty instruction ends)")


if __name__ == "__main__":
    cli(Settings, main)
