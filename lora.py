"""LoRA on a frozen int8 base: the two layers that make fine-tuning fit on a laptop.

PILLOW tunes its LLM with LoRA (paper, section 3.1; LoRA: arXiv 2106.09685, section 4.1):

    x (.., in) --> frozen W, int8 (out, in) ----------------> + --> y (.., out)
         \\--> A (r, in), trained --> B (out, r), trained --> * alpha / r

B starts at zero, so at step 0 the model is exactly the base. A must not be zero too. With y's gradient g,

    gradient of A = alpha / r (g B)^T x        gradient of B = alpha / r g^T (x A^T)
    gradient of x = g W + alpha / r (g B) A

The first two contain each other: at step 0 only B moves, and if both were zero, neither ever would. W has no
gradient: it is frozen.

int8 is for weights only, symmetric, with one scale for each output row:

    a row of W     0.50   -1.27    0.03      scale = 1.27 / 127 = 0.01: the row's largest becomes 127
    stored, q        50    -127       3      one byte each; q * scale is the row again, to within scale / 2

A LoRA layer *holds* the linear that it adapts, so LoRA works the same on float and int8 layers.

Letter: r rank of LoRA.
Simplified: no dropout, one rank for all modules, no bias training. The files are PEFT's, and PEFT reads ours.

Try: python -c "import model, lora; print(lora.quantize(model.load('data/base')).layers[0].self_attn)"
"""
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from data.base_model import fingerprint, read_adapter_config, say_other_base
from data.files import file_hash, read_tensors, save_tensors, to_json
from model import Transformer
from model import load as load_base

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# v and down stay float: 28% of the blocks' weights, but two thirds of what rounding costs (KL divergence).
INT8_LINEAR = ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj")
PEFT_PREFIX = "base_model.model.model."  # TRAP: without it PEFT loads nothing and only warns


# ---- the frozen base in int8 -----------------------------------------------------------------------------

class Int8Linear(nn.Module):
    """A frozen linear with an int8 weight: a quarter of fp32's bytes, half of bf16's."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().float()  # (out, in)
        # A row's largest number becomes 127. The scale is rounded to bf16, so that a product in bf16 can be
        # scaled as it is: with an fp32 scale it would be cast to fp32 and back.
        scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).bfloat16()  # (out)
        # Buffers, not parameters: no optimiser can touch them.
        self.register_buffer("q", (weight / scale.float()[:, None]).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # (out, in), fp32
        return self.q * self.scale.float()[:, None]

    def forward(self, x: Tensor) -> Tensor:  # (.., in) -> (.., out)
        # no LoRA is a LoRA of rank 0
        return with_lora(x, self, x.new_empty(0, self.in_features), x.new_empty(self.out_features, 0))


# ---- the adapter -----------------------------------------------------------------------------------------

class LoRAProduct(torch.autograd.Function):
    """y = (x W^T) * scale + (x A^T) B^T with the three gradients above. A float W has no scale.

    TRAP: of the plain expression autograd keeps a float copy of every int8 weight: 1 + 2 bytes each, more
    than a bf16 base. This keeps the int8 alone and casts it again in backward. Both sums are made in place,
    which saves writing a second (N, out) and (N, in).
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, scale: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        h = x @ A.T  # (N, in) -> (N, r)
        ctx.save_for_backward(x, h, W, scale, A, B)
        y = x @ W.to(x.dtype).T  # (N, out)
        if scale is not None:  # y, not W: int8 is exact in bf16, but W * scale would be rounded
            y *= scale
        return y.addmm_(h, B.T)  # (N, out)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:  # g (N, out): y's gradient
        x, h, W, scale, A, B = ctx.saved_tensors
        of_h = g @ B  # (N, r)
        of_x = (g if scale is None else g * scale) @ W.to(g.dtype)  # (N, in)
        return of_x.addmm_(of_h, A), None, None, of_h.T @ x, g.T @ h


def with_lora(x: Tensor, base: nn.Linear | Int8Linear, A: Tensor, B: Tensor) -> Tensor:
    """x (.., in) -> base(x) + x A^T B^T (.., out), for a frozen base; A (r, in), B (out, r)."""
    W, scale = (base.q, base.scale.to(x.dtype)) if isinstance(base, Int8Linear) else (base.weight, None)
    y = LoRAProduct.apply(x.reshape(-1, x.size(-1)), W, scale, A, B)  # (N, out)
    y = y.view(*x.shape[:-1], base.out_features)
    return y if base.bias is None else y + base.bias


class LoRALinear(nn.Module):
    """y = x W^T + (x A^T) B^T alpha / r around any linear. A and B are fp32 even on a bf16 base: an update of
    1e-4 of a number is lost in bf16's 8 bits."""

    def __init__(self, base: nn.Linear | Int8Linear, r: int, alpha: float,
                 generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.scaling = base, alpha / r
        # A: uniform with nn.Linear's bound, as in PEFT (the LoRA paper: Gaussian). Drawn on the CPU, so the
        # same seed gives the same A on every device.
        uniform = torch.rand(r, base.in_features, generator=generator) * 2 - 1
        self.A = nn.Parameter(uniform / math.sqrt(base.in_features))  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))  # (out, r)

    def forward(self, x: Tensor) -> Tensor:  # (.., in) -> (.., out)
        # alpha / r is applied to B in fp32, before the cast
        return with_lora(x, self.base, self.A.to(x.dtype), (self.B * self.scaling).to(x.dtype))


def replace_linears(model: Transformer, names: Iterable[str], make: Callable[[nn.Module], nn.Module]) -> int:
    """Puts make(layer) in place of the blocks' linears with these names; returns how many there are."""
    found = [(parent, name) for parent in model.layers.modules() for name, child in parent.named_children()
             if name in names and isinstance(child, nn.Linear | Int8Linear | LoRALinear)]
    for parent, name in found:  # one at a time: a replaced weight is freed before the next one is made
        setattr(parent, name, make(getattr(parent, name)))
    return len(found)


def quantize(model: Transformer) -> Transformer:
    """INT8_LINEAR of all blocks to int8, in place. The embedding and norms stay as they are: the embedding is
    read row by row on the way in, and as the tied head it decides every token."""
    replace_linears(model, INT8_LINEAR, Int8Linear)
    return model


def add_lora(model: Transformer, r: int, alpha: float, targets: Iterable[str] = ALL_LINEAR,
             generator: torch.Generator | None = None) -> list[nn.Parameter]:
    """Freezes the model, wraps the targets, returns what is trained. ValueError: a target matches nothing."""
    model.requires_grad_(False)
    def wrap(base: nn.Module) -> LoRALinear:
        return LoRALinear(base, r, alpha, generator).to(model.norm.weight.device)
    for target in targets:
        if not replace_linears(model, [target], wrap):
            raise ValueError(f"LoRA target '{target}' is no linear of this model; choose among {ALL_LINEAR}.")
    return [p for p in model.parameters() if p.requires_grad]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model: Transformer) -> None:
    """Replaces every LoRA and int8 layer by one plain linear, W + B A alpha / r: nothing extra at inference.

    TRAP: merging is explicit. Some libraries merge inside eval(), which changes weights silently. An int8 W
    is dequantised, since the adapter was trained on that. The sum stays float: to round it again would cost
    0.04 nats a token.
    """
    if not lora_layers(model):
        raise ValueError("the model has no LoRA layer to merge; merging twice would add it twice.")

    def dense(layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Linear):
            return layer
        base = layer.base if isinstance(layer, LoRALinear) else layer
        weight = base.weight.detach().float()  # (out, in)
        if isinstance(layer, LoRALinear):
            weight = weight + (layer.B @ layer.A).detach() * layer.scaling
        linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(model.norm.weight.dtype), requires_grad=False)
        linear.bias = base.bias
        return linear
    replace_linears(model, ALL_LINEAR, dense)


# ---- the adapter's files ---------------------------------------------------------------------------------

def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of all layers under the names that PEFT gives them."""
    return {f"{PEFT_PREFIX}{name}.lora_{which}.weight": getattr(layer, which)
            for name, layer in lora_layers(model).items() for which in "AB"}


def save_adapter(model: nn.Module, folder: str | Path, base: str, base_id: str, template: str) -> None:
    """PEFT's two files, and nanopillow.json: on which base, was it int8, and with which template."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    r, alpha = first.A.size(0), first.scaling * first.A.size(0)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": r,
              "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0, "bias": "none",
              "target_modules": sorted({name.split(".")[-1] for name in layers}), "fan_in_fan_out": False,
              "inference_mode": True}
    ours = {"base_id": base_id, "template": template,
            "int8": any(isinstance(module, Int8Linear) for module in model.modules())}
    save_tensors(adapter_tensors(model), Path(folder, "adapter_model.safetensors"), {"format": "pt"},
                 {"adapter_config.json": to_json(config), "nanopillow.json": to_json(ours)})


def load_adapter(model: Transformer, folder: str | Path, base_id: str, template: str) -> None:
    """Adds the adapter in `folder` (ours or PEFT's) to the model, frozen. ValueError names what differs."""
    config = read_adapter_config(Path(folder), base_id, template)
    if config["int8"]:  # the adapter corrects that rounding and no other
        quantize(model)
    targets = ALL_LINEAR if config["target_modules"] == "all-linear" else config["target_modules"]
    # PEFT writes full names for "all-linear"
    add_lora(model, config["r"], config["lora_alpha"], sorted({str(t).split(".")[-1] for t in targets}))
    tensors = adapter_tensors(model)
    # every tensor of the file and of the model must find its match: PEFT only warns, and the adapter is inert
    for name, tensor in read_tensors([Path(folder, "adapter_model.safetensors")], tensors,
                                     "the adapter was trained on another model, or on a part of its layers"):
        tensors[name].data.copy_(tensor)
    if not any(layer.B.any() for layer in lora_layers(model).values()):
        raise ValueError(f"{folder}: every B is zero, so the adapter does nothing; train it first.")
    model.requires_grad_(False)


def load_tuned(base: str | Path, adapter: str, template: str, dtype: torch.dtype,
               device: str) -> tuple[Transformer, str]:
    """(base + adapter, merged and frozen, and an id of these weights). Adapter "none": the bare base."""
    model, identity = load_base(base, dtype, device), fingerprint(base)
    if adapter != "none":
        load_adapter(model, adapter, identity, template)
        merge(model)
        say_other_base(adapter, base)
        files = [Path(adapter, f"adapter_{name}") for name in ("config.json", "model.safetensors")]
        identity += file_hash(*files)
    return model, identity
