"""LoRA on a frozen int8 base: the two layers that make fine-tuning fit on a laptop.

PILLOW tunes its LLM with LoRA (paper, section 3.1; LoRA: arXiv 2106.09685, section 4.1):

    x (.., in) --> frozen W, int8 (out, in) ----------------> + --> y (.., out)
         \\--> A (r, in), trained --> B (out, r), trained --> * alpha / r

B starts at zero, so at step 0 the model is the base exactly; a random one would disturb it. A must not be
zero too. With g the gradient of y, the two that are trained get

    g_A = alpha / r (g B)^T x        g_B = alpha / r g^T (x A^T)

Each contains the other: at step 0 only B moves, and were both zero, nothing ever would.

int8 is of weights alone, symmetric, with one scale an output row:

    a row of W     0.50   -1.27    0.03      scale = 1.27 / 127 = 0.01: the row's largest becomes 127
    kept, q          50    -127       3      a byte each; q * scale is the row again, to within scale / 2

A LoRA layer *holds* whatever linear it adapts, and calls it: quantisation and adaptation do not know of
each other.

Simplified: no dropout, no per-module ranks, no bias training. Files are PEFT's: either reads the other's.

Try: python -c "import model, lora; print(lora.quantize(model.load('data/base')).layers[0].self_attn)"
"""
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from data.prepare import put
from model import open_tensors, read_json

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Not v and down: 28% of the blocks' weights, and two thirds of what rounding costs. Without them SmolLM2-135M
# is 1.2e-3 nats a token (KL divergence) from fp32 instead of 3.9e-3, its perplexity -0.07% instead of -0.53%
# (20,400 tokens; standard errors 0.04% and 0.07%).
INT8_LINEAR = ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj")
PEFT_PREFIX = "base_model.model.model."  # without it PEFT loads nothing and only warns


# ---- the frozen base in int8 ------------------------------------------------------------------------------

def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 (out, in) and a scale for each output row -> the weight."""
    return q.to(dtype).mul_(scale.to(dtype)[:, None])


class Int8MatMul(torch.autograd.Function):
    """y = x @ W^T, keeping only the int8 of W for backward.

    The plain expression would make autograd keep a float copy of every weight: 1 + 2 bytes a weight, worse
    than a bf16 base. Casting again in backward costs little time and no memory; gradients are equal.
    """

    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(q, scale)
        return F.linear(x, dequantize(q, scale, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ dequantize(*ctx.saved_tensors, grad.dtype), None, None  # the base is frozen: x alone


class Int8Linear(nn.Module):
    """A frozen linear whose weight is int8: a quarter of fp32's bytes, half of bf16's."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()  # (out, in)
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out): a row's largest becomes 127
        # Buffers, not parameters: no optimiser can touch them.
        self.register_buffer("q", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # (out, in), fp32: what it computes with, for merging and for files
        return dequantize(self.q, self.scale, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        decoding = x.numel() <= 4 * x.size(-1) and not torch.is_grad_enabled()
        if decoding and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            # A few rows are bound by reading weights. This kernel reads the int8 itself: 27 us for one row
            # of 1536 x 576, where casting first takes 222; from about 16 rows on it is the slower one.
            y = torch._weight_int8pack_mm(x.reshape(-1, x.size(-1)), self.q, self.scale.to(x.dtype))
            y = y.view(*x.shape[:-1], -1)
        else:
            y = Int8MatMul.apply(x, self.q, self.scale)
        return y if self.bias is None else y + self.bias


# ---- the adapter ------------------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """y = x W^T + (x A^T) B^T alpha / r around any linear. A and B are fp32 whatever the base is: an update
    of 1e-4 of a number is lost in bf16's 8 bits."""

    def __init__(self, base: nn.Linear | Int8Linear, r: int, alpha: float,
                 generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.scaling = base, alpha / r
        weight = base.weight  # once: an Int8Linear computes it anew each time
        (n_out, n_in), device = weight.shape, weight.device
        # A: uniform with nn.Linear's bound, as in PEFT (the LoRA paper: Gaussian). B: zero. Drawn on the
        # CPU: the same seed gives the same A on every device.
        start = (torch.rand(r, n_in, generator=generator) * 2 - 1) / math.sqrt(n_in)
        self.A = nn.Parameter(start.to(device))  # (r, in)
        self.B = nn.Parameter(torch.zeros(n_out, r, device=device))  # (out, r)
        self.merged: Tensor | None = None  # (out, in) while merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return F.linear(x, self.merged, self.base.bias)
        # alpha / r goes to B, where numbers are few
        A, sB = self.A.to(x.dtype), (self.B * self.scaling).to(x.dtype)
        return self.base(x) + (x @ A.T) @ sB.T  # (.., out); x A^T is (.., r)


def replace_linears(model: nn.Module, names: Iterable[str], make) -> int:
    """Puts make(linear) where the blocks have a linear whose last name is in `names`; returns how many."""
    found = [(module, name) for module in model.layers.modules() for name, child in module.named_children()
             if name in names and isinstance(child, (nn.Linear, Int8Linear))]
    for module, name in found:  # the names alone: a list of the linears would keep all the float weights
        setattr(module, name, make(getattr(module, name)))
    return len(found)


def quantize(model: nn.Module) -> nn.Module:
    """INT8_LINEAR of all blocks to int8, in place, one at a time. Embedding, norms and head stay as they are:
    the tied embedding is read by row on the way in, and as the head it decides every token."""
    replace_linears(model, INT8_LINEAR, Int8Linear)
    return model


def add_lora(model: nn.Module, r: int, alpha: float, targets: Iterable[str] = ALL_LINEAR,
             generator: torch.Generator | None = None) -> list[nn.Parameter]:
    """Freezes the model, wraps the targets, returns what is trained; ValueError: a target matches nothing."""
    model.requires_grad_(False)
    for target in targets:
        if not replace_linears(model, [target], lambda linear: LoRALinear(linear, r, alpha, generator)):
            raise ValueError(f"LoRA target '{target}' is no linear of this model; choose among {ALL_LINEAR}.")
    return [p for p in model.parameters() if p.requires_grad]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model: nn.Module) -> None:
    """W + B A * alpha / r as one dense weight for each LoRA layer: nothing extra in a forward pass.

    Explicit, never on eval(), where it would edit weights behind one's back. An int8 base is
    dequantised, since the adapter was trained against that; it is kept, so unmerge is exact. To round the sum
    to int8 again would cost 0.04 nats a token (measured after train_sft.py, standard error 0.007).
    """
    for layer in lora_layers(model).values():
        if layer.merged is not None:
            raise ValueError("this LoRA layer is merged already; merging twice would add it twice.")
        weight = layer.base.weight.float() + layer.B @ layer.A * layer.scaling
        layer.merged = weight.detach().to(model.norm.weight.dtype)


def unmerge(model: nn.Module) -> None:
    for layer in lora_layers(model).values():
        if layer.merged is None:
            raise ValueError("this LoRA layer is not merged.")
        layer.merged = None


class PackedLinear(nn.Module):
    """A frozen weight laid out once as oneDNN's kernels read it, which F.linear does at every call: the same
    bits, 1.4 to 2.8 times as fast for up to 32 rows, 1.1 times for many."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight, None), bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """Makes a model that will only answer faster where that is possible (CPU, bf16, oneDNN): merged LoRA
    layers (what is under them goes), plain linears and the head are packed, a tied head into a copy of its
    own (57 MB of SmolLM2). There is no way back to training or to a file."""
    weight = model.norm.weight
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not (
            torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    found = [(module, name) for module in model.modules() if not isinstance(module, LoRALinear)
             for name, child in module.named_children() if isinstance(child, (nn.Linear, LoRALinear))]
    for module, name in found:  # one at a time: what a packed one replaces is freed before the next is made
        linear = getattr(module, name)
        weight, bias = (linear.merged, linear.base.bias) if isinstance(linear, LoRALinear) else (
            linear.weight, linear.bias)
        setattr(module, name, PackedLinear(weight, bias))
    if model.lm_head is None:  # tied: the embedding's rows are still read as they are
        model.lm_head = PackedLinear(model.embed_tokens.weight, None)


# ---- files ------------------------------------------------------------------------------------------------

@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `path` at the end: a killed run leaves the old file or the new
    one, never half of one."""
    part = path.with_name(path.name + ".tmp")  # a folder, since safetensors has a temporary file of its own
    shutil.rmtree(part, ignore_errors=True)  # what a killed run left
    part.mkdir(parents=True)
    try:
        yield part / path.name
        put(part / path.name, path)
    except SafetensorError as error:  # what a full disk becomes on the way through safetensors
        raise OSError(f"{path}: not written ({error}); free some space and run it again.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)  # a full disk: what was half written goes


def json_bytes(content: dict) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def save_json(content: dict, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(json_bytes(content))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict | None = None,
                 beside: dict[str, bytes] | None = None) -> None:
    """Tensors, and beside them the small files that say how to read them. A run that is killed must not leave
    its tensors with an older run's alpha or base: where these files change, the old tensors go first. On a
    full disk nothing goes, since the new ones must be written by then."""
    with replacing(path) as temporary:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary,
                  metadata={k: str(v) for k, v in (metadata or {}).items()})
        temporary.chmod(0o644)  # safetensors writes it readable for its owner alone
        for name, content in (beside or {}).items():
            file = path.with_name(name)
            if not file.exists() or file.read_bytes() != content:
                path.unlink(missing_ok=True)
                with replacing(file) as new:
                    new.write_bytes(content)


def plot_log(log: Path, unit: str, *keys: str) -> None:
    """A run's log, its `keys` over the steps, as a picture beside it; none where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a screen
    except ImportError:
        return
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for key in keys:
        points = [(line["step"], line[key]) for line in lines if key in line]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < len(lines) else "", label=key)
    axis.set(xlabel="step", ylabel=unit)
    axis.legend()
    axis.grid(alpha=0.3)
    with replacing(log.with_suffix(".png")) as file:
        figure.savefig(file, dpi=120)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; FileNotFoundError or ValueError in one sentence."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}


def save_model(model: nn.Module, folder: str | Path, base: str | Path) -> None:
    """All weights (LoRA merged) as a Hugging Face folder, which --base takes, and transformers too."""
    folder, tensors = Path(folder), {}
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("a packed model only answers; save it before pack().")
    for name, tensor in model.state_dict().items():
        if not name.endswith((".A", ".B", ".q", ".scale")):  # a base's bias stays, under its own name
            tensors[name.replace(".base.", ".")] = tensor
    for name, layer in model.named_modules():  # a LoRA layer comes before the base that it holds
        key = f"{name.removesuffix('.base')}.weight"
        if isinstance(layer, LoRALinear):
            if layer.merged is None:
                raise ValueError("merge the LoRA layers before the whole model is saved.")
            tensors[key] = layer.merged
        elif isinstance(layer, Int8Linear) and key not in tensors:  # no target of LoRA: written dense
            tensors[key] = layer.weight.to(model.norm.weight.dtype)
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
    save_tensors({n if n.startswith("lm_head") else f"model.{n}": t for n, t in tensors.items()},
                 folder / "model.safetensors", {"format": "pt"},
                 {name: Path(base, name).read_bytes() for name in names if Path(base, name).exists()})


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A and B under the names PEFT gives them."""
    return {f"{PEFT_PREFIX}{name}.lora_{which}.weight": getattr(layer, which)
            for name, layer in lora_layers(model).items() for which in "AB"}


def save_adapter(model: nn.Module, folder: str | Path, base: str, base_id: str, template: str) -> None:
    """PEFT's two files, plus nanopillow.json: on which base (and was it int8) and template it was trained."""
    folder, layers = Path(folder), lora_layers(model)
    first = next(iter(layers.values()))
    r = first.A.size(0)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": r,
              "lora_alpha": first.scaling * r, "target_modules": sorted({n.split(".")[-1] for n in layers}),
              "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    ours = {"base_id": base_id, "int8": any(isinstance(module, Int8Linear) for module in model.modules()),
            "template": template}
    save_tensors(adapter_tensors(model), folder / "adapter_model.safetensors", {"format": "pt"},
                 {"adapter_config.json": json_bytes(config), "nanopillow.json": json_bytes(ours)})


def load_adapter(model: nn.Module, folder: str | Path, base_id: str, template: str) -> None:
    """Adds the adapter in `folder` (ours or PEFT's) to the model, frozen; ValueError names what differs."""
    folder = Path(folder)
    config_file = folder / "adapter_config.json"
    if not config_file.exists():
        raise FileNotFoundError(f"{config_file} is missing; run python train_sft.py, or name an adapter.")
    config = read_json(config_file, r=int, lora_alpha=float, target_modules=list | str)
    # What would change the arithmetic is refused; PiSSA, OLoRA and the like have changed the base as well.
    for field, allowed in (("peft_type", ("LORA",)), ("use_dora", (False,)), ("use_rslora", (False,)),
                           ("bias", ("none",)), ("rank_pattern", ({},)), ("alpha_pattern", ({},)),
                           ("modules_to_save", ()), ("alora_invocation_tokens", ()),
                           ("init_lora_weights", (True, False, "gaussian", "orthogonal", "eva"))):
        if config.get(field) not in (None, *allowed):
            raise ValueError(f"{config_file}: {field} = {config[field]} is not supported; make the adapter "
                             "plain LoRA with PEFT.")
    ours = folder / "nanopillow.json"
    if ours.exists():
        made = read_json(ours, base_id=str, int8=bool, template=str)
        for field, now in (("base_id", base_id), ("template", template)):
            if made[field] != now:
                raise ValueError(f"{ours}: the adapter was trained with {field} {made[field]}, but this "
                                 f"run has {now}; use the matching --base, or train again.")
    targets = config["target_modules"]
    if targets in ("all-linear", ["all-linear"]):
        targets = ALL_LINEAR
    elif isinstance(targets, str):
        raise ValueError(f"{config_file}: target_modules = {targets} is a pattern; list the names instead.")
    targets = sorted({str(t).split(".")[-1] for t in targets})  # PEFT writes full names for "all-linear"
    trained, _ = load_tensors(folder / "adapter_model.safetensors")
    add_lora(model, config["r"], config["lora_alpha"], targets)
    wanted = adapter_tensors(model)
    for name in sorted(wanted | trained):  # every tensor of either side, or PEFT's silence repeats
        ours, theirs = (list(side[name].shape) if name in side else "absent" for side in (wanted, trained))
        if ours != theirs or not trained[name].isfinite().all():
            raise ValueError(f"{folder}: tensor '{name}' is {theirs}, in this model it is {ours} (of finite "
                             "numbers); the adapter was trained on another model, train again.")
        wanted[name].data.copy_(trained[name])
    if not any(trained[name].any() for name in trained if ".lora_B." in name):
        raise ValueError(f"{folder}: every B is zero, the adapter does nothing; it was never trained.")
    model.requires_grad_(False)
