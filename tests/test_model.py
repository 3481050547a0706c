"""model.py against transformers: the same logits and greedy tokens, in fp32, for every family; loading;
batched generation against one by one; sampling against the softmax.

    pytest tests/test_model.py
"""
import json
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import LLAMA3_ROPE, pad_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
from data.base_model import fingerprint
from data.files import file_hash, read_tensors
from model import Cache, Config, RMSNorm, Transformer, generate, load, prefill, rope_tables, rotate
from sample import Settings, draw

LENGTH = 1500
SHAPES = {  # model_type, and what is typical of the family's config.json
    "llama 2": ("llama", {}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "smollm2": ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}),
    "tinyllama": ("llama", {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 32,
                            "num_key_value_heads": 4}),
    "no grouping, own head_dim": ("llama", {"num_key_value_heads": 4, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window longer than the context": ("mistral", {"sliding_window": 4096}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}
LAYOUTS = {  # every pair of tied or not, bf16 or fp32, one file or shards, with a head beside the tied or not
    "untied fp32 file": {},
    "untied bf16 shards": {"dtype": torch.bfloat16, "shard": "60KB"},
    "tied fp32 shards": {"tie_word_embeddings": True, "shard": "60KB"},
    "tied bf16 file with a head": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
}
GATE = "model.layers.1.mlp.gate_proj.weight"


def edited(folder, **changes):
    """folder with these fields of config.json changed (None: null)."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def with_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(scope="module", params=SHAPES)
def variant(request, layout, make_folder):
    """(folder, transformers' model) of each family in each file layout."""
    family, changes = SHAPES[request.param]
    folder, reference = make_folder(family, **(changes | LAYOUTS[layout]))
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shards" in layout)
    if "head" in layout:  # some checkpoints carry the tied head a second time, old ones the rope table
        with_tensors(folder, lambda t: t.update({
            "lm_head.weight": t["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(Config.read(folder).head_dim // 2)}))
    return folder, reference


@pytest.fixture(scope="module", params=SHAPES)
def family(request, make_folder):
    """(folder, transformers' model) of each family, one file, untied."""
    model_type, changes = SHAPES[request.param]
    return make_folder(model_type, **changes)


@pytest.fixture(scope="module")
def small(llama):
    return load(llama[0])


@pytest.fixture
def copied(llama, tmp_path):
    """A copy of the tiny Llama's folder, to be changed."""
    return shutil.copytree(llama[0], tmp_path / "m")


@pytest.fixture
def fused(monkeypatch):
    """A list of how many columns each call of PyTorch's attention kernel saw."""
    calls, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, **kw: calls.append(k.size(2)) or kernel(q, k, v, **kw))
    return calls


@torch.no_grad()
def logits(network, ids):
    """(B, T, V) of our model or of transformers'."""
    return network.logits(network(ids)) if isinstance(network, Transformer) else network(ids).logits


def random_ids(rows, length, vocab=96, seed=0):
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_list(length, seed):
    return random_ids(1, length, seed=seed)[0].tolist()


def difference(ours, reference, ids):
    """Largest absolute difference of the logits; asserts that their argmax is the same at every token."""
    a, b = logits(ours, ids), logits(reference, ids)
    assert a.shape == b.shape and torch.equal(a.argmax(-1), b.argmax(-1))
    return (a - b).abs().max().item()


# ---- parity with transformers ----------------------------------------------------------------------------

def test_logits_equal_transformers(variant, fused):
    """Trap 1: with the wrong rotation short texts look right, so 1,500 tokens; llama3's rope scaling too.
    200 tokens go through the attention that is written out."""
    folder, reference = variant
    ours, ids = load(folder), random_ids(1, LENGTH)
    assert difference(ours, reference, ids) < 1e-4
    assert fused.count(LENGTH) >= len(ours.layers)
    fused.clear()
    hidden = ours(ids[:, :200])
    assert not fused
    torch.testing.assert_close(hidden, ours(ids)[:, :200], rtol=1e-4, atol=1e-4)
    assert difference(ours, reference, ids[:, :200]) < 1e-4


@torch.no_grad()
def test_left_padded_batch_equals_transformers(variant, fused):
    """Trap 4 in the logits: rows of 1 to 300 tokens, padded with id 0 at the left; cached in three steps:
    attention written out, the kernel for more than 256 columns, the kernel for one new token."""
    folder, reference = variant
    ours = load(folder)
    ids, real = pad_rows([random_list(n, seed=n) for n in (1, 37, 300, 5)])
    b = reference(ids, attention_mask=real.long(), position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits
    cache, hidden = Cache(ours.config, 4, 300, ours.embed_tokens.weight), []
    for start, end, kernel in ((0, 190, []), (190, 299, [299]), (299, 300, [300])):
        fused.clear()
        hidden.append(ours(ids[:, start:end], cache, real[:, start:end]))
        assert fused == kernel * len(ours.layers)
    a = ours.logits(torch.cat(hidden, dim=1))
    assert (a - b)[real].abs().max() < 1e-4 and torch.equal(a.argmax(-1)[real], b.argmax(-1)[real])


def test_both_attentions_give_the_same_gradients(family, fused):
    """Training takes the one or the other, by the length of its longest row."""
    ours, ids, results = load(family[0]).requires_grad_(True), random_ids(2, 257), []
    for columns, kernel in ((256, []), (257, [257])):
        hidden = ours(ids[:, :columns])[:, :200]  # the last columns change nothing before them
        ours.zero_grad()
        ours.logits(hidden).logsumexp(-1).sum().backward()
        results.append([hidden, *(p.grad for p in ours.parameters())])
        assert fused == kernel * len(ours.layers)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item())


def test_the_parity_test_would_notice(make_folder, monkeypatch):
    """Trap 1 made on purpose: pairs instead of halves leave the first token right and break the rest; a rope
    scaling that is ignored changes the logits as well. Both by far more than the tolerance above."""
    folder, reference = make_folder("llama", rope_parameters=LLAMA3_ROPE)
    ids, ours = random_ids(1, LENGTH), load(folder)
    right = logits(reference, ids)

    def pairs(x, cos, sin):  # Meta's own layout: dimension 2i turns with 2i + 1
        x1, x2 = x[..., ::2], x[..., 1::2]
        return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)
    with monkeypatch.context() as patch:
        patch.setattr(model, "rotate", pairs)
        wrong = (logits(ours, ids) - right).abs().amax(-1)[0]
        assert wrong[0] < 1e-4 and wrong[1:].max() > 1
    ours.config.rope_scaling = None
    assert (logits(ours, ids) - right).abs().max() > 1


def test_rope_settings_of_older_config_files(make_folder):
    """transformers 4 wrote rope_theta and rope_scaling, 5 writes rope_parameters: both are read."""
    folder, reference = make_folder("llama", rope_parameters=LLAMA3_ROPE | {"rope_theta": 5000.0})
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    edited(folder, rope_parameters=None, rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    assert difference(load(folder), reference, random_ids(1, LENGTH)) < 1e-4


@pytest.mark.slow
def test_base_logits_equal_transformers(base, base_model, base_reference, base_tokenizer, story):
    """Trap 1 on the real model: more than 1,000 tokens of text, then 24 greedy tokens."""
    paragraphs = story.split("\n\n")
    text = story + "\nThe same story, told from its end:\n\n" + "\n\n".join(paragraphs[::-1] + paragraphs[:1])
    ids = torch.tensor([base_tokenizer.encode(text)])
    assert ids.size(1) > 1000
    largest = difference(base_model, base_reference, ids)
    print(f"\nlargest logit difference over {ids.size(1)} tokens: {largest:.1e}")
    assert largest < 5e-4  # 30 layers add up their rounding; logits are around 20

    prompt = ids[0, :40].tolist()
    [expected] = generated(base_reference, [prompt], 24)
    assert len(expected) == 24
    assert generate(base_model, [prompt], 24, base_tokenizer.ends) == [expected]


def test_rmsnorm_and_rotation_by_hand():
    norm = RMSNorm(4, eps=1e-5)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = torch.tensor([3.0, -3.0, 3.0, -3.0])
    torch.testing.assert_close(norm(x), torch.tensor([1.0, -2.0, 3.0, -4.0]))
    assert norm(torch.full((4,), 300.0, dtype=torch.half)).isfinite().all()  # 300^2 is beyond half precision

    config = Config(8, 4, 4, 1, 1, 1, 4, 1e-5, 100.0, None, 64, True, False, False)
    cos, sin = rope_tables(config, torch.tensor([[0, 7]]))
    assert cos.shape == sin.shape == (1, 1, 2, 2)  # D / 2 angles for each position
    x = torch.tensor([1.0, 10.0, 2.0, 20.0]).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    turned = rotate(x, cos, sin)[0, 0]
    torch.testing.assert_close(turned[0], x[0, 0, 0])  # position 0 stays
    # dimensions 0 and 2 are one complex number, turned by 1 a step; 1 and 3 another, by 100^-1/2 = 0.1
    for first, angle in ((0, 7.0), (1, 0.7)):
        z = complex(x[0, 0, 0, first], x[0, 0, 0, first + 2]) * torch.exp(torch.tensor(1j * angle)).item()
        torch.testing.assert_close(turned[1, [first, first + 2]], torch.tensor([z.real, z.imag]))


# ---- config.json and weights -----------------------------------------------------------------------------

def test_load_is_exact(variant, layout):
    folder, _ = variant
    ours = load(folder)
    state, seen = ours.state_dict(), set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                key = name.removeprefix("model.")
                if key in state or "head" not in layout:  # what layouts with a head hold besides is not used
                    assert torch.equal(state[key], file.get_tensor(name).float()), name
                    seen.add(key)
    assert seen == set(state)
    assert not any(p.requires_grad or p.is_meta for p in ours.parameters())


def test_a_tied_head_that_is_not_the_embedding_is_refused(make_folder, tmp_path):
    """Ignored, it would change every token. With tie_word_embeddings false the same file is right."""
    folder = shutil.copytree(make_folder("llama", tie_word_embeddings=True)[0], tmp_path / "m")
    with_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1e-3}))
    with pytest.raises(ValueError, match="tie_word_embeddings is true, but lm_head.weight is not the embed"):
        load(folder)
    assert load(edited(folder, tie_word_embeddings=False)).lm_head is not None


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_any_stored_type_into_any_wanted(make_folder, stored, wanted):
    """data/base is a float16 file, most others are bfloat16; --dtype says what it becomes: one rounding."""
    folder, _ = make_folder("llama", dtype=stored)
    tensors, state = load_file(folder / "model.safetensors"), load(folder, wanted).state_dict()
    assert {t.dtype for t in tensors.values()} == {stored} and len(tensors) == len(state)
    for name, tensor in tensors.items():
        ours = state[name.removeprefix("model.")]
        assert ours.dtype == wanted and torch.equal(ours, tensor.to(wanted)), name


def test_load_keeps_no_hold_of_the_file(copied):
    """The weights are copies: replacing or clearing the file changes no model that was read from it."""
    ours, file = load(copied), copied / "model.safetensors"
    before = ours.embed_tokens.weight.clone()
    with open(file, "r+b") as raw:  # overwrite in place, where a memory map would show it
        raw.write(bytes(file.stat().st_size))
    assert torch.equal(ours.embed_tokens.weight, before)


@pytest.mark.parametrize("changes", [
    {"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False},  # Qwen2 files are like this
    {"model_type": "qwen3", "sliding_window": 512, "use_sliding_window": True,
     "layer_types": ["full_attention"] * 2},
    # before there were layer_types: windows from a layer on, here behind the last of two
    {"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": True, "max_window_layers": 2},
    {"model_type": "mistral", "sliding_window": None}])
def test_window_that_is_off_is_taken(copied, changes):
    """Many files name a window that no layer uses. A window that one layer uses is refused."""
    assert Config.read(edited(copied, **changes))
    used = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(ValueError, match="config.json: sliding_window = 512 is not supported"):
        Config.read(edited(copied, sliding_window=512, **used))
    used = {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
    with pytest.raises(ValueError, match="config.json: sliding_window = 512 is not supported"):
        Config.read(edited(copied, sliding_window=512, **used))


def test_null_in_config_means_absent(copied):
    """Some files write null where others leave a field out."""
    config = Config.read(edited(copied, **dict.fromkeys((
        "num_key_value_heads", "head_dim", "rope_parameters", "rope_scaling", "rope_theta", "attention_bias",
        "tie_word_embeddings", "hidden_act", "sliding_window", "quantization_config"))))
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 12, 10000.0)
    assert config.rope_scaling is None and config.tie_word_embeddings is False
    rope = {"rope_type": None, "type": None, "rope_theta": None}
    assert Config.read(edited(copied, rope_parameters=rope, rope_theta=7.0)).rope_theta == 7.0
    with pytest.raises(ValueError, match="sliding_window = 512 is not supported"):  # in all layers
        Config.read(edited(copied, model_type="mistral", sliding_window=512, layer_types=[]))
    with pytest.raises(ValueError, match="config.json: field 'hidden_size' must be a number.*missing"):
        Config.read(edited(copied, hidden_size=None))


PUBLISHED = {  # config.json as these models have it, the sizes smaller; and what must come of it
    "Llama-3.2-Instruct": ({
        "model_type": "llama", "attention_bias": False, "mlp_bias": False, "head_dim": 64,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "rms_norm_eps": 1e-05}, (False, False, True)),
    "Qwen2.5-Instruct": ({
        "model_type": "qwen2", "attention_dropout": 0.0, "max_window_layers": 21, "sliding_window": 32768,
        "use_mrope": False, "use_sliding_window": False, "rope_theta": 1000000.0, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-06}, (True, False, False)),
    "Qwen3": ({
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "max_window_layers": 28,
        "rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "rope_theta": 1000000,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-06}, (False, True, False)),
    "SmolLM2-Instruct": ({
        "model_type": "llama", "attention_bias": False, "mlp_bias": False, "is_llama_config": True,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-05}, (False, False, False)),
    "Mistral-Instruct-v0.3": ({
        "model_type": "mistral", "attention_dropout": 0.0, "sliding_window": None, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-05}, (False, False, False)),
}


@pytest.mark.parametrize("config, wanted", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs_are_read(tmp_path, config, wanted):
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
             "use_cache": True, "num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "bfloat16",
             "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768}
    (tmp_path / "config.json").write_text(json.dumps(sizes | config))
    read = Config.read(tmp_path)
    assert (read.qkv_bias, read.qk_norm, read.rope_scaling is not None) == wanted
    assert read.rope_theta == config["rope_theta"]
    assert read.tie_word_embeddings == config["tie_word_embeddings"]


def test_one_file_wins_over_an_old_index(make_folder, capsys):
    """As in transformers. Saving removes the index: other programs look for it first."""
    folder, _ = make_folder("llama", shard="60KB")
    ours, shards, one = load(folder), fingerprint(folder), folder / "model.safetensors"
    index, before = folder / f"{one.name}.index.json", ours.norm.weight.clone()
    names = index.read_bytes()
    ours.norm.weight += 1
    for said in (f"({index}: removed, since it names older weights)\n", ""):
        model.save(ours, folder, folder)
        assert capsys.readouterr().out == said and not index.exists()
    index.write_bytes(names)
    assert torch.equal(load(folder).norm.weight, before + 1)
    assert fingerprint(folder) == file_hash(folder / "config.json", one) != shards
    one.unlink()
    assert torch.equal(load(folder).norm.weight, before) and fingerprint(folder) == shards


A, B = torch.ones(2, 3), torch.ones(4)


@pytest.mark.parametrize("files, sentence", [
    ([], "the folder: 2 tensors are missing, e.g. 'a'"),
    ([{"model.b": B}, {}], "1: 1 tensors are missing, e.g. 'a'"),
    ([{"b": B, "model.d": A}], "0: unexpected tensor 'model.d' (not part of it)"),
    ([{"a": A, "b": B}, {"model.a": A}], "1: unexpected tensor 'model.a' (twice in these files)"),
    ([{"model.a": torch.ones(3, 2)}],
     "0: tensor 'model.a' is torch.float32 [3, 2], but floats [2, 3] are needed"),
    ([{"b": B.int()}], "0: tensor 'b' is torch.int32 [4], but floats [4] are needed"),
    ([{"b": B.to(torch.float8_e4m3fn)}],
     "0: tensor 'b' is torch.float8_e4m3fn [4], but floats [4] are needed"),
    ([{"a": A, "b": B / 0}], "0: tensor 'b' is not finite everywhere"),
    ([{"a": A * torch.nan}], "0: tensor 'a' is not finite everywhere")])
def test_read_tensors_names_file_and_tensor(tmp_path, files, sentence):
    """The one check of all that is loaded: of a base model, an adapter, a matcher, a state of training."""
    def read(files):
        paths = [tmp_path / str(i) for i in range(len(files))]
        for path, tensors in zip(paths, files, strict=True):
            save_file(tensors, path)
        return dict(read_tensors(paths, {"a": A, "b": B, "c": B}, "fetch it again", ["c"], "model."))
    with pytest.raises(ValueError) as error:
        read(files)
    assert str(error.value).removeprefix(f"{tmp_path}/") == f"{sentence}; fetch it again."
    good = read([{"model.a": A.half()}, {"b": B}])  # the refusal was due to what was wrong
    assert good.keys() == {"a", "b"} and good["a"].dtype == torch.half and torch.equal(good["b"], B)


@pytest.mark.parametrize("change", [
    lambda folder: edited(folder, rms_norm_eps=1e-3),
    lambda folder: (folder / "tokenizer.json").write_text("{}"),  # corrected later: other ids, other answers
    lambda folder: with_tensors(folder, lambda t: t["model.norm.weight"].add_(1)),
    lambda folder: with_tensors(folder, lambda t: t[GATE].add_(1))])
def test_fingerprint(make_folder, tmp_path, change):
    """A base with a merged LoRA has the embedding, the sizes and the config of the base itself; with the same
    id, an adapter or a cache of rewards made for one would be taken for the other (trap 7)."""
    folder, _ = make_folder("llama", vocab_size=32768, tie_word_embeddings=True)
    before = fingerprint(folder)
    copy = shutil.copytree(folder, tmp_path / "m")
    assert fingerprint(copy) == before and len(before) == 16
    change(copy)
    assert fingerprint(copy) != before


# ---- generation: ragged batches, the cache, prefixes -----------------------------------------------------

@torch.no_grad()
def naive(model, prompt, steps, ends=()):
    """Greedy without any cache: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(logits(model, torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in ends:
            break
    return ids[len(prompt):]


def cut(answer, ends):
    """answer up to its first id of `ends`, that id included."""
    return answer[:next((i + 1 for i, token in enumerate(answer) if token in ends), None)]


def ragged(count=9):
    """Prompts of different lengths, 1 to 70 tokens."""
    return [random_list(n, seed=n) for n in [1, 2, 70, 5, 33, 8, 3, 21, 13][:count]]


@torch.inference_mode()
def generated(reference, prompts, steps, **ends):
    """transformers' greedy `generate` of a batch padded at the left."""
    ids, real = pad_rows(prompts)
    out = reference.generate(ids, attention_mask=real.long(), max_new_tokens=steps, do_sample=False, **ends)
    return out[:, ids.size(1):].tolist()


def test_ragged_batch_equals_one_by_one(family):
    """Trap 4: every row of a ragged batch is answered as if it were alone, with no cache, by transformers."""
    folder, reference = family
    ours, prompts = load(folder), ragged()
    together = generate(ours, prompts, 15, ends=())
    assert together == [generate(ours, [p], 15, ends=())[0] for p in prompts]
    assert together == [naive(ours, p, 15) for p in prompts]
    assert len({tuple(a) for a in together}) > 5  # the rows say different things

    # transformers' generate on the same batch, stopping at any of two ids, padded there with id 0
    ends = [together[0][9], together[1][12]]
    theirs = generated(reference, prompts, 15, eos_token_id=ends, pad_token_id=0)
    assert generate(ours, prompts, 15, ends) == [cut(answer, ends) for answer in theirs]


def test_positions_shared_by_the_batch_would_be_noticed(small, monkeypatch):
    """Trap 4 made on purpose: with the columns as positions, its padding parts a prompt from its prefix.
    (Padding before everything shifts a row as a whole, which rotary positions do not see.)"""
    prompts = ragged()
    answer = partial(generate, small, prompts, 15, (), prefixes=prefill(small, [random_list(11, 50)]) * 9)
    right = answer()

    def shared(config, positions):  # the longest row has no padding: its positions are the columns
        return rope_tables(config, positions.amax(0, keepdim=True).expand_as(positions))
    monkeypatch.setattr(model, "rope_tables", shared)
    assert [len(p) for p, a, b in zip(prompts, right, answer(), strict=True) if a == b] == [70]


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
def test_cached_states_of_padded_rows(small, left):
    """Trap 4 below the argmax: hidden states with padding at the left, at the right and in several steps."""
    prompts = [random_list(n, seed=n) for n in (4, 9, 1)]
    ids, real = pad_rows(prompts, left)
    cache = Cache(small.config, 3, 13, small.embed_tokens.weight)
    hidden = [small(ids[:, :5], cache, real[:, :5]), small(ids[:, 5:], cache, real[:, 5:])]
    hidden = torch.cat([*hidden, small(random_ids(3, 4), cache)], dim=1)
    assert hidden.isfinite().all()  # a column of padding that sees nothing would give NaN
    for row, p in enumerate(prompts):
        alone = small(torch.tensor([p + random_ids(3, 4)[row].tolist()]))[0]
        kept = hidden[row, torch.cat((real[row], torch.ones(4, dtype=torch.bool)))]
        torch.testing.assert_close(kept, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("width", [70, 300])  # attention written out, and the kernel
def test_padding_at_the_right_changes_nothing(small, width):
    """What train_sft.py does: no cache, rows padded at the right with id 0."""
    rows = ragged(4)
    hidden = small(pad_rows(rows, left=False, width=width)[0])
    for row, prompt in enumerate(rows):
        alone = small(torch.tensor([prompt]))[0]
        torch.testing.assert_close(hidden[row, :len(prompt)], alone, rtol=1e-4, atol=1e-4)


BASE_PROMPTS = ["The", "Water boils at", "My grandmother's recipe for plum cake begins with", "1, 2, 3,",
                "### Instruction:\nName a colour.\n\n### Response:\n", "Dear neighbour,\n\nyour cat",
                "The lighthouse keeper had eleven pillows, and the one that she liked best was",
                "Once upon a"]


@pytest.mark.slow
def test_base_ragged_batch_equals_one_by_one(base_model, base_reference, base_tokenizer):
    """Trap 4 on the real model: batched == one by one == no cache == transformers' generate."""
    prompts, ends = [base_tokenizer.encode(t) for t in BASE_PROMPTS], base_tokenizer.ends
    assert len(set(map(len, prompts))) >= 6
    together = generate(base_model, prompts, 8, ends)
    for prompt, answer in zip(prompts, together, strict=True):
        assert generate(base_model, [prompt], 8, ends) == [answer]
        assert naive(base_model, prompt, 8, ends) == answer
        assert generated(base_reference, [prompt], 8) == [answer]


@pytest.mark.parametrize("shared", [1, 6, 40, 300])
def test_prefix_reuse_changes_nothing(small, shared):
    """A prefix computed once stands before many prompts, next to rows with another one or none."""
    prompts, one, other = ragged(), random_list(shared, seed=50), random_list(11, seed=51)
    texts = [[one, other, []][i % 3] for i in range(len(prompts))]
    made = iter(prefill(small, [t for t in texts if t]))  # together, padded: as if alone
    prefixes = [next(made) if t else None for t in texts]
    joined = generate(small, [t + p for t, p in zip(texts, prompts, strict=True)], 12, ends=())
    assert generate(small, prompts, 12, ends=(), prefixes=prefixes) == joined
    assert generate(small, prompts, 12, ends=()) != joined


def test_base_prefix_reuse(base_model, base_tokenizer):
    encode, ends = base_tokenizer.encode, base_tokenizer.ends
    prompt = encode("### Instruction:\nName a fruit.\n\n### Response:\nplum\n\n")
    queries = [encode(f"### Instruction:\nName {x}.\n\n### Response:\n") for x in ("a colour", "a big river")]
    answers = generate(base_model, queries, 5, ends, prefixes=prefill(base_model, [prompt]) * 2)
    assert answers == generate(base_model, [prompt + q for q in queries], 5, ends)


def test_rows_stop_and_leave(small, monkeypatch):
    """At an end id or at the stop sequence a row ends, that id included; the others go on as if nothing
    happened, also when the finished rows are dropped from the cache."""
    prompts = ragged()
    long = generate(small, prompts, 30, ends=())
    dropped, keep = [], Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda self, rows: dropped.append(len(rows)) or keep(self, rows))
    lengths, tokens = set(), sorted({token for answer in long for token in answer})
    for end, other in zip(tokens, [*tokens[1:], -1], strict=True):
        expected = [cut(a, [end]) for a in long]
        assert generate(small, prompts, 30, {end}) == expected
        assert generate(small, prompts, 30, [end, other]) == [cut(a, [end, other]) for a in long]
        lengths |= set(map(len, expected))
    assert len(dropped) > 5 and len(lengths) > 10  # or this test has shown nothing

    for answer in long:
        stop = answer[4:6]
        stopped = [next((a[:i + 2] for i in range(29) if a[i:i + 2] == stop), a) for a in long]
        def ended(ids, stop=stop):
            return ids[-2:] == stop
        assert generate(small, prompts, 30, ends=(), stop=ended) == stopped
        assert generate(small, prompts, 30, [answer[9]], stop=ended) == [cut(a, [answer[9]]) for a in stopped]


def test_on_token_and_limits(small):
    prompts, heard = ragged(), [[] for _ in ragged()]
    end = generate(small, prompts, 9, ends=())[2][4]
    answers = generate(small, prompts, 9, [end], on_token=lambda row, token: heard[row].append(token))
    assert heard == answers and {len(a) for a in answers} >= {9}
    assert generate(small, prompts, 1, ends=()) == [a[:1] for a in answers]
    assert generate(small, prompts, 0, ends=()) == [[] for _ in prompts]


# ---- sampling --------------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, -0.5])


def draws(n=20_000, **settings):
    settings = Settings(**{"temperature": 1.0} | settings)
    return draw(LOGITS.expand(n, -1), settings, torch.Generator().manual_seed(0))


def chi_square(counts, probs):
    """Sum of (seen - expected)^2 / expected over the possible outcomes; impossible ones must not be seen."""
    expected = probs * counts.sum()
    assert (counts[probs == 0] == 0).all()
    return ((counts - expected)[probs > 0] ** 2 / expected[probs > 0]).sum().item()


@pytest.mark.parametrize("settings, kept", [
    ({}, 8), ({"temperature": 0.5}, 8), ({"temperature": 2.0}, 8), ({"top_k": 8}, 8), ({"top_k": 99}, 8),
    ({"top_k": 3}, 3),
    ({"top_p": 0.6}, 2),  # 0.41 + 0.25 reaches it with the second
    ({"top_p": 0.7}, 3), ({"top_k": 3, "top_p": 0.9}, 3), ({"top_k": 2, "top_p": 0.7}, 2)])
def test_sampling_follows_the_softmax(settings, kept):
    """Chi-square below its 99.9% point for 7 degrees of freedom (24.3); the seed is fixed."""
    probs = F.softmax(LOGITS / settings.get("temperature", 1.0), -1)
    probs[probs.argsort(descending=True)[kept:]] = 0
    counts = torch.bincount(draws(**settings), minlength=8).float()
    assert chi_square(counts, probs / probs.sum()) < 24.3
    assert (counts > 0).sum() == kept


def test_chi_square_would_notice():
    counts = torch.bincount(draws(temperature=1.1), minlength=8).float()
    assert chi_square(counts, F.softmax(LOGITS, -1)) > 24.3


def test_greedy_limits(small):
    """temperature 0 or next to it, top_k 1 and a tiny top_p are all greedy."""
    for settings in ({"temperature": 0.0}, {"temperature": 1e-39}, {"top_k": 1}, {"top_p": 1e-6}):
        assert (draws(200, **settings) == 3).all()
    greedy = generate(small, ragged(), 10, ends=())
    for settings in ({"top_k": 1}, {"top_p": 1e-6}):
        choose = partial(draw, s=Settings(temperature=1.0, **settings), generator=None)
        assert generate(small, ragged(), 10, ends=(), choose=choose) == greedy


@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 300, 999])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.9, 0.99, 1.0])
def test_probabilities_equal_transformers(monkeypatch, temperature, top_k, top_p):
    """Not by drawing: the probabilities that are drawn from, against transformers' own three steps."""
    logits = 3 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    steps = [transformers.TemperatureLogitsWarper(temperature), transformers.TopPLogitsWarper(top_p)]
    if top_k:
        steps.insert(1, transformers.TopKLogitsWarper(top_k))
    wanted, seen = logits, []
    for step in steps:
        wanted = step(None, wanted)
    wanted = wanted.softmax(-1)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda probs, n, generator: seen.append(probs) or probs[:, :1])
        draw(logits, Settings(temperature=temperature, top_k=top_k, top_p=top_p), None)
    ours = seen[0] / seen[0].sum(-1, keepdim=True)  # multinomial normalises
    assert torch.equal(ours > 0, wanted > 0)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


def test_same_generator_seed_same_text(small):
    def text(seed):
        choose = partial(draw, s=Settings(temperature=1.0), generator=torch.Generator().manual_seed(seed))
        return generate(small, ragged(), 10, ends=(), choose=choose)
    torch.manual_seed(1)
    first = text(0)
    torch.manual_seed(2)  # the global seed has no say
    assert text(0) == first != text(1)
