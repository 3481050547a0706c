"""matcher.py: embeddings, the policy as a probability distribution, its start at nearest, its files.

    pytest tests/test_matcher.py
"""
import itertools
import json
import math
import re

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import matcher as matching
import model as llama
from data.files import read_metadata
from data.instructions import query_text
from data.records import read_pool
from data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.build(tmp_path_factory.mktemp("base"))
    return llama.load(folder), Tokenizer(folder)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(n: int, seed: int, width: int = 6) -> torch.Tensor:
    """Embeddings as an LLM gives them: one large common part, so that raw cosines are all near 1."""
    return 5 + torch.randn(n, width, generator=seeded(seed))


def trained(pool: torch.Tensor, seed: int = 0) -> matching.Matcher:
    """A matcher whose last layers are not zero any more."""
    generator = seeded(seed)
    matcher = matching.Matcher(pool, hidden=8, logit_scale=3.0, generator=generator)
    for mlp in (matcher.prompt_mlp, matcher.state_mlp):
        mlp.down.weight.data.copy_(torch.randn(mlp.down.weight.shape, generator=generator))
    return matcher


PAIRS = torch.tensor(list(itertools.permutations(range(5), 2)))  # all 20 episodes of 2 picks among 5


# ---- the policy ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("m", [1, 2, 3])
def test_untrained_policy_is_nearest_neighbours(m):
    """Design: RL starts from the strongest simple baseline. Against a plain top-m of standardised cosines,
    the mean of both parts', weighed by their shares; doubts do nothing yet."""
    queries, pool = vectors(40, 1, 60), vectors(12, 2, 60)
    mean, std = pool.mean(0), ((pool - pool.mean(0)) ** 2).mean(0).sqrt()
    q, p = (queries - mean) / std, (pool - mean) / std
    parts = (slice(30), 0.4), (slice(30, 60), 0.6)
    wanted = sum(share * F.cosine_similarity(q[:, None, part], p[None, :, part], dim=-1)
                 for part, share in parts).topk(m).indices
    fresh = matching.Matcher(pool, generator=seeded(3), doubts=vectors(12, 9, 2))
    assert torch.equal(fresh.act(queries, m, greedy=True)[0], wanted)
    assert torch.equal(matching.nearest(queries, pool, m), wanted)
    raw = F.cosine_similarity(queries[:, None], pool[None], dim=-1).topk(m).indices
    assert not torch.equal(raw, wanted)  # or standardising would not have been tested


def test_factors_weigh_the_parts_of_a_text():
    """With one part alone the others cannot change a pick."""
    queries, pool, other, picks = vectors(40, 1), vectors(12, 2), vectors(40, 3), []
    for part in range(2):
        matcher = matching.Matcher(pool)
        matcher.log_factors.data = torch.tensor([0.0, -20.0] if part == 0 else [-20.0, 0.0])
        changed = other.clone()
        changed[:, 3 * part:3 * part + 3] = queries[:, 3 * part:3 * part + 3]
        picks.append(matcher.act(queries, 1, greedy=True)[0])
        assert torch.equal(picks[-1], matcher.act(changed, 1, greedy=True)[0])
    assert not torch.equal(*picks)


def test_a_part_that_does_not_vary_in_the_pool_decides_nothing():
    """A pool of one instruction: its part differs by rounding alone, which length 1 would blow up."""
    queries, pool = vectors(40, 1, 60), vectors(12, 2, 60)
    queries[:, :30] = pool[:, :30] = 5 + 1e-7 * torch.randn(30, generator=seeded(4))
    wanted = matching.nearest(queries, pool, 1)
    noisy = pool.clone()
    noisy[:, :30] += 2e-6 * torch.randn(12, 30, generator=seeded(5))
    assert torch.equal(matching.nearest(queries, noisy, 1), wanted) and len(wanted.unique()) > 3


@torch.no_grad()
def test_usefulness_is_added_to_a_prompts_score():
    """By hand: -trust * doubts_j for every query; another pool has doubts of its own."""
    queries, pool, doubts = vectors(5, 1), vectors(4, 2), vectors(4, 3, 2)
    plain, matcher = trained(pool), trained(pool)
    matcher.doubts, matcher.trust.data = doubts, torch.tensor([0.3, -0.2])
    added = torch.tensor([-0.3 * doubts[j, 0] + 0.2 * doubts[j, 1] for j in range(4)])
    torch.testing.assert_close(matcher.usefulness(), added)
    each = torch.arange(4)[:, None]
    for query in queries.split(1):
        before, after = (x.act(query.expand(4, -1), 1, picks=each)[1][:, 0] for x in (plain, matcher))
        torch.testing.assert_close(after, (before + added).log_softmax(0))
    matcher.use_pool(vectors(3, 4), doubts[:3])
    torch.testing.assert_close(matcher.usefulness(), added[:3])
    assert matcher.act(queries, 3, greedy=True)[0].max() == 2 and torch.equal(matcher.mean, plain.mean)


def test_candidates_are_the_nearest():
    """Whatever the MLPs say, picks come from the nearest 4."""
    queries, pool = vectors(300, 1), vectors(12, 2)
    matcher, near = trained(pool), matching.nearest(queries, pool, 5)
    everywhere = matcher.act(queries, 2, greedy=True)[0]
    matcher.candidates = 4
    picks, log_probs, entropy = matcher.act(queries, 2, generator=seeded(0))
    assert all(set(picked) <= set(row[:4]) for row, picked in zip(near.tolist(), picks.tolist(), strict=True))
    assert not torch.equal(everywhere, matcher.act(queries, 2, greedy=True)[0])
    assert log_probs.isfinite().all() and entropy.isfinite().all() and (entropy <= 1 + 1e-6).all()
    assert set(picks.flatten().tolist()) == set(range(12))  # and all are somebody's
    assert torch.equal(matcher.act(queries, 5, greedy=True)[0].sort().values, near.sort().values)


def test_probabilities_of_all_ordered_episodes_sum_to_one():
    """Sequential, without replacement: 5 prompts, 2 picks, 20 pairs (PromptPG's slip sums to less)."""
    pool, query = vectors(5, 4).double(), vectors(1, 5).double()
    p = trained(pool).double().act(query.expand(20, -1), 2, picks=PAIRS)[1].sum(1).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert p.max() < 0.9  # no near-certain pair, which would make the sum say little


def test_draws_follow_the_probabilities():
    """20,000 draws against the scored probabilities of the 20 pairs, each within five standard errors."""
    pool, query, n = vectors(5, 4), vectors(1, 5), 20_000
    with torch.no_grad():
        p = trained(pool).act(query.expand(20, -1), 2, picks=PAIRS)[1].sum(1).exp()
        drawn = trained(pool).act(query.expand(n, -1), 2, generator=seeded(0))[0]
    share = (drawn[:, None] == PAIRS).all(-1).float().mean(0)
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-6).all()


@pytest.mark.parametrize("greedy", [False, True])
def test_acting_and_scoring_give_the_same_log_probs(greedy):
    """Those of each step: (B, m), and below 0 where there is a choice."""
    queries, pool = vectors(30, 6), vectors(9, 7)
    matcher = trained(pool)
    picks, acted, entropy = matcher.act(queries, 3, greedy=greedy, generator=seeded(1))
    again, scored, entropy_again = matcher.act(queries, 3, picks=picks)
    assert torch.equal(again, picks) and picks.shape == acted.shape == (30, 3) and (acted < 0).all()
    assert torch.equal(scored, acted) and torch.equal(entropy, entropy_again) and entropy.shape == (30,)


def test_no_prompt_twice():
    """Five picks of five prompts: each row holds all of them, and not always in one order."""
    pool, queries = vectors(5, 8), vectors(1, 9).expand(200, -1)
    picks, log_probs, _ = trained(pool).act(queries, 5, generator=seeded(2))
    assert all(sorted(row) == list(range(5)) for row in picks.tolist())
    assert log_probs.isfinite().all() and log_probs[:, 4].abs().max() < 1e-6  # the last is no choice
    assert len(picks[:, 0].unique()) > 2


def test_entropy_is_one_for_uniform_and_finite_when_masked():
    """-sum p log p with p = 0 for what was picked: 0 * -inf is NaN, in the value or in the gradient."""
    pool, queries = vectors(6, 10), vectors(4, 11)
    flat, matcher = trained(pool), trained(pool)
    flat.logit_scale = 0.0  # all logits equal
    assert flat.act(queries, 3, greedy=True)[2].tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    entropy = matcher.act(queries, 3, generator=seeded(0))[2]
    assert ((0 < entropy) & (entropy < 1)).all()
    entropy.mean().backward()
    assert all(p.grad.isfinite().all() for p in matcher.parameters())


@torch.no_grad()
def test_entropy_of_one_step_is_shannons_over_the_log_of_the_choices():
    pool, query = vectors(6, 10), vectors(1, 11)
    p = trained(pool).act(query.expand(6, -1), 1, picks=torch.arange(6)[:, None])[1].sum(1).exp()
    entropy = trained(pool).act(query, 1, greedy=True)[2].item()
    assert entropy == pytest.approx(torch.distributions.Categorical(p).entropy().item() / math.log(6))


def test_embeddings_of_another_width_are_refused():
    with pytest.raises(ValueError, match="embeddings of width 6, but the model's have 8; train a matcher"):
        matching.Matcher(vectors(4, 1), hidden=1).act(vectors(3, 0, 8), 1)


@torch.no_grad()
def test_same_seed_same_mlps_and_the_second_pick_sees_the_first():
    pool, query = vectors(7, 1), vectors(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(trained(pool, 5).state_dict().values(),
                                                 trained(pool, 5).state_dict().values(), strict=True))
    seconds = torch.tensor([[0, 6], [1, 6]])
    log_probs = trained(pool).act(query.expand(2, -1), 2, picks=seconds)[1]
    one_step = trained(pool).act(query.expand(7, -1), 1, picks=torch.arange(7)[:, None])[1][:, 0]
    torch.testing.assert_close(log_probs[:, 0], one_step[:2])
    # were the state blind to the first pick, p(6 | j first) would be p(6) / (1 - p(j))
    blind = one_step[6].exp() / (1 - one_step[:2].exp())
    assert (log_probs[:, 1].exp() - blind).abs().max() > 1e-3


# ---- embeddings and the pool -----------------------------------------------------------------------------

def test_padded_batch_embeds_like_one_by_one(model):
    """Trap 4: the mean runs over real tokens only; lengths from 0 to 40 in one batch."""
    llm, _ = model
    generator = seeded(0)
    texts = [torch.randint(0, 260, (n,), generator=generator).tolist() for n in (40, 1, 17, 0, 3, 17)]
    together, smaller = (matching.embed(llm, [[text] for text in texts], None, size) for size in (16, 2))
    assert together.shape == (6, 48) and together[3].abs().sum() == 0
    alone = [llm(torch.tensor([text]))[0].mean(0) if text else torch.zeros(48) for text in texts]
    for vectors in (torch.stack(alone), smaller):
        torch.testing.assert_close(together, vectors, rtol=1e-5, atol=1e-6)
    assert matching.embed(llm, [[[]], [[]]]).abs().sum() == 0  # texts that a tokenizer knows nothing of


def test_parts_are_read_as_one_text_and_averaged_apart(model):
    """The input's half has read the instruction; an empty part repeats the one before; a long text is cut."""
    llm, _ = model
    a, b = list(range(5, 12)), list(range(30, 34))
    both, alone, empty = matching.embed(llm, [(a, b), (a, a), (a, [])])
    hidden = llm(torch.tensor([a + b]))[0]
    wanted = torch.cat((hidden[:7].mean(0), hidden[7:].mean(0)))
    torch.testing.assert_close(both, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone[:48], both[:48], rtol=1e-5, atol=1e-6)
    assert torch.equal(empty[:48], empty[48:])
    n = llm.config.max_position_embeddings
    cut = matching.embed(llm, [([7] * (n - 2), b), ([7] * (n + 9), b)])
    assert cut.isfinite().all() and torch.equal(cut[1, :48], cut[1, 48:])
    assert not torch.equal(cut[0, :48], cut[0, 48:])


def test_the_answer_plays_no_part_in_an_embedding(model):
    """A prompt's embedding must not see its answer: a query has none, so the two would not be alike."""
    llm, tokenizer = model
    a, b, c = ({**tiny.records(1)[0]} for _ in range(3))
    b["output"], c["input"] = "something else", "other words"
    one, two, three = matching.embed_records(llm, tokenizer, [a, b, c])
    torch.testing.assert_close(one, two)
    assert (one - three)[:48].abs().max() > 0.01 and (one - three)[48:].abs().max() > 0.01


@torch.no_grad()
def test_an_embedding_is_of_the_whole_question_after_a_third_of_the_layers(model):
    """The means over input and header; a record without an input has the instruction's in place of it."""
    llm, tokenizer = model
    record = tiny.records(1)[0] | {"input": "a plum"}
    texts = f"### Instruction:\n{record['instruction']}\n\n", "### Input:\na plum\n\n", "### Response:\n"
    assert "".join(texts) == query_text(record)
    parts = [tokenizer.encode(text) for text in texts]
    hidden, third = [], math.ceil(len(llm.layers) / 3)
    handle = llm.layers[third - 1].register_forward_hook(lambda *args: hidden.append(args[2]))
    llm(torch.tensor([tokenizer.bos + sum(parts, [])]))
    handle.remove()
    [row], ends = llm.norm(hidden[0]), [0, *itertools.accumulate(map(len, parts))]
    ends = [0] + [end + len(tokenizer.bos) for end in ends[1:]]
    instruction, *wanted = (row[a:b].mean(0) for a, b in itertools.pairwise(ends))
    [found, alone] = matching.embed_records(llm, tokenizer, [record, record | {"input": " "}])
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone[:48], instruction, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_doubts_are_the_surprise_at_the_answer_and_a_copied_input(model):
    llm, tokenizer = model
    records = [r | {"input": "a plum"} for r in tiny.records(20)]
    records[3]["output"] = "a plum\n"
    found = matching.doubts(llm, tokenizer, records)
    assert found[:, 1].tolist() == [0.0] * 3 + [1.0] + [0.0] * 16
    for record, doubt in zip(records, found, strict=True):
        question = tokenizer.bos + tokenizer.encode(query_text(record))
        answer = [*tokenizer.encode(record["output"]), tokenizer.eos]
        log_probs = llm.logits(llm(torch.tensor([question + answer])))[0].log_softmax(-1)
        wanted = -sum(log_probs[len(question) + n - 1, token] for n, token in enumerate(answer)) / len(answer)
        assert doubt[0].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_the_pool_has_each_prompt_once_and_no_query(tmp_path, capsys):
    """A prompt is a query's twin whatever its answer and task; another answer alone makes no copy."""
    records = tiny.records(4)
    kept = [*records, {**records[1], "output": "x"}]
    file = tiny.write_records(tmp_path / "pool.jsonl", [*kept, records[0], {**records[2], "task": ""}])
    assert read_pool(file) == kept
    assert f"({file}: 2 of 7 prompts are left out: copies of others)" in capsys.readouterr().out
    queries = [{**records[2], "output": "another answer", "task": "other"}, {**records[3], "input": "new"}]
    assert read_pool(tiny.write_records(file, records), queries) == [*records[:2], records[3]]
    assert f"({file}: 1 of 4 prompts are left out: " in capsys.readouterr().out
    assert read_pool(file) == records and capsys.readouterr().out == ""


# ---- files -----------------------------------------------------------------------------------------------

def test_save_and_load_bring_back_policy_pool_and_m(tmp_path):
    """Trap 11: the pool is stored with the policy."""
    pool, queries, prompts = vectors(8, 1), vectors(20, 2), tiny.records(8)
    matcher = trained(pool)
    matching.save(matcher, tmp_path, prompts, 3, "model-1", step=7)
    loaded, loaded_pool, m = matching.load(tmp_path, "model-1")
    assert (loaded_pool, m, loaded.logit_scale) == (prompts, 3, 3.0)
    want, got = (x.act(queries, 3, greedy=True) for x in (matcher, loaded))
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
    loaded.use_pool(vectors(30, 3), vectors(30, 4, 2))  # a pool it never saw, of another size
    picks = loaded.act(queries, 3, greedy=True)[0]
    assert picks.shape == (20, 3) and picks.max() >= 8
    assert sorted(f.name for f in tmp_path.iterdir()) == ["matcher.json", "matcher.safetensors"]
    assert json.loads((tmp_path / "matcher.json").read_text()) == {
        "m": 3, "hidden": 8, "width": 6, "logit_scale": 3.0, "candidates": 1 << 20, "shares": [0.4, 0.6],
        "model_id": "model-1", "pool": prompts, "step": 7}


def test_a_matcher_that_is_not_this_ones_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="matcher.json is missing; run python train_rl.py first"):
        matching.load(tmp_path, "model-1")
    matching.save(trained(vectors(8, 1)), tmp_path, tiny.records(8), 3, "model-1")
    with pytest.raises(ValueError, match="for another base or adapter .*; use the same ones, train it"):
        matching.load(tmp_path, "model-2")
    monkeypatch.setattr(matching, "SHARES", (0.5, 0.5))  # its "nearest" meant something else
    with pytest.raises(ValueError, match=r"json: trained with SHARES = \[0.4, 0.6\], but they are "):
        matching.load(tmp_path, "model-1")


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("log_factors"), "1 tensors are missing, e.g. 'log_factors'"),
    (lambda t: t.update(spare=torch.zeros(1)), "unexpected tensor 'spare' (not part of it)"),
    (lambda t: t.update(pool=torch.zeros(7, 6)),
     "tensor 'pool' is torch.float32 [7, 6], but floats [8, 6] are needed"),
    (lambda t: t.update(pool=torch.zeros(8, 6, dtype=torch.int32)),
     "tensor 'pool' is torch.int32 [8, 6], but floats [8, 6] are needed"),
    (lambda t: t["prompt_mlp.up.bias"].fill_(math.nan),
     "tensor 'prompt_mlp.up.bias' is not finite everywhere"),
])
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, words):
    matching.save(trained(vectors(8, 1)), tmp_path, tiny.records(8), 3, "model-1")
    file = tmp_path / "matcher.safetensors"
    tensors, metadata = load_file(file), read_metadata(file)
    change(tensors)
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=re.escape(f"{file}: {words}; train the matcher again.")):
        matching.load(tmp_path, "model-1")
