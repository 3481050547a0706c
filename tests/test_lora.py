"""lora.py: the int8 base and what autograd keeps of it; LoRA and its files against PEFT; merging; files.

    pytest tests/test_lora.py
"""
import copy
import json
import shutil
import sys

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn

import lora
import matcher
from data import prepare
from lora import ALL_LINEAR, Int8Linear, LoRALinear
from model import load

ATTENTION = ("q_proj", "v_proj")


def random_ids(rows=2, length=20, seed=0):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    return model.head(model(ids))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fill(model, seed=7):
    """Random A and B, as after training; B = 0 would make most tests below pass for nothing."""
    for layer in lora.lora_layers(model).values():
        layer.B.data = torch.randn(layer.B.shape, generator=seeded(seed)) * 0.1
        seed += 1
    return model


@pytest.fixture
def tuned(llama):
    """The tiny Llama with a filled LoRA of rank 4 on all linears."""
    model = load(llama[0])
    lora.add_lora(model, 4, 8, generator=seeded())
    return fill(model)


def weight_of(int8):
    return lora.dequantize(int8.q, int8.scale, torch.float32)


def reference_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


# ---- int8 ----------------------------------------------------------------------------------------

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
    step = linear.weight.abs().amax(1) / 127
    error = (weight_of(int8) - linear.weight).abs()
    assert (error <= step[:, None] * 0.5001).all() and error.max() > 0
    assert (int8.q.abs().amax(1) == 127).sum() == 47 and not weight_of(int8)[5].any()
    assert not list(int8.parameters()) or not any(p.requires_grad for p in int8.parameters())


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 7, 64)])
def test_int8_forward_and_gradient_equal_the_dequantised(linear, shape):
    """Trap 5's autograd.Function has the gradient of the plain expression."""
    int8, dense = Int8Linear(linear), copy.deepcopy(linear)
    dense.weight.data = weight_of(int8)
    x = torch.randn(shape, generator=seeded(), requires_grad=True)
    out = torch.randn(*shape[:-1], 48, generator=seeded(1))
    ys, grads = [], []
    for layer in (int8, dense):
        ys.append(layer(x))
        grads.append(torch.autograd.grad((ys[-1] * out).sum(), x)[0])
    for a, b in (ys, grads):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_int8_gradient_by_finite_differences(linear):
    int8 = Int8Linear(linear).double()
    int8.q = int8.q.to(torch.int8)
    x = torch.randn(2, 64, dtype=torch.double, generator=seeded(), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lora.Int8MatMul.apply(x, int8.q, int8.scale / 1e3), (x,))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 40])
def test_int8_in_bfloat16(linear, rows):
    """Up to four rows go through a kernel that reads int8; it must say what the general path says."""
    int8, x = Int8Linear(linear.bfloat16()), torch.randn(1, rows, 64, generator=seeded()).bfloat16()
    exact = F.linear(x.float(), weight_of(int8), int8.bias.float())
    y = int8(x)
    assert y.dtype == torch.bfloat16 and y.shape == (1, rows, 48)
    size = x.float().norm(dim=-1, keepdim=True) * weight_of(int8).norm(dim=1) + int8.bias.float().abs()
    assert ((y.float() - exact).abs() <= 0.01 * size).all()  # bf16 has 8 bits: 0.4% a rounding


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
    linear = nn.Linear(512, 512, bias=False).requires_grad_(False)
    int8, weights = Int8Linear(linear), 512 * 512
    x = torch.randn(1, 512, requires_grad=True)
    assert weights <= saved_bytes(lambda: int8(x)) < 1.05 * weights
    layer = LoRALinear(int8, 4, 8)
    assert saved_bytes(lambda: layer(x)) < 1.15 * weights
    assert saved_bytes(lambda: F.linear(x, weight_of(int8))) >= 4 * weights  # what the trap costs


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
        dense.get_submodule(name).weight.data = weight_of(layer)
    ids = random_ids()
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)


# ---- the adapter against PEFT --------------------------------------------------------------------

@pytest.mark.parametrize("int8", [False, True])
def test_fresh_adapter_is_bitwise_the_base(llama, int8):
    model = load(llama[0])
    if int8:
        lora.quantize(model)
    ids = random_ids()
    before = logits(model, ids)
    trained = lora.add_lora(model, 4, 8, generator=seeded())
    assert torch.equal(logits(model, ids), before)
    assert len(trained) == 2 * 7 * 2 and all(p.dtype == torch.float32 for p in trained)
    logits(model, ids).sum().backward()
    layers = lora.lora_layers(model).values()
    assert all(layer.B.grad.any() and not layer.A.grad.any() for layer in layers)  # A waits for B
    names = {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(n.endswith((".A", ".B")) for n in names)  # nothing of the base is trained
    again = load(llama[0])
    lora.add_lora(again, 4, 8, generator=seeded())
    assert torch.equal(trained[0], next(p for n, p in again.named_parameters() if n.endswith(".A")))


@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR])
def test_forward_and_gradients_equal_peft(llama, targets):
    model = load(llama[0])
    lora.add_lora(model, 4, 10, targets, seeded())
    fill(model)
    theirs = peft.get_peft_model(reference_model(llama[0]), peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=list(targets), lora_dropout=0.0))
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    ours = lora.adapter_tensors(model)
    assert set(ours) == set(named)
    for name, parameter in named.items():
        parameter.data.copy_(ours[name])
    ids = random_ids()
    a, b = logits(model, ids), theirs(ids).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for y in (a, b):
        F.cross_entropy(y[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in named.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert parameter.grad.any()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_our_adapter_loads_in_peft(make_folder, tmp_path, family):
    """Trap 7: without PEFT's prefix on the keys it would load nothing and only warn."""
    folder, _ = make_folder(family)
    model = load(folder)
    lora.add_lora(model, 4, 8, generator=seeded())
    fill(model)
    lora.save_adapter(model, tmp_path / "a", str(folder), "base", "template")
    theirs = peft.PeftModel.from_pretrained(reference_model(folder), tmp_path / "a")
    ids, bare = random_ids(), reference_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
        assert (theirs(ids).logits - bare(ids).logits).abs().max() > 0.1  # it does something

    again = load(folder)
    lora.load_adapter(again, tmp_path / "a", "base", "template")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("targets", [list(ATTENTION), "all-linear"])
def test_pefts_adapter_loads_here(llama, tmp_path, targets):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(reference_model(llama[0]), peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"))
    theirs.eval().save_pretrained(tmp_path / "a")
    model = load(llama[0])
    lora.load_adapter(model, tmp_path / "a", "any base", "any template")  # PEFT's files name neither
    assert len(lora.lora_layers(model)) == (4 if len(targets) == 2 else 14)
    ids = random_ids()
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


REFUSED = {  # as PEFT writes them: settings of its config -> what the refusal names
    "rank_pattern": ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, "rank_pattern"),
    "alpha_pattern": ({"alpha_pattern": {"v_proj": 3}}, "alpha_pattern"),
    "dora": ({"use_dora": True}, "use_dora"),
    "rslora": ({"use_rslora": True}, "use_rslora"),
    "bias": ({"bias": "lora_only"}, "bias"),
    "lora_bias": ({"lora_bias": True}, "lora_B.bias"),
    "one layer": ({"layers_to_transform": [0]}, "layers.1"),
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


# ---- merging -------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merge_and_unmerge(make_folder, family, int8):
    """Trap 6: merging is explicit and exact, twice is an error, and eval() and train() merge nothing."""
    model = load(make_folder(family)[0])
    if int8:
        lora.quantize(model)
    ids = random_ids()
    bare = logits(model, ids)
    lora.add_lora(model, 4, 8, generator=seeded())
    fill(model)
    state, apart = {k: v.clone() for k, v in model.state_dict().items()}, logits(model, ids)
    for mode in (True, False, True):
        model.train(mode)
        assert torch.equal(logits(model, ids), apart)
        assert all(layer.merged is None for layer in lora.lora_layers(model).values())
    with pytest.raises(ValueError, match="not merged"):
        lora.unmerge(model)

    lora.merge(model)
    assert all(layer.merged is not None for layer in lora.lora_layers(model).values())
    torch.testing.assert_close(logits(model, ids), apart, rtol=1e-4, atol=1e-3)
    assert (apart - bare).abs().max() > 0.1
    model.train().eval()
    merged = logits(model, ids)
    with pytest.raises(ValueError, match="merged already"):
        lora.merge(model)
    assert torch.equal(logits(model, ids), merged)

    lora.unmerge(model)
    assert torch.equal(logits(model, ids), apart)  # bitwise: no weight was edited
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR])
@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("qwen2", False),
                                          ("qwen3", False)])
def test_merged_model_loads_in_transformers(make_folder, tmp_path, family, tied, targets, int8):
    folder, _ = make_folder(family, tie_word_embeddings=tied)
    model = load(folder)
    if int8:
        lora.quantize(model)
    lora.add_lora(model, 4, 8, targets, seeded())
    fill(model)
    lora.merge(model)
    lora.save_model(model, tmp_path / "m", folder)
    ids = random_ids()
    expected = logits(model, ids)
    torch.testing.assert_close(logits(load(tmp_path / "m"), ids), expected, rtol=1e-4, atol=1e-3)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(theirs.eval()(ids).logits, expected, rtol=1e-4, atol=1e-3)


def test_full_model_is_saved_exactly(llama, tmp_path):
    """train_sft.py --full: no LoRA at all; every tensor comes back bit for bit."""
    model = load(llama[0])
    model.norm.weight.data.add_(0.5)
    lora.save_model(model, tmp_path / "m", llama[0])
    before, after = model.state_dict(), load(tmp_path / "m").state_dict()
    assert set(before) == set(after) and all(torch.equal(before[n], after[n]) for n in before)


# ---- files ---------------------------------------------------------------------------------------

def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_adapter_files(tuned, tmp_path):
    """Trap 7: keys are PEFT's, r and alpha are stored, and with them the base and the template."""
    lora.save_adapter(tuned, tmp_path / "new" / "a", "some/base", "1234", "template-1")
    assert names(tmp_path / "new" / "a") == [
        "adapter_config.json", "adapter_model.safetensors", "nanopillow.json"]
    config = json.loads((tmp_path / "new/a/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "some/base")
    assert config["target_modules"] == sorted(ALL_LINEAR)
    stored = json.loads((tmp_path / "new/a/nanopillow.json").read_text())
    assert stored == {"base_id": "1234", "int8": False, "template": "template-1"}
    tensors = load_file(tmp_path / "new/a/adapter_model.safetensors")
    assert len(tensors) == 28 and all(n.startswith("base_model.model.model.layers.") for n in tensors)


def test_failed_writing_leaves_the_old_file_alone(tmp_path, monkeypatch):
    """A full disk, a killed run: the old file stays whole, and no half-written one is left beside it."""
    def fails_half_way(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("no space left on device")
    file = tmp_path / "w.safetensors"
    lora.save_tensors({"a": torch.ones(3)}, file, {"n": 1})
    with monkeypatch.context() as patch:
        patch.setattr(lora, "save_file", fails_half_way)
        with pytest.raises(OSError, match="no space"):
            lora.save_tensors({"a": torch.zeros(3)}, file)
    tensors, metadata = lora.load_tensors(file)
    assert tensors["a"].tolist() == [1, 1, 1] and metadata == {"n": "1"}
    assert names(tmp_path) == ["w.safetensors"]
    lora.save_tensors({"a": torch.zeros(3)}, file)
    assert not lora.load_tensors(file)[0]["a"].any() and names(tmp_path) == ["w.safetensors"]


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    file = tmp_path / "c.json"
    lora.save_json({"a": "é"}, file)
    with pytest.raises(TypeError):
        lora.save_json({"a": object()}, file)
    def no_replace(source, target):
        raise OSError("no space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(prepare.os, "replace", no_replace)
        with pytest.raises(OSError, match="no space"):
            lora.save_json({"a": 2}, file)
    assert json.loads(file.read_text("utf-8")) == {"a": "é"} and names(tmp_path) == ["c.json"]


def test_saved_tensors_may_be_views(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    lora.save_tensors({"t": weight.T, "row": weight[1]}, tmp_path / "w.safetensors")
    tensors, _ = lora.load_tensors(tmp_path / "w.safetensors")
    assert torch.equal(tensors["t"], weight.T) and torch.equal(tensors["row"], weight[1])
    shutil.copy(tmp_path / "w.safetensors", tmp_path / "copy")  # and the file is not held open or mapped
    (tmp_path / "w.safetensors").unlink()
    assert tensors["row"].tolist() == [3, 4, 5]


def test_load_tuned(tuned, llama, tmp_path):
    """Base and adapter merged, the base int8 if the adapter was trained on int8; an id for each."""
    from model import fingerprint
    ids, seen = random_ids(), set()
    bare, identity = matcher.load_tuned(llama[0], "none", "t", torch.float32, "cpu")
    assert identity == fingerprint(llama[0]) and torch.equal(logits(bare, ids), logits(load(llama[0]), ids))
    for int8 in (False, True):
        model = load(llama[0])
        if int8:
            lora.quantize(model)
        lora.add_lora(model, 4, 8, generator=seeded())
        fill(model, seed=20 + int8)
        folder = tmp_path / str(int8)
        lora.save_adapter(model, folder, "x", identity, "t")
        loaded, name = matcher.load_tuned(llama[0], str(folder), "t", torch.float32, "cpu")
        with torch.no_grad():
            torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-4, atol=1e-3)
        assert any(isinstance(m, Int8Linear) for m in loaded.modules()) == int8
        seen.add(name)
    assert len(seen | {identity}) == 3


native_bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
                                 reason="this processor has no bf16 products, so nothing is packed on it")


@native_bf16
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("int8", [False, True])
def test_packed_answers_are_the_same_bits(make_folder, family, int8):
    """Biases (qwen2), merged LoRA on some linears and plain or int8 linears beside it, a tied head or not."""
    folder, ids = make_folder(family)[0], random_ids()
    model = load(folder, torch.bfloat16)
    if int8:
        lora.quantize(model)
    lora.add_lora(model, 4, 8, ["q_proj", "k_proj", "down_proj"], seeded())
    lora.merge(fill(model))
    packed = copy.deepcopy(model)
    lora.pack(packed)
    assert not lora.lora_layers(packed) and isinstance(packed.lm_head, lora.PackedLinear)
    assert isinstance(packed.layers[0].mlp.down_proj, lora.PackedLinear)
    assert any(isinstance(m, Int8Linear) for m in packed.modules()) == int8
    with torch.no_grad():
        for rows, length in ((1, 1), (2, 20), (20, 20)):
            ids = random_ids(rows, length)
            assert torch.equal(logits(packed, ids), logits(model, ids))


def test_what_cannot_be_packed_stays(tuned, llama, monkeypatch):
    """fp32, and processors without the instructions."""
    lora.merge(tuned)
    before = logits(tuned, random_ids())
    lora.pack(tuned)
    assert lora.lora_layers(tuned) and torch.equal(logits(tuned, random_ids()), before)
    model = load(llama[0], torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    lora.pack(model)
    assert type(model.layers[0].mlp.up_proj) is nn.Linear


@native_bf16
def test_a_packed_model_is_not_saved(llama, tmp_path):
    model = load(llama[0], torch.bfloat16)
    lora.pack(model)
    with pytest.raises(ValueError, match="before pack"):
        lora.save_model(model, tmp_path / "x", llama[0])


def test_a_log_is_drawn_where_matplotlib_is(tmp_path, monkeypatch):
    """The picture is an extra: a run without matplotlib ends as well as one with it."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5, "val_loss": 0.7}\n')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)  # what Python does for a module it cannot find
        lora.plot_log(log, "nats a token", "loss", "val_loss")
    assert names(tmp_path) == ["log.jsonl"]
    lora.plot_log(log, "nats a token", "loss", "val_loss")
    assert names(tmp_path) == ["log.jsonl", "log.png"]
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
