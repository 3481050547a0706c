"""compare.py: the selectors, the table that compares them, its intervals, and means over runs.

    pytest tests/test_compare.py
"""
import itertools
import json
import math
import random

import compare
import pytest
import tiny
import torch

import matcher as matching
import train_rl
from data import download, prepare, runs
from data.files import lock_folder, save_json
from data.records import read_records
from data.runs import read_rewards, run_record, seen_by
from data.scores import interval

# ---- the selectors ---------------------------------------------------------------------------------------

def test_random_picks_are_different_and_uniform():
    picks = compare.random_picks(30_000, 5, 2, torch.Generator().manual_seed(0))
    assert (picks[:, 0] != picks[:, 1]).all()
    counts = torch.bincount(picks[:, 0] * 5 + picks[:, 1], minlength=25).view(5, 5)
    share = counts[~torch.eye(5, dtype=torch.bool)]  # of the 20 pairs
    assert (share / 30_000 - 1 / 20).abs().max() < 5 * (0.05 * 0.95 / 30_000) ** 0.5


def test_bm25_against_the_formula():
    """Okapi's sum, word by word, on random records."""
    draw, vocabulary = random.Random(0), "the the the write date code rare long in tags".split()
    def record():
        words = draw.choices(vocabulary, k=draw.randint(1, 9))
        question = {"instruction": " ".join(words).title(), "input": draw.choice(vocabulary)}
        return {"task": "", **question, "output": "x"}
    queries, pool = [record() for _ in range(20)], [record() for _ in range(12)]
    texts = [f"{p['instruction']} {p['input']}".lower().split() for p in pool]
    for query, picked in zip(queries, compare.bm25(queries, pool, 3).tolist(), strict=True):
        scores = []
        for text in texts:
            score = 0.0
            for word in set(f"{query['instruction']} {query['input']}".lower().split()):
                n, f = sum(word in t for t in texts), text.count(word)
                length = len(text) / (sum(map(len, texts)) / len(texts))
                idf = math.log(1 + (12 - n + 0.5) / (n + 0.5))
                score += idf * f * 2.5 / (f + 1.5 * (0.25 + 0.75 * length))
            scores.append(score)
        assert len(set(picked)) == 3
        assert [scores[j] for j in picked] == pytest.approx(sorted(scores, reverse=True)[:3], abs=1e-6)


def test_words_of_any_script_count_for_bm25():
    """Chinese has no blanks: a text that is one word would share nothing with others."""
    pool = [{"task": "", "instruction": text, "input": "", "output": "x"}
            for text in ("写一首诗", "今天的天气", "翻译句子")]
    query = {"task": "", "instruction": "明天天气怎么样", "input": "", "output": "x"}
    assert compare.bm25([query], pool, 1).tolist() == [[1]]


def test_the_plausible_are_told_by_their_neighbours():
    """LPR by hand: two heaps of five on a circle. Doubtful is an answer above its own heap's median (3, 8):
    not all of the second heap."""
    degrees = torch.tensor([0.0, 4, 8, 12, 16, 180, 184, 188, 192, 196]).deg2rad()
    points = 2 * torch.stack((degrees.cos(), degrees.sin()), 1).repeat(1, 2)  # (P, E): both parts alike
    surprise = torch.tensor([1.0, 5, 2, 4, 3, 10, 9, 8, 7, 6])  # of them 5, 4, 10 and 9 are doubtful
    matcher = matching.Matcher(points, doubts=torch.stack((surprise, torch.zeros(10)), 1))
    matcher.mean.zero_()
    matcher.std.fill_(1.0)
    near = torch.tensor([5.0, 181]).deg2rad()
    queries = 2 * torch.stack((near.cos(), near.sin()), 1).repeat(1, 2)  # (2, E)
    assert matcher.act(queries, 3, greedy=True)[0].tolist() == [[1, 2, 0], [5, 6, 7]]  # the nearest
    assert compare.plausible_scores(matcher, queries).topk(3).indices.tolist() == [[2, 0, 4], [7, 8, 9]]


# ---- the table -------------------------------------------------------------------------------------------

def test_an_interval_is_a_bootstraps():
    """Mean and 95% interval in points: 1.96 standard errors either way, where there are many differences."""
    gaps = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.05
    mean, low, high = interval(gaps)
    error = 100 * gaps.std().item() / 2000**0.5
    assert mean == pytest.approx(100 * gaps.mean().item(), abs=0.01)
    assert [mean - low, high - mean] == pytest.approx([1.96 * error] * 2, rel=0.08)
    assert compare.interval_over_runs(gaps[None]) == [mean, low, high]
    assert interval(torch.tensor([0.4])) == [40, -100, 100]  # one query says nothing about others


def test_an_interval_over_runs_draws_runs_and_queries():
    """Many runs and queries, each with an effect of its own: the variance of the mean is the sum of both."""
    generator = torch.Generator().manual_seed(1)
    of_run, of_query = (0.3 * torch.randn(n, generator=generator) for n in (200, 300))
    gaps = 0.05 + of_run[:, None] + of_query  # (200, 300)
    error = 100 * (of_run.var() / 200 + of_query.var() / 300).sqrt().item()
    mean, low, high = compare.interval_over_runs(gaps)
    assert mean == pytest.approx(100 * gaps.mean().item(), abs=0.01)
    assert [mean - low, high - mean] == pytest.approx([1.96 * error] * 2, rel=0.08)
    same = of_query.expand(5, -1)  # runs that agree add nothing
    assert compare.interval_over_runs(same)[1:] == pytest.approx(interval(of_query)[1:], abs=0.4)


def test_figures_by_hand():
    """Two queries of a seen task and one of a new task; a row of two runs is their mean."""
    def entries(*scores):
        return [{"rouge": r, "exact": r == 1, "semantic": r / 2, "prompt_tokens": 10, "answer": "a b c"}
                for r in scores]
    test = [{"task": task} for task in ("loud", "loud", "tag")]
    pool = [{"task": task, "instruction": task, "input": ""} for task in ("loud", "tag")]
    picks = {"no prompt": [[[], [], []]], "random": [[[0], [1], [1]], [[1], [1], [0]]],
             "nearest": [[[0], [0], [1]]], "base, no prompt": [[[], [], []]]}
    scored = {"no prompt": [entries(0, 0.5, 0)], "random": [entries(0, 1, 0.2), entries(1, 0.5, 0)],
              "nearest": [entries(1, 0.5, 1)], "base, no prompt": [entries(1, 1, 1)]}
    seen = torch.tensor([True, True, False])
    groups = {"seen tasks": seen, "new tasks": ~seen}
    marks = {compare.query_text(pool[0]): "wrong answer: its input"}
    rows, rouge = compare.summarise(picks, scored, test, pool, groups, marks)
    assert rows["random"].pop("wrong answer") == 33.33 and "wrong answer" not in rows["no prompt"]
    assert rows["random"] == {
        "ROUGE-L, seen tasks": 62.5, "ROUGE-L, new tasks": 10, "exact, seen tasks": 50, "exact, new tasks": 0,
        "semantic": 22.5, "right task": 33.33, "prompt tokens": 10, "answer words": 3}
    assert rows["nearest"]["right task"] == 100 and rows["no prompt"]["right task"] == 0
    # of LoRA's rows, each run by itself: the base's answers do not count
    assert rows["best of LoRA's"] == {"ROUGE-L, seen tasks": 100, "ROUGE-L, new tasks": 100}
    scored["nearest"] = [entries(0, 0, 0)]
    rows, _ = compare.summarise(picks, scored, test, pool, groups, {})
    assert "wrong answer" not in rows["random"] and rows["best of LoRA's"] == {
        "ROUGE-L, seen tasks": 100, "ROUGE-L, new tasks": 20}
    gaps = compare.differences({name: score[None] for name, score in rouge.items()}, groups)
    assert gaps["random"]["new tasks minus nearest"] == [-90, -100, 100]  # of one query
    assert gaps["nearest"]["seen tasks minus no prompt"][0] == 50
    assert [gap["won / tied / lost to nearest"] for gap in gaps.values()] == [
        "0 / 1 / 2", "1 / 0 / 2", "0 / 3 / 0", "1 / 2 / 0"]
    scores = {"learned": torch.tensor([[0.5, 1.0, 0.0]]), compare.LPR: torch.tensor([[0.0, 0.5, 0.2]])}
    assert compare.pairs(scores, groups) == {f"learned minus {compare.LPR}": {
        "seen tasks": [50, 50, 50], "new tasks": [-20, -100, 100]}}  # of one query


def test_who_is_told_the_task_gets_its_right_or_its_wrong_answers(capsys):
    pool = [{"task": task, "instruction": f"{task} {n}", "input": "", "output": "x"}
            for task in ("loud", "tag") for n in range(4)]
    marks = {compare.query_text(p): "wrong answer: its input" for p in pool[1:4]}  # tag has no wrong one
    picks = compare.told([{"task": "loud"}, {"task": "tag"}, {"task": "other"}] * 20, pool, marks, 2, seed=0)
    [right], [wrong] = picks[compare.RIGHT], picks[compare.WRONG]
    assert right[0] == [0] and right[2] == []
    assert all(len(set(p)) == 2 and set(p) <= {4, 5, 6, 7} for p in right[1::3])
    assert all(len(set(p)) == 2 and set(p) <= {1, 2, 3} for p in wrong[::3]) and not any(wrong[1::3])
    assert capsys.readouterr().out == "".join(
        f"({row}: for 40 of 60 queries the pool has fewer than 2 such prompts, for {none} none: they get "
        "those)\n"
        for row, none in ((compare.RIGHT, 20), (compare.WRONG, 40)))
    assert list(compare.told([{"task": "tag"}], pool, marks, 2, seed=0)) == [compare.RIGHT]


def write_table(folder, scores: dict, rows: dict, queries: list) -> str:
    folder.mkdir()
    table = {"rows": rows, "rouge of each query": scores, "queries": queries,
             "groups": {"seen tasks": [True, True, False], "new tasks": [False, False, True]}}
    (folder / "table.json").write_text(json.dumps(table))
    return str(folder)


def test_runs_are_averaged_by_query(tmp_path, capsys):
    """Rows are means over runs; an interval is that of the queries' mean difference, by group. The second run
    has another order of the queries, and a row of its own."""
    scores = {"no prompt": [[0.0, 0.5, 0.0], [0.0, 0.5, 0.2]],
              "nearest": [[0.5, 0.5, 1.0], [0.5, 0.5, 0.4]],
              "learned": [[1.0, 1.0, 1.0], [1.0, 1.0, 0.4]]}
    queries, folders = tiny.records(3), []
    for run in range(2):
        rows = {name: {"exact, new tasks": 10.0 * (run + 1)} for name in [*scores, "best of LoRA's"]}
        if run == 0:
            rows["full fine-tuning, learned"] = {"exact, new tasks": 1.0}  # only beside one seed: left out
        folders.append(write_table(tmp_path / str(run), {name: of[run][::1 - 2 * run] for name, of in
                                                         scores.items()}, rows, queries[::1 - 2 * run]))
    (tmp_path / "mean").mkdir()
    compare.main(compare.Settings(runs=",".join(folders), out_dir=str(tmp_path / "mean"), seed=7))
    shown = capsys.readouterr().out
    assert shown.startswith("(--seed: without effect with --runs)\n")
    assert all(f"| {name} |" in shown for name in scores) and "full" not in shown
    assert "+50.0 [+50.0, +50.0]" in shown
    table = json.loads((tmp_path / "mean" / "runs.json").read_text())
    assert table["runs"] == folders and list(table["rows"]) == [*scores, "best of LoRA's"]
    assert all(row == {"exact, new tasks": 15} for row in table["rows"].values())
    gaps = table["gaps"]["learned"]
    assert gaps["seen tasks minus nearest"] == [50, 50, 50]
    assert gaps["new tasks minus no prompt"] == [60, 20, 100]  # each run's own, where both draws are of it
    assert gaps["won / tied / lost to nearest"] == "4 / 2 / 0"
    others = write_table(tmp_path / "2", {}, {}, tiny.records(4)[1:])
    with pytest.raises(ValueError, match="--test_queries 0"):
        compare.over_runs([folders[0], others])
    with pytest.raises(FileNotFoundError, match="table.json"):
        compare.over_runs([str(tmp_path)])


# ---- whole runs ------------------------------------------------------------------------------------------

COMMON = {"max_new_tokens": 6, "test_queries": 0, "device": "cpu", "dtype": "float32"}
OTHERS = ["base, no prompt", *(f"full fine-tuning, {way}" for way in ("no prompt", "nearest", "learned"))]


def reinforce(home, out, **changes) -> None:
    """train_rl.py with the base, adapter and data of `home`, to out."""
    out.mkdir()
    flags = {"base": str(home / "base"), "adapter": str(home / "sft"), "data": str(home / "mine.jsonl")}
    train_rl.main(train_rl.Settings(out_dir=str(out), m=2, **COMMON | flags | changes))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data set, a base, an adapter, a model of full fine-tuning, and two trained matchers: `plain` on the
    data's own pool, `own` on a pool of its own."""
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    tiny.write_records(home / "mine.jsonl", tiny.records(60))
    tiny.write_records(home / "pool.jsonl", tiny.records(75)[60:])
    tiny.trained(home)  # base, sft
    tiny.build(home / "full", seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "DATA", home / "data")
        for name in ("EVAL_EVERY", "VAL_QUERIES"):
            patch.setattr(train_rl, name, 3)
        for out, pool in (("plain", ""), ("own", str(home / "pool.jsonl"))):
            reinforce(home, home / out, pool=pool, steps=3, queries=4, samples=3, lr=0.05)
    [data] = (home / "data").iterdir()  # what fine-tuning saw: its run remembers the data
    save_json(run_record(train_rl.Settings(), data, ""), home / "sft/run.json")
    return home


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    """run(matcher's folder, **changes) -> (the environments, table.json) of one compare.main."""
    monkeypatch.setattr(download, "DATA", home / "data")
    monkeypatch.setattr(compare, "FIXED_TRIES", 3)
    monkeypatch.setattr(compare, "RANDOM_SEEDS", 2)
    made = []
    class Spy(train_rl.Environment):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)
    monkeypatch.setattr(compare, "Environment", Spy)

    def go(matcher, **changes):
        made.clear()
        flags = {"base": str(home / "base"), "adapter": str(home / "sft"), "data": str(home / "mine.jsonl"),
                 "full": "", "matcher": str(home / matcher), "out_dir": str(tmp_path / "out")}
        (tmp_path / "out").mkdir(exist_ok=True)
        compare.main(compare.Settings(**COMMON | flags | changes))
        def refuse(word):  # Python alone writes and reads NaN
            raise ValueError(word)
        return made, json.loads((tmp_path / "out" / "table.json").read_text(), parse_constant=refuse)
    return go


def test_the_table_agrees_with_train_rls_and_is_repeated_from_the_file(run, home, capsys):
    """The rows that train_rl.py has: the same figures, nothing of them is computed. Also with a pool of one's
    own, stored with the matcher: it need not be named again (trap 11)."""
    for matcher in ("plain", "own"):
        weights = (home / matcher / "matcher.safetensors").read_bytes()
        of_rl = json.loads((home / matcher / "table.json").read_text())["rows"]
        known = read_rewards(home / matcher / "rewards.jsonl").keys()
        envs, table = run(matcher)
        rows, test = table["rows"], table["queries"]
        assert list(rows) == [*compare.SELECTORS, OTHERS[0], "best of LoRA's"]
        for name in ("no prompt", "nearest", "learned"):
            assert rows[name]["ROUGE-L, seen tasks"] == pytest.approx(of_rl[name]["rouge"], abs=0.006)
            assert rows[name]["exact, seen tasks"] == pytest.approx(of_rl[name]["exact"], abs=0.006)
            assert {envs[0].key(*pair) for pair in zip(test, table["picks"][name], strict=True)} <= known
        assert table["gaps"]["learned"]["seen tasks minus nearest"] == of_rl["learned"]["minus nearest"]
        assert envs[0].computed > 0
        best = rows["best of LoRA's"]["ROUGE-L, seen tasks"]
        assert best >= max(rows[name]["ROUGE-L, seen tasks"] for name in compare.SELECTORS)
        for name in compare.SELECTORS:  # the queries' own scores, for statistics of one's own
            mean = 100 * sum(table["rouge of each query"][name]) / len(test)
            assert mean == pytest.approx(rows[name]["ROUGE-L, seen tasks"], abs=0.006)

        before, _ = (home / matcher / "rewards.jsonl").read_bytes(), capsys.readouterr()
        envs, again = run(matcher)
        assert all(env.computed == 0 and env.asked > 0 for env in envs) and again == table
        assert (home / matcher / "rewards.jsonl").read_bytes() == before
        assert (home / matcher / "matcher.safetensors").read_bytes() == weights
        shown = capsys.readouterr().out
        assert all(f"| {name} |" in shown for name in rows)
        assert "won / tied / lost to nearest" in shown and "new tasks" not in shown  # there are none
        assert f"(few queries, whose intervals say little: {len(test)} of seen tasks)" in shown
        assert f"({len(test)} of {len(test)} references are longer than --max_new_tokens 6" in shown
    assert table["pool"] == tiny.records(75)[60:] and {len(p) for p in table["picks"]["learned"]} == {2}


def test_a_pool_without_a_choice_is_refused(run, tmp_path):
    pool = tiny.write_records(tmp_path / "two.jsonl", tiny.records(62)[60:])  # m = 2
    with pytest.raises(ValueError, match="two.jsonl: 2 prompts are too few to choose 2"):
        run("plain", pool=str(pool))


def test_another_pool_replaces_the_matchers(run, home, tmp_path, capsys):
    """And a prompt that asks what a query asks is dropped from it (trap 11)."""
    test = read_records(next((home / "data").glob("own-*")) / "test.jsonl")
    other = tiny.write_records(tmp_path / "other.jsonl", [*test[:3], *tiny.records(90)[75:]])
    capsys.readouterr()
    envs, table = run("plain", pool=str(other), full="gone")
    assert "(--full: without effect as there is no such folder)\n" in capsys.readouterr().out
    assert envs[0].pool == table["pool"] == tiny.records(90)[75:] and envs[0].computed > 0


def test_a_stored_pool_never_answers_its_own_questions(run, home, tmp_path):
    """The matcher was trained on other data, whose pool holds these test queries."""
    data = tiny.write_records(tmp_path / "other.jsonl", read_records(home / "pool.jsonl"))
    with pytest.raises(ValueError, match="some ask what test queries ask"):
        run("own", data=str(data))


def test_the_best_fixed_set_is_the_best_try_on_val(run, home):
    envs, table = run("plain")
    [env, *_], fixed = envs, table["picks"]["best fixed"]
    assert len(set(map(tuple, fixed))) == 1  # one set for all queries
    folder = next((home / "data").glob("own-*"))
    val, generator = read_records(folder / "val.jsonl"), torch.Generator().manual_seed(1337)
    tries = compare.random_picks(3, len(env.pool), 2, generator).tolist()
    means = [env.rewards(val, [picks] * len(val)).mean().item() for picks in tries]
    assert env.computed == 0  # all are known by now
    assert fixed[0] == tries[means.index(max(means))] and len(set(means)) > 1
    assert table["picks"]["random"] != fixed and len(set(map(tuple, table["picks"]["random"]))) > 2


def test_other_models_stand_in_the_table(run, home):
    """The base alone and full fine-tuning beside LoRA, one judge for all of them."""
    envs, table = run("plain", full=str(home / "full"))
    assert list(table["rows"]) == [*compare.SELECTORS, *OTHERS, "best of LoRA's"]
    assert len(envs) == 3 and all(env.judge is envs[0] for env in envs)
    answers = [table["rows"][name] for name in ("no prompt", *OTHERS[:2], OTHERS[3])]
    assert all(a != b for a, b in itertools.combinations(answers, 2))  # different models and ways
    gaps = table["gaps"]
    assert gaps["nearest"]["seen tasks minus nearest"] == [0, 0, 0]
    won, tied, lost = map(int, gaps["learned"]["won / tied / lost to nearest"].split(" / "))
    assert won + tied + lost == 6 and gaps["no prompt"].keys() == gaps["learned"].keys()


@pytest.mark.parametrize("what", ["no adapter", "no task names", "new tasks"])
def test_groups_are_what_the_data_has(run, home, tmp_path, monkeypatch, what):
    """Tasks are seen in fine-tuning or new; without an adapter or without names there is one group."""
    found, matcher, flags = prepare.read_records, home / "plain", {}
    if what == "no adapter":  # with a matcher for the bare base
        matcher, flags = tmp_path / "rl", {"adapter": "none"}
        reinforce(home, matcher, adapter="none", steps=1, queries=2, samples=2)
    elif what == "no task names":
        plain = tiny.write_records(tmp_path / "plain.jsonl", [r | {"task": ""} for r in tiny.records(60)])
        flags = {"data": str(plain)}
    else:
        monkeypatch.setattr(runs, "read_records", lambda path: [
            r for r in found(path) if r["task"] == "loud"])
    envs, table = run(matcher, **flags)
    assert ("base, no prompt" in table["rows"]) == (what != "no adapter")
    assert ("right task" in table["rows"]["learned"]) == (what != "no task names")
    if what == "new tasks":
        masks = [[q["task"] == task for q in table["queries"]] for task in ("loud", "tag")]
        assert table["groups"] == dict(zip(("seen tasks", "new tasks"), masks, strict=True))
    else:
        assert table["groups"] == {"all queries": [True] * 6}
    assert [k for k in table["rows"]["learned"] if k.startswith("ROUGE-L")] == [
        f"ROUGE-L, {group}" for group in table["groups"]]


def test_seen_is_what_that_fine_tuning_saw(home, tmp_path, monkeypatch, capsys):
    """Not what lies in --data now: an own file that has grown has another split, with test records of the old
    training part."""
    monkeypatch.setattr(download, "DATA", home / "data")
    first = next((home / "data").glob("own-mine-*"))
    found = {split: read_records(first / f"{split}.jsonl") for split in ("sft", "test")}
    assert seen_by(home / "sft", "sft", first, {"test": found["test"]}) == {"loud", "tag"}
    assert capsys.readouterr().out == ""
    mixed = {"rl": found["sft"][:3] + found["test"], "test": found["test"]}
    assert seen_by(home / "sft", "sft", home / "data/grown", mixed) == {"loud", "tag"}
    assert capsys.readouterr().out.split("\n")[:-1] == [
        f"({home / 'sft'} was trained on {first}, not on {home / 'data/grown'})",
        f"(3 of 9 rl queries were in the training part of {home / 'sft'}: its answers to them prove nothing)"]
    monkeypatch.setattr(download, "DATA", tmp_path)
    assert seen_by(home / "sft", "sft", tmp_path / "grown", mixed) == set()
    assert "which is gone: it may have seen these queries" in capsys.readouterr().out
    assert seen_by(home / "base", "sft", first, mixed) == set() and not capsys.readouterr().out


def test_the_matchers_folder_is_locked(run, home, tmp_path):
    """train_rl.py may be writing its rewards there."""
    with lock_folder(home / "plain"), pytest.raises(ValueError, match="another run is writing there"):
        run("plain")
    with pytest.raises(FileNotFoundError, match="train_rl.py"):
        run("nowhere")
    assert not (home / "nowhere").exists()
