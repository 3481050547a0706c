"""Plumbing: where a run computes, in which number format, and as which of torchrun's processes.

Try: python -c "from data.device import *; print(pick_device('auto'))"
"""
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# oneDNN keeps 1,024 kernels, and each new length of a batch makes new ones. 64 are enough, and halve the peak
# memory (assets/EXPERIMENTS.md). PyTorch reads both variables at the first matrix product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def pick_device(device: str, dtype: str = "auto") -> tuple[str, torch.dtype]:
    """What --device and --dtype mean on this machine. "auto" is cuda where there is one, and bfloat16 where
    the processor multiplies it natively: emulated bf16 is several times slower than float32."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device) or dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--device {device} --dtype {dtype}: choose auto, cpu, cuda or mps, and auto, "
                         "bfloat16 or float32.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if int(number or 0) >= there[kind]:
        raise ValueError(f"--device {device}: this machine (or this PyTorch) has none; choose cpu.")
    if dtype == "auto":
        cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
        # is_bf16_supported() is true where bf16 is emulated (a T4); native it is from capability 8.0 on
        native = torch.cuda.get_device_capability(device) >= (8, 0) if "cuda" in device else (
            cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
        dtype = "bfloat16" if native else "float32"
    return device, getattr(torch, dtype)


def join_torchrun(device: str) -> tuple[int, int, str]:
    """(rank, world, device): which of torchrun's processes this is, of how many, and where it computes.
    Without torchrun: process 0 of 1."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
        if rank:
            # process 0 prints, fetches, logs and saves for all
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return rank, world, device


@contextmanager
def main_process_first(rank: int, world: int) -> Iterator[None]:
    """Process 0 goes through the body before the others, who then find what it has fetched."""
    if rank:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


def processes() -> tuple[int, int]:
    """(rank, world) once join_torchrun was called; else process 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce_sum(number: float, device: str) -> float:
    """The sum of all processes' numbers; without torchrun the number itself."""
    if not dist.is_initialized():
        return number
    total = torch.tensor(number, dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return total.item()


def shared_out(batches: list, work: Callable[[object], object]) -> Iterator:
    """work(batch) of each batch, in order. Each of torchrun's processes does its share, all get all."""
    rank, world = processes()
    for n in range(0, len(batches), world):
        done = [work(batches[n + rank])] if n + rank < len(batches) else []
        parts = [done] * world
        if world > 1:
            dist.all_gather_object(parts, done)
        yield from sum(parts, [])
