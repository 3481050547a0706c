"""model.py against transformers: the same logits and greedy tokens, in fp32, for every family; refusals;
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
from conftest import LLAMA3_ROPE
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
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
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    return folder, reference


@pytest.fixture(scope="module", params=SHAPES)
def family(request, make_folder):
    """(folder, transformers' model) of each family, one file, untied."""
    model_type, changes = SHAPES[request.param]
    return make_folder(model_type, **changes)


@pytest.fixture(scope="module")
def small(llama):
    return load(llama[0])


@torch.no_grad()
def logits(network, ids):
    """(B, T, V) of our model or of transformers'."""
    return network.head(network(ids)) if isinstance(network, Transformer) else network(ids).logits


def random_ids(rows, length, vocab=96, seed=0):
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(ours, reference, ids):
    """Largest absolute difference of the logits; asserts that their argmax is the same at every token."""
    a, b = logits(ours, ids), logits(reference, ids)
    assert a.shape == b.shape and torch.equal(a.argmax(-1), b.argmax(-1))
    return (a - b).abs().max().item()


# ---- parity with transformers --------------------------------------------------------------------

def test_logits_equal_transformers(variant):
    """Trap 1: with the wrong rotation short texts look right, so 1,500 tokens; llama3's rope scaling too."""
    folder, reference = variant
    assert difference(load(folder), reference, random_ids(1, LENGTH)) < 1e-4


@torch.no_grad()
def test_left_padded_batch_equals_transformers(variant):
    """Trap 4 in the logits: rows of 1 to 200 tokens, padded with id 0 at the left; cached in two steps."""
    folder, reference = variant
    ours, lengths = load(folder), (1, 37, 200, 5)
    ids, real = random_ids(4, 200), torch.arange(200) >= 200 - torch.tensor(lengths)[:, None]
    ids[~real] = 0
    b = reference(ids, attention_mask=real.long(), position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits
    cache = Cache(ours.config, 4, 200, ours.embed_tokens.weight)
    hidden = [ours(ids[:, :190], cache, real[:, :190]), ours(ids[:, 190:], cache, real[:, 190:])]
    a = ours.head(torch.cat(hidden, dim=1))
    assert (a - b)[real].abs().max() < 1e-4 and torch.equal(a.argmax(-1)[real], b.argmax(-1)[real])


def test_the_parity_test_would_notice(make_folder, monkeypatch):
    """Trap 1 made on purpose: pairs instead of halves leave the first token right and break the rest; a rope
    scaling that is ignored changes the logits as well. Both by far more than the tolerance above."""
    folder, reference = make_folder("llama", rope_parameters=LLAMA3_ROPE)
    ids, ours = random_ids(1, LENGTH), load(folder)
    right = logits(reference, ids)

    def pairs(x, cos, sin):  # Meta's own layout: dimension 2i turns with 2i + 1
        D = x.size(-1)
        cos, sin = (t[..., :D // 2].repeat_interleave(2, -1) for t in (cos, sin))
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin
    with monkeypatch.context() as patch:
        patch.setattr(model, "rotate", pairs)
        wrong = (logits(ours, ids) - right).abs().amax(-1)[0]
        assert wrong[0] < 1e-4 and wrong[1:].max() > 1
    ours.config.rope_scaling = None
    assert (logits(ours, ids) - right).abs().max() > 1


def test_rope_settings_of_older_config_files(make_folder):
    """transformers 4 wrote rope_theta and rope_scaling, 5 writes rope_parameters: both are read."""
    folder, reference = make_folder("llama", rope_parameters=LLAMA3_ROPE | {"rope_theta": 5000.0})
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(config))
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

    prompt = ids[:, :40]
    expected = base_reference.generate(prompt, max_new_tokens=24, do_sample=False)[0, 40:].tolist()
    assert len(expected) == 24
    assert generate(base_model, [prompt[0].tolist()], 24, eos=base_tokenizer.eos) == [expected]


def test_rmsnorm_and_rotation_by_hand():
    norm = RMSNorm(4, eps=1e-5)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = torch.tensor([3.0, -3.0, 3.0, -3.0])
    torch.testing.assert_close(norm(x), torch.tensor([1.0, -2.0, 3.0, -4.0]))
    assert norm(torch.full((4,), 300.0, dtype=torch.half)).isfinite().all()  # 300^2 is beyond half precision

    config = Config(8, 4, 4, 1, 1, 1, 4, 1e-5, 100.0, None, 64, True, False, False)
    cos, sin = rope_tables(config, torch.tensor([[0, 7]]))
    x = torch.tensor([1.0, 10.0, 2.0, 20.0]).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    turned = rotate(x, cos, sin)[0, 0]
    torch.testing.assert_close(turned[0], x[0, 0, 0])  # position 0 stays
    # dimensions 0 and 2 are one complex number, turned by 1 a step; 1 and 3 another, by 100^-1/2 = 0.1
    for first, angle in ((0, 7.0), (1, 0.7)):
        z = complex(x[0, 0, 0, first], x[0, 0, 0, first + 2]) * torch.exp(torch.tensor(1j * angle)).item()
        torch.testing.assert_close(turned[1, [first, first + 2]], torch.tensor([z.real, z.imag]))


# ---- loading -------------------------------------------------------------------------------------

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


def test_load_keeps_no_hold_of_the_file(llama, tmp_path):
    """The weights are copies: replacing or clearing the file changes no model that was read from it."""
    folder = shutil.copytree(llama[0], tmp_path / "m")
    ours = load(folder)
    before = ours.embed_tokens.weight.clone()
    file = folder / "model.safetensors"
    with open(file, "r+b") as raw:  # overwrite in place, where a memory map would show it
        raw.write(bytes(file.stat().st_size))
    assert torch.equal(ours.embed_tokens.weight, before)


def edited(folder, **changes):
    """folder with these fields of config.json changed (None removes one)."""
    file = folder / "config.json"
    config = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not None}
    file.write_text(json.dumps(config))
    return folder


def test_window_that_is_off_is_taken(llama, tmp_path):
    """Qwen2 files name a window and switch it off."""
    folder = shutil.copytree(llama[0], tmp_path / "m")
    assert Config.read(edited(folder, model_type="qwen2", sliding_window=512, use_sliding_window=False))


def with_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


GATE = "model.layers.1.mlp.gate_proj.weight"


def test_fingerprint(llama, tmp_path):
    folder = shutil.copytree(llama[0], tmp_path / "m")
    before = model.fingerprint(folder)
    assert before == model.fingerprint(llama[0]) and len(before) == 16
    edited(folder, rms_norm_eps=1e-3)
    assert model.fingerprint(folder) != before
    folder = shutil.copytree(llama[0], tmp_path / "n")
    with_tensors(folder, lambda t: t["model.norm.weight"].add_(1))
    assert model.fingerprint(folder) != before


def test_fingerprint_sees_all_weights(make_folder, tmp_path):
    """A base with a merged LoRA has the embedding, the sizes and the config of the base itself; with the same
    id, an adapter or a cache of rewards made for one would be taken for the other (trap 7)."""
    folder, _ = make_folder("llama", vocab_size=8192, tie_word_embeddings=True)
    before = model.fingerprint(folder)
    with_tensors(folder, lambda t: t[GATE].add_(1))
    assert model.fingerprint(folder) != before


# ---- generation: ragged batches, the cache, prefixes ---------------------------------------------

@torch.no_grad()
def naive(model, prompt, steps, eos=-1):
    """Greedy without any cache: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(logits(model, torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == eos:
            break
    return ids[len(prompt):]


def ragged(count=9, seed=0):
    """Prompts of different lengths, 1 to 70 tokens."""
    lengths = [1, 2, 70, 5, 33, 8, 3, 21, 13][:count]
    return [random_ids(1, n, seed=seed + n)[0].tolist() for n in lengths]


def test_ragged_batch_equals_one_by_one(family):
    """Trap 4: every row of a ragged batch is answered as if it were alone, with no cache, by transformers."""
    folder, reference = family
    ours, prompts = load(folder), ragged()
    together = generate(ours, prompts, 15, eos=-1)
    assert together == [generate(ours, [p], 15, eos=-1)[0] for p in prompts]
    assert together == [naive(ours, p, 15) for p in prompts]
    assert len({tuple(a) for a in together}) > 5  # the rows say different things

    # transformers' generate on the same batch, stopping at the config's eos, padded there with id 0
    eos = together[0][9]
    theirs = generated(reference, prompts, 15, eos_token_id=eos, pad_token_id=0)
    theirs = [answer[:answer.index(eos) + 1] if eos in answer else answer for answer in theirs]
    assert generate(ours, prompts, 15, eos) == theirs


@torch.inference_mode()
def generated(reference, prompts, steps, **settings):
    """transformers' greedy `generate` of a batch padded at the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = reference.generate(ids, attention_mask=real, max_new_tokens=steps, do_sample=False, **settings)
    return out[:, width:].tolist()


def test_positions_shared_by_the_batch_would_be_noticed(small, monkeypatch):
    """Trap 4 made on purpose: with the columns as positions, its padding parts a prompt from its prefix.
    (Padding before everything shifts a row as a whole, which rotary positions do not see.)"""
    prompts, [prefix] = ragged(), prefill(small, [random_ids(1, 11, seed=50)[0].tolist()])
    right = generate(small, prompts, 15, eos=-1, prefixes=[prefix] * len(prompts))

    def shared(config, positions):  # the longest row has no padding: its positions are the columns
        return rope_tables(config, positions.amax(0, keepdim=True).expand_as(positions))
    monkeypatch.setattr(model, "rope_tables", shared)
    wrong = generate(small, prompts, 15, eos=-1, prefixes=[prefix] * len(prompts))
    assert [len(p) for p, a, b in zip(prompts, right, wrong, strict=True) if a == b] == [70]


@torch.no_grad()
def test_cached_states_of_padded_rows(small):
    """Trap 4 below the argmax: hidden states with padding at the left, at the right and in several steps."""
    prompts = [random_ids(1, n, seed=n)[0] for n in (4, 9, 1)]
    for left in (True, False):
        ids, real = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.bool)
        for row, p in enumerate(prompts):
            place = slice(9 - len(p), 9) if left else slice(0, len(p))
            ids[row, place], real[row, place] = p, True
        cache = Cache(small.config, 3, 13, small.embed_tokens.weight)
        hidden = [small(ids[:, :5], cache, real[:, :5]), small(ids[:, 5:], cache, real[:, 5:])]
        hidden = torch.cat([*hidden, small(random_ids(3, 4), cache)], dim=1)
        assert hidden.isfinite().all()  # a column of padding that sees nothing would give NaN
        for row, p in enumerate(prompts):
            alone = small(torch.cat((p, random_ids(3, 4)[row]))[None])[0]
            kept = hidden[row, torch.cat((real[row], torch.ones(4, dtype=torch.bool)))]
            torch.testing.assert_close(kept, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_at_the_right_changes_nothing(small):
    """What train_sft.py does: no cache, rows padded at the right with id 0."""
    rows = ragged(4)
    ids = torch.zeros(4, 70, dtype=torch.long)
    for row, prompt in enumerate(rows):
        ids[row, :len(prompt)] = torch.tensor(prompt)
    hidden = small(ids)
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
    prompts, eos = [base_tokenizer.encode(t) for t in BASE_PROMPTS], base_tokenizer.eos
    assert len(set(map(len, prompts))) >= 6
    together = generate(base_model, prompts, 8, eos)
    for prompt, answer in zip(prompts, together, strict=True):
        assert generate(base_model, [prompt], 8, eos) == [answer]
        assert naive(base_model, prompt, 8, eos) == answer
        theirs = base_reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert theirs[0, len(prompt):].tolist() == answer


@pytest.mark.parametrize("shared", [1, 6, 40])
def test_prefix_reuse_changes_nothing(small, shared):
    """A prefix computed once stands before many prompts, next to rows with another one or none."""
    prompts = ragged()
    one, other = random_ids(1, shared, seed=50)[0].tolist(), random_ids(1, 11, seed=51)[0].tolist()
    texts = [[one, other, []][i % 3] for i in range(len(prompts))]
    made = iter(prefill(small, [t for t in texts if t]))  # together, padded: as if alone
    prefixes = [next(made) if t else None for t in texts]
    joined = [t + p for t, p in zip(texts, prompts, strict=True)]
    assert generate(small, prompts, 12, eos=-1, prefixes=prefixes) == generate(small, joined, 12, eos=-1)
    assert generate(small, prompts, 12, eos=-1) != generate(small, joined, 12, eos=-1)


def test_base_prefix_reuse(base_model, base_tokenizer):
    encode, eos = base_tokenizer.encode, base_tokenizer.eos
    exemplar = encode("### Instruction:\nName a fruit.\n\n### Response:\nplum\n\n")
    queries = [encode(f"### Instruction:\nName {x}.\n\n### Response:\n") for x in ("a colour", "a big river")]
    answers = generate(base_model, queries, 5, eos, prefixes=prefill(base_model, [exemplar]) * 2)
    assert answers == generate(base_model, [exemplar + q for q in queries], 5, eos)


def test_rows_stop_and_leave(small, monkeypatch):
    """At eos or at the stop sequence a row ends, that id included; the others go on as if nothing happened,
    also when the finished rows are dropped from the cache."""
    prompts = ragged()
    long = generate(small, prompts, 30, eos=-1)
    dropped, keep = [], Cache.keep

    def spy(self, rows):
        dropped.append(len(rows))
        keep(self, rows)
    monkeypatch.setattr(Cache, "keep", spy)
    ends = set()
    for eos in sorted({token for answer in long for token in answer}):
        expected = [a[:a.index(eos) + 1] if eos in a else a for a in long]
        assert generate(small, prompts, 30, eos) == expected
        ends |= set(map(len, expected))
    assert len(dropped) > 5 and len(ends) > 10  # or this test has shown nothing

    for answer in long:
        stop = answer[4:6]
        cut = [next((a[:i + 2] for i in range(29) if a[i:i + 2] == stop), a) for a in long]
        assert generate(small, prompts, 30, eos=-1, stop=stop) == cut
        assert generate(small, prompts, 30, eos=answer[9], stop=stop) == [
            c[:c.index(answer[9]) + 1] if answer[9] in c else c for c in cut]


def test_on_token_and_limits(small):
    prompts, heard = ragged(), [[] for _ in ragged()]
    eos = generate(small, prompts, 9, eos=-1)[2][4]
    answers = generate(small, prompts, 9, eos, on_token=lambda row, token: heard[row].append(token))
    assert heard == answers and {len(a) for a in answers} >= {9}
    assert generate(small, prompts, 1, eos=-1) == [a[:1] for a in answers]
    assert generate(small, prompts, 0, eos=-1) == [[] for _ in prompts]


# ---- sampling ------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, -0.5])


def draws(n=20_000, seed=0, **settings):
    settings = Settings(**{"temperature": 1.0} | settings)
    return draw(LOGITS.expand(n, -1), settings, torch.Generator().manual_seed(seed))


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
    """temperature 0, top_k 1 and a tiny top_p are all greedy."""
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert (draws(200, **settings) == 3).all()
    prompts = ragged()
    greedy = generate(small, prompts, 10, eos=-1)
    for settings in ({"top_k": 1}, {"top_p": 1e-6}):
        choose = partial(draw, s=Settings(temperature=1.0, **settings), generator=None)
        assert generate(small, prompts, 10, eos=-1, choose=choose) == greedy


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

    def spy(probs, n, generator):
        seen.append(probs)
        return probs.argmax(-1, keepdim=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", spy)
        draw(logits, Settings(temperature=temperature, top_k=top_k, top_p=top_p), None)
    ours = seen[0] / seen[0].sum(-1, keepdim=True)  # multinomial normalises
    assert torch.equal(ours > 0, wanted > 0)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


def test_same_generator_seed_same_text(small):
    hot = Settings(temperature=1.0)
    def text(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(small, ragged(), 10, eos=-1, choose=lambda x: draw(x, hot, generator))
    torch.manual_seed(1)
    first = text(0)
    torch.manual_seed(2)  # the global seed has no say
    assert text(0) == first != text(1)
