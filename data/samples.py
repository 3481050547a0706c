"""Records -> the samples, steps and micro-batches that train_sft.py learns from.

A sample is several related records in a row: each is an answer to learn, and a prompt of those behind it.
Steps are samples of near-equal length, so that hardly anything is padding; micro-batches bound the memory.
The batches serve matcher.py and train_rl.py too.
"""
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from data.records import Record
from data.scores import words
from data.tokenizer import Tokenizer

RELATED_SHARE = 0.9  # share of a sample's records that are of one task, as if a good matcher had chosen


# ---- samples and steps -----------------------------------------------------------------------------------

def related_records(records: list[Record]) -> list[list[int]]:
    """For each record those that its prompts are drawn from: all of its task. A record without a task, or
    alone in it, gets the 8 that share most of its rarest words: random ones would teach it to ignore prompts.
    Only 50 holders of a word are looked at, and no two records are compared: 52,002 records take seconds."""
    of_task, holders = defaultdict(list), defaultdict(list)  # task or word -> records
    asked = [set(words(f"{record['instruction']} {record['input']}")) for record in records]
    for i, record in enumerate(records):
        of_task[record["task"]].append(i)
        for word in asked[i]:
            holders[word].append(i)
    related = []
    for i, record in enumerate(records):
        if record["task"] and len(of_task[record["task"]]) > 1:
            related.append(of_task[record["task"]])
        else:
            rarest = sorted(asked[i], key=lambda word: (len(holders[word]), word))[:8]
            shared = Counter(j for word in rarest for j in holders[word][:50] if j != i)
            related.append([j for j, _ in shared.most_common(8)])
    return related


def deal(records: list[Record], related: list[list[int]], size: int, rng: random.Random) -> list[list[int]]:
    """One pass: samples of `size` related records each, as numbers. Every record stands in one of them.

    Where too few of its kind are left, records that were dealt already stand beside it once more. A few
    places are exchanged, so that the model learns to look at a prompt before it imitates it.
    """
    samples, free = [], set(range(len(records)))
    for i in rng.sample(range(len(records)), len(records)):
        if i in free:
            others = [j for j in rng.sample(related[i], min(len(related[i]), 4 * size)) if j != i]
            others.sort(key=lambda j: j not in free)  # stable: those not yet dealt come first, still shuffled
            samples.append([i, *others[:size - 1]])
            rng.shuffle(samples[-1])
            free -= set(samples[-1])
    places = [(sample, n) for sample in samples for n in range(len(sample)) if rng.random() >= RELATED_SHARE]
    moved = rng.sample([sample[n] for sample, n in places], len(places))
    for (sample, n), j in zip(places, moved, strict=True):
        sample[n] = j if j not in sample else sample[n]
    return samples


def plan_steps(records: list[Record], related: list[list[int]], lengths: list[int], shots: int,
               batch_size: int, epochs: int, seed: int) -> list[list[list[int]]]:
    """All optimiser steps of the run: each is batch_size samples of near-equal length, a sample is a list of
    record numbers. It depends on its arguments only, so a resumed run sees what it would have seen."""
    steps = []
    for epoch in range(epochs):
        rng = random.Random(f"{seed}:{epoch}")
        samples = deal(records, related, 1 + shots, rng)
        order = length_sorted_batches([sum(lengths[i] for i in sample) for sample in samples], batch_size,
                                      torch.Generator().manual_seed(rng.getrandbits(63)))
        steps += [[samples[i] for i in step] for step in order]
    return steps


def say_cut_samples(samples: Sequence[Sequence[int]], lengths: Sequence[int], between: int,
                    max_length: int) -> None:
    """Says how many records training_example will leave out. lengths: each record's own; between: what two in
    a row add to that (BLOCK_END, less a second bos)."""
    cut = 0
    for sample in samples:
        total = sum(lengths[i] for i in sample) + between * (len(sample) - 1)
        for i in sample[:-1]:
            cut, total = cut + (total > max_length), total - (lengths[i] + between) * (total > max_length)
    if cut:
        print(f"({cut} of {sum(map(len, samples))} places in the samples are left out: a sample has at most "
              f"{max_length} tokens; lower --shots)")


def marked(tokenizer: Tokenizer, ids: list[int], targets: list[int]) -> str:
    """A sample as text, with >>> and <<< around what has loss."""
    text, asked_for = "", [-1, *targets[:-1]]  # of each id
    for answer, part in groupby(zip(ids, asked_for, strict=True), key=lambda pair: pair[0] == pair[1]):
        piece = tokenizer.decode([i for i, _ in part])
        text += f">>>{piece}<EOS><<<" if answer else piece
    return text


# ---- batches ---------------------------------------------------------------------------------------------

def length_sorted_batches(lengths: Sequence[int], batch_size: int,
                          generator: torch.Generator | None = None) -> list[list[int]]:
    """Indices in batches of near-equal length, so that hardly anything is padding. With a generator, equal
    lengths are shuffled among themselves, and so is the order of the batches."""
    def order(n: int) -> list[int]:
        return list(range(n)) if generator is None else torch.randperm(n, generator=generator).tolist()
    rows = sorted(order(len(lengths)), key=lambda i: lengths[i])  # stable: the shuffle decides among equals
    batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in order(len(batches))]


def collate(examples: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Training examples -> ids (B, T) and targets (B, T), padded at the right; -1: no loss.

    The pad id is never looked at: causal attention cannot see to the right, and its targets are -1.
    """
    ids, targets = ([torch.tensor(row) for row in rows] for rows in zip(*examples, strict=True))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(targets, batch_first=True, padding_value=-1)


def micro_batches(examples: Sequence, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """A step's examples -> micro-batches (ids, targets) of at most `tokens` padded tokens; a longer example
    gets its own. What autograd keeps until backward grows with these tokens: this bounds a run's memory."""
    pieces = []
    for example in sorted(examples, key=lambda e: -len(e[0])):  # the first of a piece is its longest
        if not pieces or (len(pieces[-1]) + 1) * len(pieces[-1][0][0]) > tokens:
            pieces.append([])
        pieces[-1].append(example)
    return [collate(piece) for piece in pieces]


def count_targets(examples: Sequence) -> int:
    """How many tokens of these examples have loss."""
    return sum(target >= 0 for _, targets in examples for target in targets)
