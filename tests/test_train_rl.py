"""train_rl.py: is the estimator the gradient, is the reward what it claims to be, is a run repeatable.

pytest tests/test_train_rl.py
"""
import copy
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer

import matcher as matching
import model as llama
import train_rl
from data import download
from data.instructions import at_next_block, clean_answer, join_ids, query_text
from data.records import read_records
from data.runs import read_rewards
from data.scores import rouge_l, words
from data.tokenizer import Tokenizer
from train_rl import Environment, Settings, leave_one_out


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- REINFORCE -------------------------------------------------------------------------------------------

def test_leave_one_out_against_a_loop():
    rewards = torch.rand(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [[row[k] - sum(row[j] for j in range(5) if j != k) / 4 for k in range(5)]
              for row in rewards.tolist()]
    torch.testing.assert_close(leave_one_out(rewards), torch.tensor(wanted, dtype=torch.float64))


@pytest.fixture(scope="module")
def table():
    """5 prompts, m = 2, one query: the 20 pairs, for each a reward and its grad log pi, (20, D), in fp64."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    query = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    matcher = matching.Matcher(pool.float(), hidden=3, logit_scale=3.0, generator=generator).double()
    for mlp in (matcher.prompt_mlp, matcher.state_mlp):  # at step 0 the first layers have no gradient
        mlp.down.weight.data.copy_(torch.randn(mlp.down.weight.shape, generator=generator))
    pairs = torch.tensor(list(itertools.permutations(range(5), 2)))  # (20, 2)
    rewards = torch.rand(20, generator=generator, dtype=torch.float64)
    log_prob = matcher.act(query.expand(20, -1), 2, picks=pairs)[1].sum(1)
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
        drawn = matcher.act(query.expand(n * K, -1), 2, generator=torch.Generator().manual_seed(1))[0]
    index = (drawn[:, None] == pairs).all(-1).int().argmax(1).view(n, K)  # which of the 20 pairs
    def samples(weights):  # (n, K) -> (n, D)
        return torch.zeros(n, 20, dtype=torch.float64).scatter_add(1, index, weights / K) @ scores
    with_baseline, without = samples(leave_one_out(rewards[index])), samples(rewards[index])
    error = with_baseline.std(0) / n**0.5
    assert error.norm() < 0.05 * exact.norm()  # sharp enough that a factor (K - 1) / K would be seen
    assert ((with_baseline.mean(0) - exact).abs() < 5 * error + 1e-12).all()
    assert with_baseline.var(0).sum() < 0.5 * without.var(0).sum()


def test_the_audit_by_hand():
    """Prompt 1 was drawn twice and did harm, 2 surprises the LLM, 0 did good once, 3 was never tried."""
    matcher = matching.Matcher(torch.randn(4, 6), doubts=torch.tensor([[1.0, 0], [1, 0], [4, 0], [1, 0]]))
    matcher.trust.data[0] = 0.5
    pool = [{"task": "", "instruction": str(j), "input": "", "output": "x"} for j in range(4)]
    draws = [(torch.tensor([[0], [1]]), torch.tensor([0.2, -0.2])),
             (torch.tensor([[1]]), torch.tensor([-0.3]))]
    found = train_rl.audit(matcher, pool, draws)
    # usefulness -0.5, -0.5, -2, -0.5; gain over its standard error, 0.2646 / sqrt(tried): 0.76, -1.34, 0, 0
    assert [entry["instruction"] for entry in found] == ["2", "1", "3", "0"]
    by_name = {entry["instruction"]: entry for entry in found}
    assert by_name["1"] == pool[1] | {
        "score": -1.836, "usefulness": -0.5, "tried": 2, "gain": -25.0, "surprise": 1.0}
    assert by_name["3"]["tried"] == 0 and by_name["3"]["gain"] == 0 and by_name["0"]["gain"] == 20.0
    equal = train_rl.audit(matcher, pool, [(torch.tensor([[0], [1]]), torch.zeros(2))])  # no NaN
    assert [entry["score"] for entry in equal] == [-2, -0.5, -0.5, -0.5]


def test_a_toy_pool_is_learned_from(monkeypatch):
    """Four kinds of queries; the best prompt of each is *not* its nearest. The loop's update must find all
    four: better than nearest and any fixed prompt, on unseen queries, without collapsing to one (PromptPG's
    end). At this learning rate factors and trust must not go many times as fast."""
    monkeypatch.setattr(train_rl, "FACTORS_LR", 1)
    generator = torch.Generator().manual_seed(0)
    C, P = 18, 12
    pool = torch.randn(P, C, generator=generator)
    best_of_kind = torch.tensor([7, 5, 11, 4])  # kinds 0..3 lie around prompts 0..3
    def queries(n):
        kind = torch.randint(4, (n,), generator=generator)
        return pool[kind] + 0.4 * torch.randn(n, C, generator=generator), best_of_kind[kind]
    def reward(picks, best):
        return 0.2 + 0.6 * (picks == best[:, None]).any(1).float()
    asked = {"rl": queries(3200), "val": queries(40), "test": queries(400)}
    vectors, best = ({split: both[k] for split, both in asked.items()} for k in (0, 1))
    matcher = matching.Matcher(pool, hidden=32, logit_scale=8.0, generator=generator)
    list(train_rl.reinforce(matcher, vectors,
                            lambda split, rows, picks: reward(picks, best[split][rows]),
                            Settings(m=2, steps=100, queries=32, samples=4, lr=1e-2)))
    query, best = asked["test"]
    with torch.no_grad():
        learned = matcher.act(query, 2, greedy=True)[0]
    fixed = max(reward(torch.tensor([pair]).expand(400, -1), best).mean()
                for pair in itertools.combinations(range(P), 2))
    nearest = reward(matching.nearest(query, pool, 2), best).mean()
    assert reward(learned, best).mean() > max(0.75, fixed + 0.15, nearest + 0.15)  # 0.8 is the most there is
    picked = [set(learned[best == prompt].flatten().tolist()) for prompt in best_of_kind]
    assert all(prompt in its for prompt, its in zip(best_of_kind.tolist(), picked, strict=True))
    assert len(learned.unique(dim=0)) >= 4  # other queries, other picks


def test_the_loop_asks_in_turn_validates_greedily_and_takes_any_advantage(monkeypatch):
    """Step 0 validates the start. Each query comes K times. An advantage of zero changes no weight. The seed
    decides what is drawn."""
    monkeypatch.setattr(train_rl, "EVAL_EVERY", 2)
    monkeypatch.setattr(train_rl, "FACTORS_LR", 1)
    vectors = {split: torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
               for split, n in (("pool", 5), ("rl", 3), ("val", 4))}
    nearest, asked, drawn = matching.nearest(vectors["val"], vectors["pool"], 2), [], []
    def reward_fn(split, rows, picks):
        asked.append((split, rows))
        drawn.append(picks)
        assert picks.shape == (len(rows), 2) and (split == "rl" or torch.equal(picks, nearest))
        return picks[:, 0] / 5
    matcher = matching.Matcher(vectors["pool"], logit_scale=3.0)
    before = copy.deepcopy(matcher).state_dict().values()
    s = Settings(m=2, steps=3, queries=2, samples=2, entropy=0.0)
    lines = list(train_rl.reinforce(matcher, vectors, reward_fn, s, torch.zeros_like))
    val = ("val", [0, 1, 2, 3])
    assert asked == [val, ("rl", [0, 0, 1, 1]), ("rl", [2, 2, 0, 0]), val, ("rl", [1, 1, 2, 2]), val]
    start = {"step": 0, "val_reward": pytest.approx(nearest[:, 0].float().mean().item() / 5)}
    assert lines[0] == start and [line["step"] for line in lines] == [0, 1, 2, 3]
    assert ["val_reward" in line for line in lines] == [True, False, True, True]
    assert same(before, matcher.state_dict().values())
    for seed in (s.seed, 1):
        list(train_rl.reinforce(matcher, vectors, reward_fn, replace(s, seed=seed), torch.zeros_like))
    assert same(drawn[:6], drawn[6:12]) and not same(drawn[:6], drawn[12:])
    list(train_rl.reinforce(matcher, vectors, reward_fn, s))
    assert not same(before, matcher.state_dict().values())


# ---- the reward ------------------------------------------------------------------------------------------

SCORER = rouge_scorer.RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))
ascii_texts = st.text(st.characters(max_codepoint=127))
few_words = st.lists(st.sampled_from(["the", "The", "cat", "sat", "3.5", "café", "on-top", "!", "a"]),
                     max_size=12).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.tuples(few_words, few_words), st.tuples(st.text(), st.text())))
def test_rouge_l_is_rouge_scores(pair):
    theirs = SCORER.score(pair[1], pair[0])["rougeL"].fmeasure
    assert rouge_l(*pair) == pytest.approx(theirs, abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(st.one_of(few_words.map(lambda text: text.replace("é", "e")), ascii_texts))
def test_words_of_ascii_are_rouge_scores(text):
    """It drops what is not a-z or 0-9, and so scores 0 for equal texts without such a character."""
    theirs = DefaultTokenizer().tokenize(text)
    assert words(text) == (theirs or text.lower().split())


@pytest.mark.parametrize("text, cut", [
    ("Привет, Мир!", ["привет", "мир"]), ("café_Ünï 7", ["café", "ünï", "7"]), ("हिन्दी में", ["हिन्दी", "में"]),
    ("你好 GPT-2!", ["你", "好", "gpt", "2"]), ("สวัสดี", [*"สวัสดี"]), ("カナ", ["カ", "ナ"]),
    ("안녕 세상", ["안녕", "세상"]), ("→ ↑↑", ["→", "↑↑"]), ("", []), (" \n", [])])
def test_words_of_any_script(text, cut):
    """Equal texts score 1. Thai, Lao, Burmese, Khmer, Japanese and Chinese are compared by characters."""
    assert words(text) == cut and rouge_l(text, text) == float(bool(cut))


def test_rouge_l_by_hand():
    assert rouge_l("", "a cat") == rouge_l("a cat", "") == rouge_l("", "") == rouge_l("!?", "a") == 0
    assert rouge_l("A cat!", "a CAT") == 1
    # longest common subsequence "the sat": P = 2/3, R = 2/4
    assert rouge_l("the dog sat", "the cat then sat") == pytest.approx(4 / 7)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tiny.build(tmp_path_factory.mktemp("base"))
    return llama.load(folder), Tokenizer(folder)


QUERIES, POOL = tiny.records(12)[6:], tiny.records(6)
PICKS = [[0, 1], [1, 0], [2, 3], [], [4], [0, 5]]


@pytest.fixture
def environment(llm, tmp_path, monkeypatch):
    """environment(file name, max_new_tokens, pool=, identity=) -> Environment; four answers are a batch."""
    monkeypatch.setattr(train_rl, "ROLLOUT_BATCH", 4)
    def make(name="rewards.jsonl", max_new_tokens=8, pool=POOL, identity="model-1"):
        return Environment(*llm, pool, max_new_tokens, identity, tmp_path / name)
    return make


def plain_way(llm, query, prompts):
    """(answer, tokens read) for the whole prompt alone, without batch, padding or prefix."""
    model, tokenizer = llm
    ids, kept = join_ids(tokenizer, prompts, tokenizer.encode(query_text(query)), 512)
    assert kept == len(prompts)
    [alone] = llama.generate(model, [ids], 8, tokenizer.ends, lambda ids: at_next_block(tokenizer, ids))
    return clean_answer(tokenizer, alone), len(ids)


def test_scores_are_those_of_the_plain_way(llm, environment):
    """Trap 4 and the prefix cache: batched, padded, the first prompt's keys reused; yet the answer is exactly
    the one for the whole prompt alone (fp32), and so are its scores."""
    model, tokenizer = llm
    env = environment()
    entries, wanted = env.scores(QUERIES, PICKS), []
    for query, picks, entry in zip(QUERIES, PICKS, entries, strict=True):
        text, n = plain_way(llm, query, [POOL[j] for j in picks])
        assert entry["answer"] == text and entry["prompt_tokens"] == n
        assert entry["rouge"] == pytest.approx(rouge_l(text, query["output"]), abs=1e-6)
        assert entry["exact"] == (text == query["output"])
        two = matching.embed(model, [[tokenizer.encode(text)], [tokenizer.encode(query["output"])]])
        outputs = matching.embed(model, [[tokenizer.encode(p["output"])] for p in POOL])
        two = (two - outputs.mean(0)) / outputs.std(0, unbiased=False).clamp(min=1e-3)
        cosine = max(0.0, torch.cosine_similarity(two[0], two[1], dim=0).item()) if text else 0.0
        assert entry["semantic"] == pytest.approx(cosine, abs=1e-5)
        wanted.append(0.5 * entry["rouge"] + 0.5 * entry["semantic"])
    assert env.rewards(QUERIES, PICKS).tolist() == pytest.approx(wanted)
    assert len({e["answer"] for e in env.known.values()}) > 3  # answers do depend on what stands in front


def test_each_end_of_the_tokenizer_ends_an_answer(llm, environment, monkeypatch):
    """A chat model's end of turn is often not its first end id. Nothing is computed after it."""
    env, made = environment(), []
    monkeypatch.setattr(train_rl, "generate", lambda *args: made.extend(llama.generate(*args)) or made)
    ids, _ = join_ids(env.tokenizer, [], env.tokenizer.encode(query_text(QUERIES[0])), 512)
    [alone] = llama.generate(env.model, [ids], 8, env.tokenizer.ends)
    cut = next(n for n in range(2, 8) if alone[n] not in alone[:n])
    env.tokenizer = copy.copy(env.tokenizer)
    env.tokenizer.ends = frozenset({0, alone[cut]})
    [entry] = env.scores(QUERIES[:1], [[]])
    assert made == [alone[:cut + 1]]
    assert entry["answer"] == llm[1].decode(alone[:cut]).strip() != llm[1].decode(alone).strip()


def test_prefixes_that_were_dropped_are_computed_again(environment, monkeypatch):
    """They are kept up to a number of bytes, since a larger model's are larger. No score depends on it."""
    computed = []
    monkeypatch.setattr(train_rl, "prefill", lambda *args: computed.append(0) or llama.prefill(*args))
    scores, times = [], []
    for n, most in enumerate((2e9, 0)):
        monkeypatch.setattr(train_rl, "PREFIX_BYTES", most)
        env = environment(f"{n}.jsonl")
        scores.append([env.scores([query], [[0]]) for query in QUERIES[:3]])
        times.append(len(computed))
    assert scores[0] == scores[1] and times == [1, 1 + 3]


def test_semantic_score_of_equal_and_of_empty_answers(environment):
    assert environment().similarity(["loud", "", "loud"], ["loud", "loud", "tag"])[:2] == [1.0, 0.0]


def test_a_score_does_not_depend_on_what_was_scored_before(environment):
    """To the last bit, or a run that was killed and replays its cache ends in other weights: an embedding
    kept from an earlier batch was padded otherwise."""
    fresh, used = environment("a.jsonl"), environment("b.jsonl")
    pairs = [q["output"] for q in QUERIES], [q["input"] for q in QUERIES]
    used.similarity([a + " and much more of it, " * 9 for a in pairs[0]] + pairs[0], 2 * pairs[1])
    assert used.similarity(*pairs) == fresh.similarity(*pairs)


def test_prompts_that_do_not_fit_go_first_ones_first(llm, environment):
    """As in training and in sample.py: positions beyond the context were never trained."""
    pool = [{**p, "input": "word " * n} for p, n in zip(POOL, (10, 40, 40, 70, 5, 110), strict=True)]
    env = environment(pool=pool)
    for picks, kept in (([0, 4], [0, 4]), ([1, 3], [3]), ([3, 2, 4], [2, 4]), ([5, 0], [0]), ([5], [])):
        [entry] = env.scores(QUERIES[:1], [picks])
        wanted = plain_way(llm, QUERIES[0], [pool[j] for j in kept])
        assert (entry["answer"], entry["prompt_tokens"]) == wanted, picks
    assert env.shortened == 4


def test_a_second_environment_computes_nothing(environment, monkeypatch):
    first = environment()
    twice = first.scores(QUERIES + QUERIES, PICKS + PICKS)
    assert (first.asked, first.computed) == (12, 6) and twice[:6] == twice[6:]
    second = environment()
    assert second.scores(QUERIES, PICKS) == twice[:6] and second.computed == 0
    monkeypatch.setattr(train_rl, "TEXTUAL", 1.0)  # both scores are stored, so the mix may change
    weights = environment()
    assert weights.rewards(QUERIES, PICKS).tolist() == pytest.approx([e["rouge"] for e in twice[:6]])
    assert weights.computed == 0


def test_a_torn_line_is_computed_again(environment, tmp_path):
    """A line is a batch. A killed run leaves half a line; what is written after it must not be lost too."""
    path = tmp_path / "rewards.jsonl"
    wanted = environment().scores(QUERIES, PICKS)
    lines = path.read_bytes().splitlines(keepends=True)
    assert [len(json.loads(line)) for line in lines] == [4, 2]
    path.write_bytes(b"".join(lines)[:-20])
    torn = environment()
    assert torn.scores(QUERIES, PICKS) == wanted and torn.computed == 2  # its whole batch: the same bits
    third = environment()
    assert third.scores(QUERIES, PICKS) == wanted and third.computed == 0
    path.write_bytes(path.read_bytes()[:-1])  # the last line is whole, its end is missing
    fourth = environment()
    assert fourth.scores(QUERIES, PICKS) == wanted and fourth.computed == 0
    fourth.scores(QUERIES[:1], [[3]])
    assert environment().known == fourth.known and len(fourth.known) == 7
    path.write_bytes(lines[0][:-20] + b"\n" + lines[1])  # torn in the middle: that batch alone is lost
    middle = environment()
    assert middle.scores(QUERIES, PICKS) == wanted and middle.computed == 4
    entries = json.loads(lines[0])
    path.write_text(json.dumps([entries[0], entries[1] | {"rouge": 10**400}]))  # more than a float can hold
    assert environment().known == read_rewards(path) == {}
    assert read_rewards(tmp_path / "none.jsonl") == {}


def test_the_key_holds_all_that_an_answer_depends_on(environment):
    """Whatever changes an answer or a score must change the key, or old rewards are taken for new ones."""
    def other(field, where=0):
        changed = [dict(p) for p in POOL]
        changed[where][field] += " indeed"
        return changed
    def key(query=QUERIES[0], picks=(0, 1), **how):
        return environment(**how).key(query, picks)
    keys = [key(), key(identity="model-2"), key(max_new_tokens=9), key(picks=(1, 0)),
            key(picks=(0,)), key(picks=()), key(pool=other("instruction")), key(pool=other("input")),
            key(pool=other("output")), key({**QUERIES[0], "output": "another reference"}),
            key({**QUERIES[0], "input": "another input"}), key({**QUERIES[0], "instruction": "Another."}),
            # the pool's answers set the mean and deviation of the semantic score, picked or not
            key(pool=other("output", where=5))]
    assert len(set(keys)) == len(keys)
    assert key({**QUERIES[0], "task": "renamed"}) == keys[0]


# ---- whole runs ------------------------------------------------------------------------------------------

SMALL = {"ROLLOUT_BATCH": 4, "VAL_QUERIES": 3, "EVAL_EVERY": 1}
TINY = {"adapter": "none", "m": 2, "steps": 3, "queries": 4, "samples": 3, "lr": 5e-3, "max_new_tokens": 6,
        "test_queries": 0, "device": "cpu", "dtype": "float32"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(out_dir, **changes of TINY and SMALL) -> what one tiny train_rl.main showed: env, drawn (each
    step's picks) and last (the weights after the last step; the best ones are in the folder)."""
    monkeypatch.setattr(download, "DATA", tmp_path / "data")
    tiny.with_data(tmp_path)
    home = {"base": str(tiny.build(tmp_path / "base", seed=6)), "data": str(tmp_path / "mine.jsonl")}

    def go(out, **changes):
        seen = SimpleNamespace(env=None, last=None, drawn=[])
        def environment(*args):
            seen.env = Environment(*args)
            return seen.env
        class SpyMatcher(matching.Matcher):
            def act(self, *args, **how):
                acted = super().act(*args, **how)
                seen.drawn += [acted[0]] if how.get("generator") else []
                return acted
            def load_state_dict(self, state):
                seen.last = copy.deepcopy(self.state_dict())
                return super().load_state_dict(state)
        (tmp_path / out).mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_rl, "Environment", environment)
            patch.setattr(train_rl, "Matcher", SpyMatcher)
            for name, value in SMALL.items():
                patch.setattr(train_rl, name, changes.pop(name, value))
            train_rl.main(Settings(**TINY | home | {"out_dir": str(tmp_path / out)} | changes))
        return seen
    return go


def split(home, name):
    return read_records(next((home / "data").glob(f"*/{name}.jsonl")))


def strict(text: str):
    """JSON as others read it: Python alone writes and reads NaN."""
    def refuse(word):
        raise ValueError(word)
    return json.loads(text, parse_constant=refuse)


def test_run_end_to_end_and_again(run, tmp_path, monkeypatch):
    """Two folders, one seed: the same bytes. The same command again: nothing computed, the same matcher."""
    def letters(a, b):  # random answers share no words
        return 2 * len(set(a) & set(b)) / (len(set(a)) + len(set(b)))
    monkeypatch.setattr(train_rl, "rouge_l", letters)
    first, out = run("a"), tmp_path / "a"
    assert {f.name for f in out.iterdir()} == {"matcher.safetensors", "matcher.json", "rewards.jsonl",
                                               "log.jsonl", "table.json", "run.json", "pool.json"}
    lines = [strict(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(0 <= line["reward"] <= 1 and 0 < line["entropy"] <= 1 for line in lines[1:])
    assert any(first.last[f"{mlp}_mlp.down.weight"].abs().max() > 0 for mlp in ("prompt", "state"))
    assert all(tensor.isfinite().all() for tensor in first.last.values())
    # what is kept is the best by validation: a step of the log, which may be step 0, nearest
    kept, rewards = strict((out / "matcher.json").read_text()), [line["val_reward"] for line in lines]
    assert kept["val_reward"] == pytest.approx(max(rewards), abs=1e-5)
    assert rewards[kept["step"]] == pytest.approx(kept["val_reward"], abs=1e-5)
    stored, pool, m = matching.load(out, kept["model_id"])
    assert (stored.prompt_mlp.down.weight.abs().max() == 0) == (kept["step"] == 0)
    assert pool == split(tmp_path, "pool") and m == 2

    # the table is of what is kept, and of nothing that was not answered
    table, env, test = strict((out / "table.json").read_text()), first.env, split(tmp_path, "test")
    vectors, computed = matching.embed_records(env.model, env.tokenizer, test), env.computed
    with torch.no_grad():
        picks = {"no prompt": [[] for _ in test],
                 "nearest": matching.nearest(vectors, stored.pool, 2).tolist(),
                 "learned": stored.act(vectors, 2, greedy=True)[0].tolist()}
    assert list(table["rows"]) == list(picks) and len(test) == 6
    scores = {name: env.scores(test, picked) for name, picked in picks.items()}
    assert env.computed == computed
    def mean(name, key):
        return sum(float(e[key]) for e in scores[name]) / 6 * 100
    for name, row in table["rows"].items():
        assert row["rouge"] == pytest.approx(mean(name, "rouge"), abs=0.01)
        assert row["exact"] == pytest.approx(mean(name, "exact"), abs=0.01)
        gap, low, high = row["minus nearest"]
        assert gap == pytest.approx(mean(name, "rouge") - mean("nearest", "rouge"), abs=0.02)
        assert low <= gap <= high and (name != "nearest" or low == high == 0)

    # or this would have proved little: the best step is none of the ends, and the rows differ
    assert 0 < kept["step"] < 3 and len({row["rouge"] for row in table["rows"].values()}) == 3

    twin = run("b")
    for name in ("matcher.safetensors", "matcher.json", "rewards.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert same(first.drawn, twin.drawn) and same(first.last.values(), twin.last.values())

    before = (out / "rewards.jsonl").read_bytes()
    again = run("a")
    assert again.env.computed == 0 < again.env.asked and (out / "rewards.jsonl").read_bytes() == before
    assert same(first.last.values(), again.last.values())
    assert not same(first.drawn, run("c", seed=7).drawn)


def test_evaluating_does_not_change_the_draws(run):
    """The policy's generator is its own: with validation at every step or not, it draws the same."""
    often, seldom = (run(str(every), EVAL_EVERY=every).drawn for every in (1, 3))
    assert len(often) == 3 and same(often, seldom)


def test_a_query_never_gets_itself(run, tmp_path, capsys):
    """Trap 11: a pool made of the queries; none of them may be picked, for itself or for another."""
    queries = [q for name in ("val", "test", "rl") for q in split(tmp_path, name)]
    others = tiny.records(75)[60:]
    file = tiny.write_records(tmp_path / "pool.jsonl", queries + others)
    seen = run("own", pool=str(file))
    assert seen.env.pool == others and seen.env.asked > 50
    assert f"{len(queries)} of {len(queries) + 15} prompts are left out: " in capsys.readouterr().out
    kept = strict((tmp_path / "own" / "matcher.json").read_text())
    assert matching.load(tmp_path / "own", kept["model_id"])[1:] == (others, 2)  # it need not be named again


@pytest.mark.parametrize("left, changes, words", [
    (2, {}, "pool.jsonl: 2 prompts are too few to choose 2; give at least 3 with --pool, or lower --m"),
    (9, {"m": 4, "candidates": 4}, "--candidates 4 must be above --m 4: else there is no choice"),
])
def test_a_policy_without_a_choice_is_refused(run, tmp_path, left, changes, words):
    pool = split(tmp_path, "val") + tiny.records(60 + left)[60:]
    with pytest.raises(ValueError, match=words):
        run("none", pool=str(tiny.write_records(tmp_path / "pool.jsonl", pool)), **changes)


def test_two_processes_are_one(run, tmp_path):
    """torchrun: the LLM's answers are shared out, so everything else is what one process would have made."""
    run("one", ROLLOUT_BATCH=2, max_new_tokens=4)
    (tmp_path / "small.py").write_text(
        "import train_rl\nfrom train_rl import Settings, main\n"
        f"vars(train_rl).update({SMALL | {'ROLLOUT_BATCH': 2}})\n")
    tiny.two_processes("small", tmp_path, TINY | {
        "max_new_tokens": 4, "base": tmp_path / "base", "data": tmp_path / "mine.jsonl",
        "out_dir": tmp_path / "two"})
    a, b = tmp_path / "one", tmp_path / "two"
    assert {f.name for f in a.iterdir()} == {f.name for f in b.iterdir()}
    for name in ("matcher.safetensors", "matcher.json", "rewards.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    rows = [strict((folder / "table.json").read_text())["rows"] for folder in (a, b)]
    assert rows[0] == rows[1]
    assert len(read_rewards(a / "rewards.jsonl")) > 30
