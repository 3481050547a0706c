"""All of PILLOW on one prompt (paper, figure 2): match prompts of the pool, show them, stream the answer.

    your instruction --> matcher --> m prompts of the pool --+
            |                                                v
            +-----------------------------------> [prompts, instruction] --> base + LoRA --> answer

Works at every stage: with nothing trained the base model answers alone; with out/sft the tuned model does;
with out/rl the matcher picks from the pool it was trained on, or from any file given with --pool, since it
embeds prompts and does not index them. Without --prompt it asks for instructions until an empty line.

    python sample.py --pool data/example_pool.jsonl --prompt "Write the order code." --input "7 red tables"
"""
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import matcher as matching
import model as llama
from data.instructions import NEXT_BLOCK, TEMPLATE, Record, answering_prompt, clean_answer
from data.prepare import cli, ensure_base, opt
from data.tokenizer import Tokenizer


@dataclass
class Settings:
    prompt: str = opt("", "the instruction; empty: ask for one after the other")
    input: str = opt("", "the text that the instruction is about, if it needs one")
    base: str = opt("smollm2", "base model: smollm2, a Hugging Face folder, or owner/name on the hub")
    adapter: str = opt("out/sft", "folder of the LoRA adapter, or none for the bare base")
    matcher: str = opt("out/rl", "folder of the trained matcher")
    pool: str = opt("", ".json/.jsonl file of prompts to pick from; empty: those the matcher was trained on")
    m: int = opt(0, "prompts to match; 0: as many as the matcher was trained with")
    no_match: bool = opt(False, "answer without matched prompts, to see what they do")
    num_samples: int = opt(1, "answers to give (with --temperature above 0 they differ)")
    max_new_tokens: int = opt(128, "longest answer, in tokens")
    temperature: float = opt(0.0, "0: always the likeliest token; 1: sample as the model predicts")
    top_k: int = opt(0, "sample among the k likeliest tokens; 0: all")
    top_p: float = opt(1.0, "sample among the fewest tokens with this much probability; 1: all")
    seed: int = opt(1337, "seed of the sampling")
    device: str = opt("auto", "auto (cuda if there is one, else cpu), cpu, cuda, mps")
    dtype: str = opt("auto", "auto (bfloat16 where the machine has it), bfloat16, float32")


@torch.no_grad()
def match(matcher: matching.Matcher, query: Tensor, pool: Tensor, m: int) -> list[tuple[int, float]]:
    """The policy's greedy picks for one query (1, 2 C), each with its probability at its step: among the
    candidates not yet picked, so no chance of being right."""
    picks, whole, _ = matcher.episodes(query, pool, m, greedy=True)  # (1, m), (1)
    # log pi of the first 1, 2, .. m picks: what each adds is the log-probability of its step
    # (m is 1 to 4, and an episode costs far less than a token: clearer than returning each step's)
    sums = [matcher.episodes(query, pool, t, picks=picks[:, :t])[1] for t in range(1, m)]
    steps = torch.cat([*sums, whole]).diff(prepend=torch.zeros(1)).exp()
    return list(zip(picks[0].tolist(), steps.tolist(), strict=True))


def draw(logits: Tensor, s: Settings, generator: torch.Generator | None) -> Tensor:
    """Logits (B, V) -> ids (B), drawn from softmax(logits / temperature) of the tokens that are left in."""
    if s.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / s.temperature
    if 0 < s.top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(s.top_k).values[:, -1:], -torch.inf)
    probs = logits.softmax(-1)  # (B, V)
    if s.top_p < 1:  # the fewest tokens whose probabilities reach top_p; the most likely one always stays
        ordered, index = probs.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= s.top_p] = 0  # minus its own: the one that crosses stays
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
        # nor half a character, nor white space that the answer may end before
        text = text[:len(text) - held].rstrip("\ufffd").rstrip()
        if text.startswith(self.shown):
            print(text[len(self.shown):], end="", flush=True)
            self.shown = text

    def end(self) -> None:
        print(clean_answer(self.tokenizer, self.ids)[len(self.shown):])


def main(s: Settings) -> None:
    device, dtype = llama.pick_device(s.device, s.dtype)
    if (min(s.temperature, s.top_k, s.m) < 0 or not 0 < s.top_p <= 1
            or min(s.max_new_tokens, s.num_samples) < 1 or 0 < s.temperature < 0.01):  # x / 1e-39 is infinite
        raise ValueError("--temperature (0, or 0.01 and more), --top_k and --m must be 0 or more, --top_p "
                         "above 0 and up to 1, --max_new_tokens and --num_samples 1 or more.")

    # ---- what has been trained so far --------------------------------------------------------------------
    base = ensure_base(s.base)
    if s.adapter != "none" and not Path(s.adapter, "adapter_config.json").exists():
        print(f"(no adapter in {s.adapter}: the base model answers alone; to tune it, python train_sft.py)")
        s.adapter = "none"
    model, model_id = matching.load_tuned(base, s.adapter, TEMPLATE, dtype, device)
    tokenizer = Tokenizer(base)
    matcher, pool, m = None, [], 1
    if not s.no_match and Path(s.matcher, "matcher.json").exists():
        matcher, pool, m = matching.load(s.matcher, model_id)  # with the pool it was trained on
        vectors = matcher.pool  # (P, 2 C)
    elif not s.no_match:
        print(f"(no matcher in {s.matcher}: " + ("the nearest prompts of the pool are taken" if s.pool else
              "no prompts are matched") + "; to train one, python train_rl.py)")
    if s.pool and not s.no_match:  # a pool of your own: any will do, since prompts are embedded, not indexed
        pool = matching.read_pool(s.pool)
        vectors = matching.embed_records(model, tokenizer, pool)  # (P, 2 C)
        matcher = matcher or matching.Matcher(vectors, hidden=1)  # untrained: nearest neighbours
    m = min(s.m or m, len(pool))
    if matcher:  # `episodes` takes m candidates at least: with this, `match`'s shorter ones take as many
        matcher.candidates = max(m, matcher.candidates)
    generator = torch.Generator(device).manual_seed(s.seed)

    def answer(query: Record) -> None:
        exemplars = []
        if matcher:
            vector = matching.embed_records(model, tokenizer, [query])  # (1, 2 C)
            for j, probability in match(matcher, vector, vectors, m):
                p = pool[j]
                print(f"matched ({probability:.0%}): {p['instruction']} | {p['input']} -> {p['output']}")
                exemplars.append(p)
        # The best match was picked first and stands first, farthest from the query. In a full context the
        # farthest goes first: what is nearest to the query weighs most.
        ids, kept = answering_prompt(tokenizer, query, exemplars,
                                     model.config.max_position_embeddings - s.max_new_tokens)
        if kept < len(exemplars):
            print(f"(the first {len(exemplars) - kept} matched prompts are left out: the context is full)")
        # One generator for all answers: they differ among themselves, and --seed repeats the whole run.
        for _ in range(s.num_samples):
            stream = Stream(tokenizer)
            llama.generate(model, [ids], s.max_new_tokens, tokenizer.eos, tokenizer.encode(NEXT_BLOCK),
                           choose=lambda logits: draw(logits, s, generator), on_token=stream)
            stream.end()

    if s.prompt.strip():
        answer({"task": "", "instruction": s.prompt, "input": s.input, "output": ""})
        return
    print("type an instruction (then its input, or nothing); an empty instruction ends")
    with suppress(EOFError):
        while instruction := input("instruction> ").strip():
            answer({"task": "", "instruction": instruction, "input": input("input> ").strip(), "output": ""})


if __name__ == "__main__":
    cli(Settings, main)
