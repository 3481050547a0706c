"""lora.py: the int8 base and what autograd keeps of it; LoRA and its files against PEFT; merging; files.

    pytest tests/test_lora.py
"""
import copy
import json
import shutil

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn

import lora
import model as llm
from data import base_model, download, files
from lora import ALL_LINEAR, Int8Linear, LoRALinear
from model import load

ATTENTION = ("q_proj", "v_proj")
IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(model, ids=IDS):
    return model.logits(model(ids))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tune(folder, int8=False, alpha=8, targets=ALL_LINEAR, dtype=torch.float32, seed=7):
    """A model with LoRA of rank 4. B is random, as after training: B = 0 would let most tests below pass for
    nothing."""
    model = load(folder, dtype)
    if int8:
        lora.quantize(model)
    lora.add_lora(model, 4, alpha, targets, seeded())
    for i, layer in enumerate(lora.lora_layers(model).values()):
        layer.B.data = torch.randn(layer.B.shape, generator=seeded(seed + i)) * 0.1
    return model


def reference_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=atol)


def kinds(model):
    """How many linears of each kind the blocks have; LoRA's own linears count as well."""
    modules = list(model.layers.modules())
    return [sum(type(m) is kind for m in modules) for kind in (nn.Linear, Int8Linear, LoRALinear)]


# ---- int8 ------------------------------------------------------------------------------------------------

@pytest.fixture
def linear():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    linear.weight.data *= torch.logspace(-3, 3, 48)[:, None]  # rows of very different size: a scale for each
    linear.weight.data[5] = 0
    return linear.requires_grad_(False)


def test_int8_weight_within_half_a_step(linear):
    int8 = Int8Linear(linear)
    assert int8.q.dtype == torch.int8 and int8.q.abs().max() <= 127
    step = int8.scale.float()
    # the scale is rounded to bf16's 8 bits
    assert ((step - linear.weight.abs().amax(1) / 127).abs() <= step * 2**-8)[torch.arange(48) != 5].all()
    error = (int8.weight - linear.weight).abs()
    assert (error <= step[:, None] * 0.5001).all() and error.max() > 0
    assert (int8.q.abs().amax(1) == 127).sum() == 47 and not int8.weight[5].any()
    assert not any(p.requires_grad for p in int8.parameters())


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 7, 64)])
def test_int8_forward_and_gradient_equal_the_dequantised(linear, shape):
    """Trap 5's autograd.Function has the gradient of the plain expression, also without LoRA."""
    int8, dense = Int8Linear(linear), copy.deepcopy(linear)
    dense.weight.data = int8.weight
    x = torch.randn(shape, generator=seeded(), requires_grad=True)
    out = torch.randn(*shape[:-1], 48, generator=seeded(1))
    ys, grads = [], []
    for layer in (int8, dense):
        ys.append(layer(x))
        grads.append(torch.autograd.grad((ys[-1] * out).sum(), x)[0])
    for a, b in (ys, grads):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def trained(base):
    """LoRA around `base`, with a B as after training."""
    layer = LoRALinear(base, 4, 8, seeded())
    layer.B.data = torch.randn(layer.B.shape, generator=seeded(1))
    return layer


@pytest.mark.parametrize("shape", [(1, 64), (3, 7, 64)])
@pytest.mark.parametrize("int8", [False, True])
def test_lora_and_its_gradients_equal_the_plain_expression(linear, int8, shape):
    """Trap 5's autograd.Function: the forward pass, and the gradients of x, A and B written by hand."""
    layer = trained(Int8Linear(linear) if int8 else linear)
    x = torch.randn(shape, generator=seeded(), requires_grad=True)
    out = torch.randn(*shape[:-1], 48, generator=seeded(1)) / layer.base.weight.norm(dim=1).clamp(min=1)
    plain = F.linear(x, layer.base.weight, layer.base.bias) + 2.0 * F.linear(F.linear(x, layer.A), layer.B)
    learned = (x, layer.A, layer.B)
    pairs = [*zip(*(torch.autograd.grad((y * out).sum(), learned) for y in (layer(x), plain)), strict=True),
             (layer(x), plain)]
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() > 0


@pytest.mark.parametrize("int8", [False, True])
def test_loras_gradients_by_finite_differences(linear, int8):
    layer = trained(Int8Linear(linear) if int8 else linear).double()
    W, scale = (layer.base.q, layer.base.scale / 1e3) if int8 else (layer.base.weight / 1e3, None)
    x = torch.randn(2, 64, dtype=torch.double, generator=seeded(), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, A, B: lora.LoRAProduct.apply(x, W, scale, A, B),
                                    (x, layer.A, layer.B))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_int8_in_bfloat16(linear, rows):
    """q and the scale are exact in bf16: forward and backward differ from fp32 by a few roundings."""
    int8 = Int8Linear(linear.bfloat16())
    layer = LoRALinear(int8, 4, 8, seeded())  # B is 0: the base alone
    x = torch.randn(1, rows, 64, generator=seeded()).bfloat16().requires_grad_()
    out = torch.randn(1, rows, 48, generator=seeded(1)).bfloat16()
    assert int8.scale.dtype == torch.bfloat16 and torch.equal(int8.q.bfloat16().char(), int8.q)
    y = layer(x)
    assert torch.equal(y, int8(x))
    y.backward(out)
    assert y.dtype == x.grad.dtype == torch.bfloat16 and y.shape == out.shape
    weight, bias, x_exact = int8.weight, int8.bias.float(), x.detach().float()
    size = x_exact.norm(dim=-1, keepdim=True) * weight.norm(dim=1) + bias.abs()
    # bf16 has 8 bits: 0.4% a rounding
    assert ((y.float() - F.linear(x_exact, weight, bias)).abs() <= 0.01 * size).all()
    size = out.float().norm(dim=-1, keepdim=True) * weight.norm(dim=0)
    assert ((x.grad.float() - out.float() @ weight).abs() <= 0.01 * size).all()


def saved_bytes(forward):
    """Bytes that autograd keeps for backward, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    assert y.requires_grad
    return sum(kept.values())


def test_autograd_keeps_int8_alone():
    """Trap 5: F.linear(x, q.to(dtype) * scale) makes autograd keep a float copy of every weight."""
    int8 = Int8Linear(nn.Linear(512, 512, bias=False).requires_grad_(False))
    x, weights = torch.randn(1, 512, requires_grad=True), 512 * 512
    assert weights <= saved_bytes(lambda: int8(x)) < 1.05 * weights
    layer = LoRALinear(int8, 4, 8)
    assert weights <= saved_bytes(lambda: layer(x)) < 1.15 * weights
    assert saved_bytes(lambda: F.linear(x, int8.weight)) >= 4 * weights  # what the trap costs


def test_quantize_the_model(llama):
    model, dense = load(llama[0]), load(llama[0])
    before = sum(p.numel() * p.element_size() for p in model.layers.parameters())
    lora.quantize(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert len(linears) == 5 * 2 and type(model.lm_head) is nn.Linear
    kept = sum(p.numel() * p.element_size() for n, p in model.layers.named_parameters() if "_proj" in n)
    assert {n.split(".")[-2] for n, _ in model.layers.named_parameters()} >= {"v_proj", "down_proj"}
    held = sum(t.numel() * t.element_size() for t in [*model.layers.parameters(), *model.layers.buffers()])
    # a quarter, but for norms and scales, which are much at a width of 48
    assert held - kept < (before - kept) / 3
    for name, layer in linears.items():
        dense.get_submodule(name).weight.data = layer.weight
    close(logits(model), logits(dense))


# ---- the adapter against PEFT ----------------------------------------------------------------------------

@pytest.mark.parametrize("int8", [False, True])
def test_fresh_adapter_is_bitwise_the_base(llama, int8):
    model, again = load(llama[0]), load(llama[0])
    if int8:
        lora.quantize(model)
    before = logits(model)
    trained = lora.add_lora(model, 4, 8, generator=seeded())
    assert torch.equal(logits(model), before)
    assert len(trained) == 2 * 7 * 2 and all(p.dtype == torch.float32 for p in trained)
    logits(model).sum().backward()
    layers = lora.lora_layers(model).values()
    assert all(layer.B.grad.any() and not layer.A.grad.any() for layer in layers)  # A waits for B
    names = {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(n.endswith((".A", ".B")) for n in names)  # nothing of the base is trained
    assert torch.equal(trained[0], lora.add_lora(again, 4, 8, generator=seeded())[0])  # the seed decides
    with pytest.raises(ValueError, match="LoRA target 'lm_head' is no linear of this model"):
        lora.add_lora(load(llama[0]), 4, 8, ["q_proj", "lm_head"])


@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR])
def test_forward_and_gradients_equal_peft(llama, targets):
    model = tune(llama[0], alpha=10, targets=targets)
    theirs = peft.get_peft_model(reference_model(llama[0]), peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=list(targets), lora_dropout=0.0))
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    ours = lora.adapter_tensors(model)
    assert set(ours) == set(named)
    for name, parameter in named.items():
        parameter.data.copy_(ours[name])
    a, b = logits(model), theirs(IDS).logits
    close(a, b)
    for y in (a, b):
        F.cross_entropy(y[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for name, parameter in named.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert parameter.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_our_adapter_loads_in_peft(make_folder, tmp_path, family):
    """Trap 7: without PEFT's prefix on the keys it would load nothing and only warn."""
    folder, bare = make_folder(family)
    model = tune(folder)
    lora.save_adapter(model, tmp_path / "a", str(folder), "base", "template")
    theirs = peft.PeftModel.from_pretrained(reference_model(folder), tmp_path / "a")
    close(logits(model), theirs(IDS).logits)
    assert (theirs(IDS).logits - bare(IDS).logits).abs().max() > 0.1  # it does something

    again = load(folder)
    lora.load_adapter(again, tmp_path / "a", "base", "template")
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())


@torch.no_grad()
@pytest.mark.parametrize("targets", [list(ATTENTION), "all-linear"])
def test_pefts_adapter_loads_here(llama, tmp_path, targets):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(reference_model(llama[0]), peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"))
    theirs.eval().save_pretrained(tmp_path / "a")
    model = load(llama[0])
    lora.load_adapter(model, tmp_path / "a", "any base", "any template")  # PEFT's files name neither
    assert kinds(model)[1:] == [0, 4 if len(targets) == 2 else 14]
    close(logits(model), theirs(IDS).logits)


REFUSED = {  # as PEFT writes them: settings of its config -> what the refusal names
    "rank_pattern": ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, "rank_pattern"),
    "alpha_pattern": ({"alpha_pattern": {"v_proj": 3}}, "alpha_pattern"),
    "dora": ({"use_dora": True}, "use_dora"),
    "rslora": ({"use_rslora": True}, "use_rslora"),
    "bias": ({"bias": "lora_only"}, "bias"),
    "lora_bias": ({"lora_bias": True}, "lora_bias = True"),
    "one layer": ({"layers_to_transform": [0]}, r"layers_to_transform = \[0\]"),
    "the layer with number 0": ({"layers_to_transform": 0}, "layers.1.*on a part of its layers"),
    "all but one": ({"exclude_modules": ["v_proj"]}, r"exclude_modules = \['v_proj'\]"),
    "a token": ({"trainable_token_indices": [3]}, r"trainable_token_indices = \[3\]"),
    "the head's LoRA": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight' is no LoRA"),
    "a saved head": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),  # its base is not the base
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights = olora"),
    "activated": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    "pattern": ({"target_modules": r".*\.q_proj"}, "target_modules"),
}


@pytest.mark.parametrize("changes, named", REFUSED.values(), ids=REFUSED)
def test_pefts_other_kinds_are_refused(make_folder, tmp_path, changes, named):
    """Adapters that PEFT itself wrote with what we do not do: a sentence that names it, not a wrong model."""
    folder, _ = make_folder("qwen2")  # biases on q and v, for bias = lora_only
    torch.manual_seed(0)
    theirs = peft.get_peft_model(reference_model(folder), peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False,
           "task_type": "CAUSAL_LM"} | changes))
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=named) as error:
        lora.load_adapter(load(folder), tmp_path / "a", "any base", "any template")
    assert "\n" not in str(error.value)


def test_an_adapter_with_other_weights_inside_is_refused_for_that(llama, tmp_path):
    """PEFT puts embeddings and head into the file when a vocabulary has grown."""
    theirs = peft.get_peft_model(reference_model(llama[0]), peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"(embed_tokens|lm_head)\.weight' is no LoRA matrix; an adapter"):
        lora.load_adapter(load(llama[0]), tmp_path / "a", "any base", "any template")


def test_an_adapter_of_another_base_is_used_and_said(llama, tmp_path, capsys, monkeypatch):
    """PEFT's files do not say which weights they were made for, but they have a name. Ours has the hub's."""
    theirs = peft.get_peft_model(reference_model(llama[0]), peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    base = shutil.copytree(llama[0], tmp_path / "me--small")
    monkeypatch.setattr(download, "DATA", tmp_path)
    for name, said in (("me/other", f"({tmp_path / 'a'}: made for 'me/other', used on me/small)\n"),
                       ("me/small", ""), (str(base), "")):
        theirs.peft_config["default"].base_model_name_or_path = name
        theirs.save_pretrained(tmp_path / "a")
        lora.load_tuned(base, str(tmp_path / "a"), "any template", torch.float32, "cpu")
        assert capsys.readouterr().out == said
    assert base_model.hub_name(tmp_path / "base") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_model.hub_name("elsewhere/me--small") == "elsewhere/me--small"


# ---- merging ---------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merge(make_folder, family, int8):
    """Trap 6: merging is explicit and exact, twice is an error, and eval() and train() merge nothing."""
    folder, bare = make_folder(family)
    model = tune(folder, int8)
    linears, apart = 2 * 7, logits(model)
    for mode in (True, False, True):
        model.train(mode)
        assert torch.equal(logits(model), apart) and kinds(model)[2] == linears
    wanted, biases = {}, {}
    for name, layer in lora.lora_layers(model).items():
        wanted[name] = layer.base.weight + 8 / 4 * layer.B @ layer.A
        biases[name] = layer.base.bias

    lora.merge(model)
    assert kinds(model) == [linears, 0, 0] and not any(p.requires_grad for p in model.parameters())
    for name in wanted:
        plain = model.get_submodule(name)
        torch.testing.assert_close(plain.weight, wanted[name], rtol=1e-5, atol=1e-6)
        assert plain.bias is biases[name] and (plain.bias is not None) == (
            family == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")))
    close(logits(model), apart, atol=1e-3)
    assert (apart - bare(IDS).logits).abs().max() > 0.1

    model.train().eval()
    merged = logits(model)
    with pytest.raises(ValueError, match="no LoRA layer to merge; merging twice would add it twice"):
        lora.merge(model)
    assert torch.equal(logits(model), merged)


@torch.no_grad()
def test_merge_in_bfloat16_rounds_once(llama):
    """The sum is made in fp32 and rounded at the end, and A and B stay fp32 until then."""
    model = tune(llama[0], int8=True, targets=ATTENTION, dtype=torch.bfloat16)
    wanted = {name: (layer.base.weight.float() + 8 / 4 * layer.B @ layer.A).bfloat16()
              for name, layer in lora.lora_layers(model).items()}
    wanted |= {name: layer.weight.bfloat16() for name, layer in model.named_modules()
               if isinstance(layer, Int8Linear) and not name.endswith(".base")}
    assert all(p.dtype == torch.float32 for p in lora.adapter_tensors(model).values())
    lora.merge(model)  # an int8 layer without LoRA becomes plain as well
    assert kinds(model) == [14, 0, 0] and len(wanted) == 2 * (2 + 4)
    for name, weight in wanted.items():
        torch.testing.assert_close(model.get_submodule(name).weight, weight, rtol=2**-7, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR])
@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("qwen2", False),
                                          ("qwen3", False)])
def test_merged_model_loads_in_transformers(make_folder, tmp_path, family, tied, targets, int8):
    folder, _ = make_folder(family, tie_word_embeddings=tied)
    model = tune(folder, int8, targets=targets)
    lora.merge(model)
    llm.save(model, tmp_path / "m", folder)
    expected = logits(model)
    close(logits(load(tmp_path / "m")), expected, atol=1e-3)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    close(theirs.eval()(IDS).logits, expected, atol=1e-3)


def test_full_model_is_saved_exactly(llama, tmp_path):
    """train_sft.py --full: no LoRA at all; every tensor comes back bit for bit."""
    model = load(llama[0])
    model.norm.weight.data.add_(0.5)
    llm.save(model, tmp_path / "m", llama[0])
    before, after = model.state_dict(), load(tmp_path / "m").state_dict()
    assert set(before) == set(after) and all(torch.equal(before[n], after[n]) for n in before)


# ---- files -----------------------------------------------------------------------------------------------

def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("alpha, written", [(8.0, "8"), (2.5, "2.5")])
def test_adapter_files(llama, tmp_path, alpha, written):
    """Trap 7: keys are PEFT's, r and alpha are stored (alpha as an int where it is whole), and with them the
    base and the template."""
    folder = tmp_path / "new" / "a"
    lora.save_adapter(tune(llama[0], alpha=alpha), folder, "some/base", "1234", "template-1")
    assert names(folder) == ["adapter_config.json", "adapter_model.safetensors", "nanopillow.json"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, "some/base")
    assert json.dumps(config["lora_alpha"]) == written and config["target_modules"] == sorted(ALL_LINEAR)
    stored = json.loads((folder / "nanopillow.json").read_text())
    assert stored == {"base_id": "1234", "int8": False, "template": "template-1"}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 28 and all(n.startswith("base_model.model.model.layers.") for n in tensors)


def test_failed_writing_leaves_the_old_file_alone(tmp_path, monkeypatch):
    """A full disk, a killed run: the old file stays whole, and no half-written one is left beside it."""
    def fails_half_way(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("no space left on device")
    file = tmp_path / "w.safetensors"
    files.save_tensors({"a": torch.ones(3)}, file, {"n": 1})
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", fails_half_way)
        with pytest.raises(OSError, match="no space"):
            files.save_tensors({"a": torch.zeros(3)}, file)
    assert load_file(file)["a"].tolist() == [1, 1, 1] and files.read_metadata(file) == {"n": "1"}
    assert names(tmp_path) == ["w.safetensors"]
    files.save_tensors({"a": torch.zeros(3)}, file)
    assert not load_file(file)["a"].any() and names(tmp_path) == ["w.safetensors"]


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    def no_replace(source, target):
        raise OSError("no space left on device")
    file = tmp_path / "c.json"
    files.save_json({"a": "é"}, file)
    with pytest.raises(TypeError):
        files.save_json({"a": object()}, file)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", no_replace)
        with pytest.raises(OSError, match="no space"):
            files.save_json({"a": 2}, file)
    assert json.loads(file.read_text("utf-8")) == {"a": "é"} and names(tmp_path) == ["c.json"]


def test_saved_tensors_may_be_views(tmp_path):
    weight, file = torch.arange(6.0).view(2, 3), tmp_path / "w.safetensors"
    saved = {"t": weight.T, "row": weight[1]}
    files.save_tensors(saved, file)
    tensors = dict(files.read_tensors([file], saved, "save it again"))
    file.unlink()
    assert torch.equal(tensors["t"], weight.T) and tensors["row"].tolist() == [3, 4, 5]


@torch.no_grad()
def test_load_tuned(llama, tmp_path):
    """Base and adapter merged, the base int8 if the adapter was trained on int8; an id for each."""
    bare, identity = lora.load_tuned(llama[0], "none", "t", torch.float32, "cpu")
    assert identity == base_model.fingerprint(llama[0]) and torch.equal(logits(bare), logits(load(llama[0])))
    seen = {identity}
    for int8 in (False, True):
        model, folder = tune(llama[0], int8, seed=20 + int8), tmp_path / str(int8)
        lora.save_adapter(model, folder, "x", identity, "t")
        again = load(llama[0])
        lora.load_adapter(again, folder, identity, "t")  # it makes the base int8 itself
        assert kinds(again) == kinds(model) == [14 - 10 * int8, 10 * int8, 14]
        assert torch.equal(logits(again), logits(model))
        loaded, name = lora.load_tuned(llama[0], str(folder), "t", torch.float32, "cpu")
        assert kinds(loaded) == [14, 0, 0] and not any(p.requires_grad for p in loaded.parameters())
        close(logits(loaded), logits(model), atol=1e-3)
        seen.add(name)
    assert len(seen) == 3
