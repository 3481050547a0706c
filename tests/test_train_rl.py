"""train_rl.py: is the estimator the gradient, is the reward what it claims to be, is a run repeatable.

pytest tests/test_train_rl.py
"""
import itertools
import json
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

import matcher as matching
import model as llama
import train_rl
from data import prepare
from data.instructions import answering_prompt, clean_answer, read_records
from data.tokenizer import Tokenizer
from train_rl import Environment, Settings, leave_one_out, rouge_l

# ---- REINFORCE ---------------------------------------------------------------------------------------------

def test_leave_one_out_against_a_loop():
    rewards = torch.rand(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [[row[k] - sum(row[j] for j in range(5) if j != k) / 4 for k in range(5)]
              for row in rewards.tolist()]
    torch.testing.assert_close(leave_one_out(rewards), torch.tensor(wanted, dtype=torch.float64))


@pytest.fixture(scope="module")
def table():
    """5 prompts, m = 2, one query: the 20 pairs, for each a reward and its grad log pi, (20, D), in fp64."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    query = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    matcher = matching.Matcher(pool.float(), hidden=3, scale=3.0, generator=generator).double()
    with torch.no_grad():  # away from step 0, where the first layers have no gradient
        for tower in (matcher.prompt_tower, matcher.state_tower):
            tower.down.weight.copy_(torch.randn(tower.down.weight.shape, generator=generator))
    pairs = torch.tensor(list(itertools.permutations(range(5), 2)))  # (20, 2)
    rewards = torch.rand(20, generator=generator, dtype=torch.float64)
    _, log_prob, _ = matcher.episodes(query.expand(20, -1), pool, 2, picks=pairs)
    parameters = list(matcher.parameters())
    def flat(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])
    exact = flat((log_prob.exp() * rewards).sum())  # grad of J = sum over pairs of pi(pair) R(pair)
    scores = torch.stack([flat(value) for value in log_prob])
    return matcher, pool, query, pairs, rewards, log_prob.exp().detach(), scores, exact


def test_the_baseline_leaves_the_estimator_unbiased(table):
    """Exactly: the expectation over all 20 x 20 outcomes of two episodes is the expected reward's gradient.

    The mean of all K as baseline, a common slip, depends on the episode itself and shrinks it by (K - 1) / K.
    """
    *_, rewards, p, scores, exact = table
    a, b = torch.cartesian_prod(torch.arange(20), torch.arange(20)).T  # 400 joint outcomes
    both = torch.stack((rewards[a], rewards[b]), 1)  # (400, 2)
    def expectation(advantage):
        estimate = (advantage[:, :1] * scores[a] + advantage[:, 1:] * scores[b]) / 2  # (400, D)
        return ((p[a] * p[b])[:, None] * estimate).sum(0)
    assert exact.norm() > 0.01
    torch.testing.assert_close(expectation(leave_one_out(both)), exact, rtol=1e-9, atol=1e-12)
    own_mean = both - both.mean(1, keepdim=True)
    torch.testing.assert_close(expectation(own_mean), exact / 2, rtol=1e-9, atol=1e-12)


def test_the_mean_of_many_samples_is_the_exact_gradient(table):
    """What the loop does, 20,000 times with K = 4: each coordinate within 5 standard errors of the exact
    gradient, and with less variance than without a baseline."""
    matcher, pool, query, pairs, rewards, p, scores, exact = table
    n, K = 20_000, 4
    with torch.no_grad():
        drawn, _, _ = matcher.episodes(query.expand(n * K, -1), pool, 2,
                                       generator=torch.Generator().manual_seed(1))
    index = (drawn[:, None] == pairs).all(-1).int().argmax(1).view(n, K)  # which of the 20 pairs
    def samples(weights):  # (n, K) -> (n, D)
        return torch.zeros(n, 20, dtype=torch.float64).scatter_add(1, index, weights / K) @ scores
    with_baseline, without = samples(leave_one_out(rewards[index])), samples(rewards[index])
    error = with_baseline.std(0) / n**0.5
    assert error.norm() < 0.05 * exact.norm()  # sharp enough that a factor (K - 1) / K would be seen
    assert ((with_baseline.mean(0) - exact).abs() < 5 * error + 1e-12).all()
    assert with_baseline.var(0).sum() < 0.5 * without.var(0).sum()


def test_a_toy_pool_is_learned_from():
    """Four kinds of queries; the best prompt of each is *not* its nearest. The loop's update must find all
    four: better than kNN and any fixed prompt, on unseen queries, without collapsing to one (PromptPG's end).
    """
    generator = torch.Generator().manual_seed(0)
    C, P = 16, 12
    pool = torch.randn(P, C, generator=generator)
    best_of_kind = torch.tensor([7, 5, 11, 4])  # kinds 0..3 lie around prompts 0..3
    def queries(n):
        kind = torch.randint(4, (n,), generator=generator)
        return pool[kind] + 0.4 * torch.randn(n, C, generator=generator), best_of_kind[kind]
    def reward(picks, best):
        return 0.2 + 0.6 * (picks == best[:, None]).any(1).float()
    matcher = matching.Matcher(pool, hidden=32, scale=8.0, generator=generator)
    optimizer = torch.optim.Adam(matcher.parameters(), lr=1e-2)
    K, steps = 4, 100
    for step in range(steps):
        left = 1 - step / steps
        query, best = (x.repeat_interleave(K, 0) for x in queries(32))
        picks, log_prob, entropy = matcher.episodes(query, pool, 2, generator=generator)
        advantage = leave_one_out(reward(picks, best).view(-1, K)).view(-1)
        loss = -(advantage * log_prob).mean() - 0.02 * left * entropy.mean()
        optimizer.param_groups[0]["lr"] = 1e-2 * left
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    query, best = queries(400)
    with torch.no_grad():
        learned = matcher.episodes(query, pool, 2, greedy=True)[0]
    fixed = max(reward(torch.tensor([pair]).expand(400, -1), best).mean()
                for pair in itertools.combinations(range(P), 2))
    nearest = reward(matching.knn(query, pool, 2), best).mean()
    assert reward(learned, best).mean() > max(0.75, fixed + 0.15, nearest + 0.15)  # 0.8 is the most there is
    picked = [set(learned[best == prompt].flatten().tolist()) for prompt in best_of_kind]
    assert all(prompt in its for prompt, its in zip(best_of_kind.tolist(), picked, strict=True))
    assert len(learned.unique(dim=0)) >= 4  # other queries, other picks


# ---- the reward --------------------------------------------------------------------------------------------

SCORER = rouge_scorer.RougeScorer(["rougeL"])
few_words = st.lists(
    st.sampled_from(["the", "The", "cat", "sat", "3.5", "café", "on-top", "!", "a"]), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.tuples(few_words.map(" ".join), few_words.map(" ".join)), st.tuples(st.text(), st.text()))
)
def test_rouge_l_is_rouge_scores(pair):
    answer, reference = pair
    theirs = SCORER.score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, reference) == pytest.approx(theirs, abs=1e-12)


def test_rouge_l_by_hand():
    assert rouge_l("", "a cat") == rouge_l("a cat", "") == rouge_l("", "") == rouge_l("!?", "a") == 0
    assert rouge_l("A cat!", "a CAT") == 1
    # longest common subsequence "the sat": P = 2/3, R = 2/4
    assert rouge_l("the dog sat", "the cat then sat") == pytest.approx(4 / 7)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tiny.build(tmp_path_factory.mktemp("base"))
    return llama.load(folder), Tokenizer(folder)


SETTINGS = Settings(max_new_tokens=8, rollout_batch=4)
QUERIES, POOL = tiny.records(12)[6:], tiny.records(6)
PICKS = [[0, 1], [1, 0], [2, 3], [], [4], [0, 5]]


def environment(llm, path, s=SETTINGS, pool=None, identity="model-1"):
    return Environment(*llm, pool or POOL, s, identity, path)


def test_scores_are_those_of_the_plain_way(llm, tmp_path):
    """Trap 4 and the prefix cache: batched, padded, the first prompt's keys reused; yet the answer is exactly
    the one for the whole prompt alone (fp32), and so are its scores."""
    model, tokenizer = llm
    env = environment(llm, tmp_path / "rewards.jsonl")
    for query, picks, entry in zip(QUERIES, PICKS, env.scores(QUERIES, PICKS), strict=True):
        ids, _ = answering_prompt(tokenizer, query, [POOL[j] for j in picks], 512)
        [alone] = llama.generate(model, [ids], 8, tokenizer.eos, env.stop)
        text = clean_answer(tokenizer, alone)
        assert entry["answer"] == text and entry["prompt_tokens"] == len(ids)
        assert entry["rouge"] == pytest.approx(rouge_l(text, query["output"]), abs=1e-6)
        assert entry["exact"] == (text == query["output"])
        two = matching.embed(model, [[tokenizer.encode(text)], [tokenizer.encode(query["output"])]])
        outputs = matching.embed(model, [[tokenizer.encode(p["output"])] for p in POOL])
        two = (two - outputs.mean(0)) / outputs.std(0, unbiased=False).clamp(min=1e-3)
        cosine = max(0.0, torch.cosine_similarity(two[0], two[1], dim=0).item()) if text else 0.0
        assert entry["semantic"] == pytest.approx(cosine, abs=1e-5)
        assert env.reward(entry) == pytest.approx(0.5 * entry["rouge"] + 0.5 * entry["semantic"])
    assert len({e["answer"] for e in env.known.values()}) > 3  # answers do depend on what stands in front


def test_semantic_score_of_equal_and_of_empty_answers(llm, tmp_path):
    env = environment(llm, tmp_path / "rewards.jsonl")
    assert env.similarity(["loud", "", "loud"], ["loud", "loud", "tag"])[:2] == [1.0, 0.0]


def test_a_score_does_not_depend_on_what_was_scored_before(llm, tmp_path):
    """To the last bit, or a run that was killed and replays its cache ends in other weights: an embedding
    kept from an earlier batch was padded otherwise."""
    fresh, used = (environment(llm, tmp_path / f"{name}.jsonl") for name in "ab")
    pairs = [q["output"] for q in QUERIES], [q["input"] for q in QUERIES]
    used.similarity([a + " and much more of it, " * 9 for a in pairs[0]] + pairs[0], 2 * pairs[1])
    assert used.similarity(*pairs) == fresh.similarity(*pairs)


def test_prompts_that_do_not_fit_go_farthest_first(llm, tmp_path):
    """As in training and in sample.py: positions beyond the context were never trained."""
    model, tokenizer = llm
    pool = [{**p, "input": "word " * n} for p, n in zip(POOL, (10, 40, 40, 70, 5, 110), strict=True)]
    env = environment(llm, tmp_path / "rewards.jsonl", pool=pool)
    for picks, kept in (([0, 4], [0, 4]), ([1, 3], [3]), ([3, 2, 4], [2, 4]), ([5, 0], [0]), ([5], [])):
        [entry] = env.scores(QUERIES[:1], [picks])
        ids, _ = answering_prompt(tokenizer, QUERIES[0], [pool[j] for j in kept], 512)
        [alone] = llama.generate(model, [ids], 8, tokenizer.eos, env.stop)
        assert (entry["answer"], entry["prompt_tokens"]) == (clean_answer(tokenizer, alone), len(ids)), picks
    assert env.shortened == 4


def test_more_prompts_than_prefixes_are_kept(llm, tmp_path, monkeypatch):
    """A pool of over 1,000 prompts: a prefix may be dropped while its batch is still being scored."""
    env = environment(llm, tmp_path / "a.jsonl", replace(SETTINGS, rollout_batch=6))
    class Full(dict):
        def __len__(self):  # as if 1,000 others had been there before
            return 999 + super().__len__()
    env.prefixes = Full()
    plain = environment(llm, tmp_path / "b.jsonl")
    assert env.scores(QUERIES, PICKS) == plain.scores(QUERIES, PICKS)


def test_a_second_environment_computes_nothing(llm, tmp_path):
    path = tmp_path / "rewards.jsonl"
    first = environment(llm, path)
    twice = first.scores(QUERIES + QUERIES, PICKS + PICKS)
    assert (first.asked, first.computed) == (12, 6) and twice[:6] == twice[6:]
    second = environment(llm, path)
    assert second.scores(QUERIES, PICKS) == twice[:6] and second.computed == 0
    # both scores are stored, so the mix may change
    weights = environment(llm, path, replace(SETTINGS, textual=1.0))
    assert [weights.reward(e) for e in weights.scores(QUERIES, PICKS)] == [e["rouge"] for e in twice[:6]]
    assert weights.computed == 0


def test_a_torn_last_line_is_computed_again(llm, tmp_path):
    """A killed run leaves half a line; what is written after it must not be lost with it."""
    path = tmp_path / "rewards.jsonl"
    wanted = environment(llm, path).scores(QUERIES, PICKS)
    path.write_bytes(path.read_bytes()[:-20])
    torn = environment(llm, path)
    assert torn.scores(QUERIES, PICKS) == wanted and torn.computed == 2  # its whole batch: the same bits
    third = environment(llm, path)
    assert third.scores(QUERIES, PICKS) == wanted and third.computed == 0
    path.write_bytes(path.read_bytes()[:-1])  # the last line whole, its end missing
    fourth = environment(llm, path)
    assert fourth.scores(QUERIES, PICKS) == wanted and fourth.computed == 0
    fourth.scores(QUERIES[:1], [[3]])
    assert environment(llm, path).known == fourth.known and len(fourth.known) == 7
    entry = json.loads(path.read_bytes().splitlines()[0])
    path.write_text(json.dumps(entry | {"rouge": 10**400, "left": 0}) + "\n")  # more than a float can hold
    assert environment(llm, path).known == {}


def test_the_key_holds_all_that_an_answer_depends_on(llm, tmp_path):
    """Whatever changes an answer or a score must change the key, or old rewards are taken for new ones."""
    def other(field, where=0):
        changed = [dict(p) for p in POOL]
        changed[where][field] += " indeed"
        return changed
    def key(query=QUERIES[0], picks=(0, 1), s=SETTINGS, **how):
        return environment(llm, tmp_path / "none.jsonl", s, **how).key(query, picks)
    keys = [key(), key(identity="model-2"), key(s=replace(SETTINGS, max_new_tokens=9)), key(picks=(1, 0)),
            key(picks=(0,)), key(picks=()), key(pool=other("instruction")), key(pool=other("input")),
            key(pool=other("output")), key({**QUERIES[0], "output": "another reference"}),
            key({**QUERIES[0], "input": "another input"}), key({**QUERIES[0], "instruction": "Another."}),
            # the pool's answers set the mean and deviation of the semantic score, picked or not
            key(pool=other("output", where=5))]
    assert len(set(keys)) == len(keys)
    assert key(s=replace(SETTINGS, textual=0.9, lr=1.0, seed=3, rollout_batch=1)) == keys[0]
    assert key({**QUERIES[0], "task": "renamed"}) == keys[0]


# ---- whole runs --------------------------------------------------------------------------------------------

TINY = {"adapter": "none", "m": 2, "hidden": 8, "steps": 3, "queries": 4, "samples": 3, "lr": 0.05,
        "max_new_tokens": 6, "val_queries": 3, "eval_every": 1, "test_queries": 0, "random_seeds": 2,
        "fixed_tries": 3, "device": "cpu", "dtype": "float32"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(out_dir, **changes) -> (environment, trained matcher, picks drawn) of one tiny train_rl.main."""
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    data = tiny.write_records(tmp_path / "mine.jsonl", tiny.records(60))
    base = tiny.build(tmp_path / "base")

    def go(out, **changes):
        seen = {"env": [], "matcher": [], "drawn": []}
        class SpyEnvironment(Environment):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                seen["env"].append(self)
        class SpyMatcher(matching.Matcher):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                seen["matcher"].append(self)
            def episodes(self, *args, **kwargs):
                result = super().episodes(*args, **kwargs)
                if kwargs.get("generator") is not None:
                    seen["drawn"].append(result[0])
                return result
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_rl, "Environment", SpyEnvironment)
            patch.setattr(matching, "Matcher", SpyMatcher)
            flags = {"base": str(base), "data": str(data), "out_dir": str(tmp_path / out)}
            train_rl.main(Settings(**TINY | flags | changes))
        return seen["env"][0], seen["matcher"][0], seen["drawn"]
    return go


ROWS = ["no prompt", "random", "best fixed", "same words (BM25)", "nearest (kNN)", "learned",
        "best of LoRA's"]


def strict(text: str):
    """JSON as others read it: Python alone writes and reads NaN."""
    def refuse(word):
        raise ValueError(word)
    return json.loads(text, parse_constant=refuse)


def test_run_end_to_end_and_again(run, tmp_path):
    """Two folders, one seed: the same bytes. The same command again: nothing computed, the same matcher."""
    env, matcher, drawn = run("a")
    out = tmp_path / "a"
    assert {f.name for f in out.iterdir()} == {"matcher.safetensors", "matcher.json", "rewards.jsonl",
                                               "log.jsonl", "log.png", "table.json", "run.json"}
    lines = [strict(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 <= line["reward"] <= 1 and 0 < line["entropy"] <= 1 for line in lines)
    assert any(p.abs().max() > 0 for p in (matcher.prompt_tower.down.weight, matcher.state_tower.down.weight))
    assert all(p.isfinite().all() for p in matcher.parameters())
    table = strict((out / "table.json").read_text())
    assert list(table["rows"]) == [ROWS[0], *ROWS[-3:-1]]
    for name, row in table["rows"].items():  # the queries' own scores, for statistics of one's own
        assert sum(table["rouge of each query"][name]) / 6 * 100 == pytest.approx(row["rouge_seen"], abs=0.01)
    # what is kept is the best by validation: a step of the log, or step 0, which is kNN
    kept, rewards = strict((out / "matcher.json").read_text()), [line["val_reward"] for line in lines]
    assert kept["val_reward"] >= max(rewards) - 1e-5
    assert kept["step"] == 0 or rewards[kept["step"] - 1] == pytest.approx(kept["val_reward"], abs=1e-5)
    stored, _, _ = matching.load(out, kept["model_id"])
    assert (stored.prompt_tower.down.weight.abs().max() == 0) == (kept["step"] == 0)

    _, twin, twin_drawn = run("b")
    for name in ("matcher.safetensors", "matcher.json", "rewards.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert all(torch.equal(x, y) for x, y in zip(drawn, twin_drawn, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(matcher.parameters(), twin.parameters(), strict=True))

    before = (out / "rewards.jsonl").read_bytes()
    replayed, again, _ = run("a")
    assert replayed.computed == 0 and replayed.asked > 0 and (out / "rewards.jsonl").read_bytes() == before
    assert all(torch.equal(x, y) for x, y in zip(matcher.parameters(), again.parameters(), strict=True))
    _, other, other_drawn = run("c", seed=7)
    assert not all(torch.equal(x, y) for x, y in zip(drawn, other_drawn, strict=True))


def test_eval_only_repeats_the_table_from_the_cache(run, tmp_path, capsys):
    """Also with a pool of one's own, stored with the matcher: it need not be named again (trap 11)."""
    mine = tiny.write_records(tmp_path / "pool.jsonl", tiny.records(75)[60:])
    for out, given_pool in (("plain", {}), ("own", {"pool": str(mine)})):
        run(out, **given_pool)
        rows = json.loads((tmp_path / out / "table.json").read_text())["rows"]
        assert list(rows) == [ROWS[0], *ROWS[-3:-1]]  # after training three ways, from --eval_only on all
        run(out, eval_only=True)
        every = json.loads((tmp_path / out / "table.json").read_text())["rows"]
        assert list(every) == ROWS and every.items() >= rows.items()
        assert every[ROWS[-1]]["rouge_seen"] >= max(every[name]["rouge_seen"] for name in ROWS[:-1])
        weights = (tmp_path / out / "matcher.safetensors").read_bytes()
        capsys.readouterr()
        env, _, drawn = run(out, eval_only=True, m=1)  # m too is the trained matcher's
        assert env.computed == 0 and env.asked > 0 and not drawn
        assert json.loads((tmp_path / out / "table.json").read_text())["rows"] == every
        assert (tmp_path / out / "matcher.safetensors").read_bytes() == weights
        assert all(name in capsys.readouterr().out for name in ROWS[:1])
    other = tiny.write_records(tmp_path / "other.jsonl", tiny.records(90)[75:])
    env, _, _ = run("own", eval_only=True, pool=str(other))  # a --pool given with --eval_only replaces it
    assert env.pool == tiny.records(90)[75:] and env.computed > 0


def test_other_models_stand_in_the_table(run, tmp_path):
    """--eval_only: the base alone and full fine-tuning beside LoRA, one judge for all of them."""
    base, adapter, _ = tiny.trained(tmp_path)
    tuned = tiny.build(tmp_path / "full", seed=3)
    flags = {"base": str(base), "adapter": str(adapter), "full": str(tuned)}
    run("out", **flags)
    run("out", **flags, eval_only=True)
    table = strict((tmp_path / "out" / "table.json").read_text())
    others = ["base, no prompt", *(f"full fine-tuning, {way}" for way in ("no prompt", "nearest", "learned"))]
    assert list(table["rows"]) == [*ROWS[:-1], *others, ROWS[-1]]
    answers = [table["rows"][name] for name in ("no prompt", *others[:2], others[3])]
    assert all(a != b for a, b in itertools.combinations(answers, 2))  # different models and ways
    gaps = table["gaps"]
    assert gaps["nearest (kNN)"]["seen minus nearest (kNN)"] == [0, 0, 0]
    won, tied, lost = map(int, gaps["learned"]["won / tied / lost to kNN"].split(" / "))
    assert won + tied + lost == 6 and gaps["no prompt"].keys() == gaps["learned"].keys()


def test_evaluating_does_not_change_the_draws(run):
    """The policy's generator is its own: with validation at every step or not, it draws the same."""
    often, seldom = run("often", eval_every=1)[2], run("seldom", eval_every=3)[2]
    assert len(often) == 3 and all(torch.equal(a, b) for a, b in zip(often, seldom, strict=True))


def test_a_query_never_gets_itself(run, tmp_path):
    """Trap 11: the pool is made of the very queries; no way to pick may show a query its own answer."""
    run("plain", steps=1)  # writes the splits
    [folder] = (tmp_path / "data").iterdir()
    queries = [read_records(folder / f"{split}.jsonl") for split in ("val", "test", "rl")]
    pool = [q for part in queries for q in part[:4]]
    asked = []
    class Spy(Environment):
        def scores(self, queries, picks):
            for query, picked in zip(queries, picks, strict=True):
                asked.append((query["input"], [self.pool[j]["input"] for j in picked]))
            return super().scores(queries, picks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Environment", Spy)
        run("itself", pool=str(tiny.write_records(tmp_path / "pool.jsonl", pool)))
    assert sum(len(picks) for _, picks in asked) > 100
    assert [question for question, picks in asked if question in picks] == []


def test_two_processes_are_one(run, tmp_path):
    """torchrun: the LLM's answers are shared out, so everything else is what one process would have made."""
    one = {"rollout_batch": 2, "max_new_tokens": 4}
    run("one", **one)
    tiny.two_processes("train_rl", tmp_path, TINY | one | {
        "base": tmp_path / "base", "data": tmp_path / "mine.jsonl", "out_dir": tmp_path / "two"})
    a, b = tmp_path / "one", tmp_path / "two"
    assert {f.name for f in a.iterdir()} == {f.name for f in b.iterdir()}
    for name in ("matcher.safetensors", "matcher.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    rewards = [sorted((folder / "rewards.jsonl").read_text().splitlines()) for folder in (a, b)]
    assert rewards[0] == rewards[1] and len(rewards[0]) > 30
