"""matcher.py: embeddings, the policy as a probability distribution, its start at kNN, its files.

    pytest tests/test_matcher.py
"""
import itertools
import math
import random

import pytest
import tiny
import torch
import torch.nn.functional as F

import matcher as matching
import model as llama
from data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.build(tmp_path_factory.mktemp("base"))
    return llama.load(folder), Tokenizer(folder)


def vectors(n: int, seed: int, width: int = 6) -> torch.Tensor:
    """Embeddings as an LLM gives them: one large common part, so that raw cosines are all near 1."""
    return 5 + torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def trained(pool: torch.Tensor, seed: int = 0) -> matching.Matcher:
    """A matcher whose last layers are not zero any more."""
    generator = torch.Generator().manual_seed(seed)
    matcher = matching.Matcher(pool, hidden=8, scale=3.0, generator=generator)
    with torch.no_grad():
        for tower in (matcher.prompt_tower, matcher.state_tower):
            tower.down.weight.copy_(torch.randn(tower.down.weight.shape, generator=generator))
    return matcher


# ---- the policy --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("m", [1, 2, 3])
def test_untrained_policy_is_knn(m):
    """Design: RL starts from the strongest simple baseline. Against a plain top-m of standardised cosines, a
    mean of the instruction's and the input's."""
    queries, pool = vectors(40, 1, 60), vectors(12, 2, 60)
    mean, deviation = pool.mean(0), ((pool - pool.mean(0)) ** 2).mean(0).sqrt()
    q, p = (queries - mean) / deviation, (pool - mean) / deviation
    wanted = sum(share * F.cosine_similarity(q[:, None, half], p[None, :, half], dim=-1)
                 for half, share in ((slice(30), 0.95), (slice(30, 60), 0.05))).topk(m).indices
    fresh = matching.Matcher(pool, generator=torch.Generator().manual_seed(3))
    assert torch.equal(fresh.episodes(queries, pool, m, greedy=True)[0], wanted)
    assert torch.equal(matching.knn(queries, pool, m), wanted)
    raw = F.cosine_similarity(queries[:, None], pool[None], dim=-1).topk(m).indices
    assert not torch.equal(raw, wanted)  # or standardising would not have been tested


def test_factors_weigh_instruction_against_input():
    """With the instruction's half alone the input cannot change a pick, and the other way round."""
    queries, pool = vectors(40, 1), vectors(12, 2)
    other, picks = vectors(40, 3), []
    for half in (slice(3), slice(3, 6)):
        matcher = matching.Matcher(pool)
        with torch.no_grad():
            matcher.log_factors[:] = torch.tensor([0.0, -20.0] if half.start is None else [-20.0, 0.0])
        changed = other.clone()
        changed[:, half] = queries[:, half]
        picks.append(matcher.episodes(queries, pool, 1, greedy=True)[0])
        assert torch.equal(picks[-1], matcher.episodes(changed, pool, 1, greedy=True)[0])
    assert not torch.equal(*picks)


def test_a_half_that_does_not_vary_in_the_pool_decides_nothing():
    """A pool of one instruction: its half differs by rounding alone, which length 1 would blow up."""
    queries, pool = vectors(40, 1, 60), vectors(12, 2, 60)
    queries[:, :30] = pool[:, :30] = 5 + 1e-7 * torch.randn(30, generator=torch.Generator().manual_seed(4))
    wanted = matching.knn(queries, pool, 1)
    noisy = pool.clone()
    noisy[:, :30] += 2e-6 * torch.randn(12, 30, generator=torch.Generator().manual_seed(5))
    assert torch.equal(matching.knn(queries, noisy, 1), wanted) and len(wanted.unique()) > 3


def test_candidates_are_the_nearest_that_are_free():
    """Whatever the towers say, picks come from the nearest 4; a blocked prompt's place goes to the fifth."""
    queries, pool = vectors(300, 1), vectors(12, 2)
    matcher = trained(pool)
    near = matching.knn(queries, pool, 5)
    blocked = torch.zeros(300, 12, dtype=torch.bool)
    blocked[150:].scatter_(1, near[150:, :1], True)
    everywhere = matcher.episodes(queries, pool, 2, greedy=True, blocked=blocked)[0]
    matcher.candidates = 4
    picks, log_prob, entropy = matcher.episodes(queries, pool, 2, blocked=blocked,
                                                generator=torch.Generator().manual_seed(0))
    for row, picked in enumerate(picks.tolist()):
        assert set(picked) <= set(near[row, row >= 150:][:4].tolist())
    assert not torch.equal(everywhere, matcher.episodes(queries, pool, 2, greedy=True, blocked=blocked)[0])
    assert log_prob.isfinite().all() and entropy.isfinite().all() and (entropy <= 1 + 1e-6).all()
    assert set(picks[:150].flatten().tolist()) == set(range(12))  # and all are somebody's


def test_probabilities_of_all_ordered_episodes_sum_to_one():
    """Sequential, without replacement: 5 prompts, 2 picks, 20 pairs (PromptPG's slip sums to less)."""
    pool, query = vectors(5, 4).double(), vectors(1, 5).double()
    pairs = torch.tensor(list(itertools.permutations(range(5), 2)))
    _, log_prob, _ = trained(pool).double().episodes(query.expand(20, -1), pool, 2, picks=pairs)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_prob.exp().max() < 0.9  # no near-certain pair, which would make the sum say little


def test_draws_follow_the_probabilities():
    """20,000 draws against the scored probabilities of the 20 pairs, each within five standard errors."""
    pool, query = vectors(5, 4), vectors(1, 5)
    matcher, n = trained(pool), 20_000
    pairs = torch.tensor(list(itertools.permutations(range(5), 2)))
    with torch.no_grad():
        p = matcher.episodes(query.expand(20, -1), pool, 2, picks=pairs)[1].exp()
        drawn = matcher.episodes(query.expand(n, -1), pool, 2, generator=torch.Generator().manual_seed(0))[0]
    share = (drawn[:, None] == pairs).all(-1).float().mean(0)
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-6).all()


def test_acting_and_scoring_give_the_same_log_prob():
    queries, pool = vectors(30, 6), vectors(9, 7)
    matcher = trained(pool)
    for greedy in (False, True):
        picks, acted, entropy = matcher.episodes(queries, pool, 3, greedy=greedy,
                                                 generator=torch.Generator().manual_seed(1))
        again, scored, entropy_again = matcher.episodes(queries, pool, 3, picks=picks)
        assert torch.equal(again, picks)
        assert torch.equal(scored, acted) and torch.equal(entropy, entropy_again)


def test_no_prompt_twice_and_blocked_ones_never():
    """Trap 11 needs `blocked`; each row blocks another prompt, and every free one is picked in the end."""
    pool, queries = vectors(5, 8), vectors(1, 9).expand(200, -1)
    rows = torch.arange(200)
    blocked = torch.zeros(200, 5, dtype=torch.bool)
    blocked[rows, rows % 5] = True
    matcher = trained(pool)
    picks, log_prob, _ = matcher.episodes(queries, pool, 4, blocked=blocked,
                                          generator=torch.Generator().manual_seed(2))
    for row in range(200):
        assert sorted(picks[row].tolist()) == [j for j in range(5) if j != row % 5]
    assert log_prob.isfinite().all()
    greedy = matcher.episodes(queries, pool, 1, greedy=True, blocked=blocked)[0].squeeze(1)
    favourite = matcher.episodes(queries[:1], pool, 1, greedy=True)[0].item()
    assert (greedy[rows % 5 != favourite] == favourite).all()
    assert (greedy[rows % 5 == favourite] != favourite).all()


def test_entropy_is_one_for_uniform_and_finite_when_masked():
    """-sum p log p with p = 0 for what was picked: 0 * -inf is NaN, in the value or in the gradient."""
    pool, queries = vectors(6, 10), vectors(4, 11)
    matcher = trained(pool)
    matcher.scale = 0.0  # all logits equal
    assert matcher.episodes(queries, pool, 3, greedy=True)[2].tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    matcher.scale = 3.0
    entropy = matcher.episodes(queries, pool, 3, generator=torch.Generator().manual_seed(0))[2]
    assert ((0 < entropy) & (entropy < 1)).all()
    entropy.mean().backward()
    assert all(p.grad.isfinite().all() for p in matcher.parameters())


def test_entropy_of_one_step_is_shannons_over_the_log_of_the_choices():
    pool, query = vectors(6, 10), vectors(1, 11)
    matcher = trained(pool)
    with torch.no_grad():
        p = matcher.episodes(query.expand(6, -1), pool, 1, picks=torch.arange(6)[:, None])[1].exp()
        entropy = matcher.episodes(query, pool, 1, greedy=True)[2].item()
    assert entropy == pytest.approx(torch.distributions.Categorical(p).entropy().item() / math.log(6))


def test_too_small_pool_is_a_value_error():
    queries, pool = vectors(3, 0), vectors(4, 1)
    with pytest.raises(ValueError, match="--m"):
        matching.Matcher(pool, hidden=1).episodes(queries, pool, 5)
    blocked = torch.zeros(3, 4, dtype=torch.bool)
    blocked[1, 2] = True  # one query of the batch has three prompts left
    with pytest.raises(ValueError, match="--m"):
        matching.Matcher(pool, hidden=1).episodes(queries, pool, 4, blocked=blocked)


def test_same_seed_same_towers_and_the_second_pick_sees_the_first():
    pool, query = vectors(7, 1), vectors(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(trained(pool, 5).state_dict().values(),
                                                 trained(pool, 5).state_dict().values(), strict=True))
    seconds = torch.tensor([[0, 6], [1, 6]])
    _, log_prob, _ = trained(pool).episodes(query.expand(2, -1), pool, 2, picks=seconds)
    _, first, _ = trained(pool).episodes(query.expand(2, -1), pool, 1, picks=seconds[:, :1])
    step, rest = (log_prob - first).exp(), trained(pool).episodes(
        query.expand(7, -1), pool, 1, picks=torch.arange(7)[:, None])[1].exp()
    # were the state blind to the first pick, p(6 | j first) would be p(6) / (1 - p(j))
    blind = rest[6] / (1 - rest[:2])
    assert (step - blind).abs().max() > 1e-3


# ---- embeddings and the pool -------------------------------------------------------------------------------

def test_padded_batch_embeds_like_one_by_one(model):
    """Trap 4: the mean runs over real tokens only; lengths from 0 to 40 in one batch."""
    llm, _ = model
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 260, (n,), generator=generator).tolist() for n in (40, 1, 17, 0, 3, 17)]
    together = matching.embed(llm, [[text] for text in texts])
    assert together.shape == (6, 48) and together[3].abs().sum() == 0
    for text, vector in zip(texts, together, strict=True):
        if text:
            alone = llm(torch.tensor([text]))[0].mean(0)
            torch.testing.assert_close(vector, alone, rtol=1e-5, atol=1e-6)
    smaller = matching.embed(llm, [[text] for text in texts], batch_size=2)
    torch.testing.assert_close(smaller, together, rtol=1e-5, atol=1e-6)
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
    torch.testing.assert_close(one[:48], three[:48])  # the instruction comes first and has not seen the input
    assert (one - three)[48:].abs().max() > 0.01


def test_same_question_marks_twins_whatever_their_answer():
    pool = tiny.records(4)
    queries = [{**pool[2], "output": "another answer", "task": "other"}, {**pool[1], "input": "new"}]
    assert matching.same_question(queries, pool).tolist() == [[False, False, True, False], [False] * 4]


def test_random_picks_are_different_and_uniform():
    picks = matching.random_picks(30_000, 5, 2, torch.Generator().manual_seed(0))
    assert (picks[:, 0] != picks[:, 1]).all()
    counts = torch.bincount(picks[:, 0] * 5 + picks[:, 1], minlength=25).view(5, 5)
    share = counts[~torch.eye(5, dtype=torch.bool)]  # of the 20 pairs
    assert (share / 30_000 - 1 / 20).abs().max() < 5 * (0.05 * 0.95 / 30_000) ** 0.5


# ---- files -------------------------------------------------------------------------------------------------

def test_save_and_load_bring_back_policy_pool_and_m(tmp_path):
    """Trap 11: the pool is stored with the policy."""
    pool, queries = vectors(8, 1), vectors(20, 2)
    matcher, prompts = trained(pool), tiny.records(8)
    matching.save(matcher, tmp_path, prompts, 3, "model-1", step=7)
    loaded, loaded_pool, m = matching.load(tmp_path, "model-1")
    assert (loaded_pool, m, loaded.scale) == (prompts, 3, 3.0)
    want, got = (x.episodes(queries, pool, 3, greedy=True) for x in (matcher, loaded))
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
    unseen = vectors(30, 3)  # prompts are embedded, not indexed: a pool of another size works
    picks = loaded.episodes(queries, unseen, 3, greedy=True)[0]
    assert picks.shape == (20, 3) and picks.max() >= 8
    assert sorted(f.name for f in tmp_path.iterdir()) == ["matcher.json", "matcher.safetensors"]


def test_bm25_against_the_formula():
    """Okapi's sum, word by word, on random records; a blocked prompt is never picked."""
    draw, vocabulary = random.Random(0), "the the the write date code rare long in tags".split()
    def record():
        words = draw.choices(vocabulary, k=draw.randint(1, 9))
        question = {"instruction": " ".join(words).title(), "input": draw.choice(vocabulary)}
        return {"task": "", **question, "output": "x"}
    queries, pool = [record() for _ in range(20)], [record() for _ in range(12)]
    texts = [f"{p['instruction']} {p['input']}".lower().split() for p in pool]
    blocked = torch.rand(20, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    picks = matching.bm25(queries, pool, 3, blocked)
    for query, picked, no in zip(queries, picks.tolist(), blocked, strict=True):
        scores = []
        for text in texts:
            score = 0.0
            for word in set(f"{query['instruction']} {query['input']}".lower().split()):
                n, f = sum(word in t for t in texts), text.count(word)
                length = len(text) / (sum(map(len, texts)) / len(texts))
                idf = math.log(1 + (12 - n + 0.5) / (n + 0.5))
                score += idf * f * 2.5 / (f + 1.5 * (0.25 + 0.75 * length))
            scores.append(score)
        best = sorted((-score, j) for j, score in enumerate(scores) if not no[j])[:3]
        assert [scores[j] for j in picked] == pytest.approx([-score for score, _ in best], abs=1e-6)
        assert not no[picked].any()
