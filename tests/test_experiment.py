"""assets/rewards.safetensors and what is shown with it: numbers and ids alone; collapse and its cure.

    pytest tests/test_experiment.py
"""
import itertools
import re
from dataclasses import replace

import experiment
import pytest
import torch

import matcher as matching
import train_rl


def test_the_table_is_numbers_and_ids():
    """No text of a data set is in this repository."""
    t, names = experiment.table_of(experiment.Settings())
    assert {split: len(ids) for split, ids in names.items()} == {"pool": 870, "rl": 320, "val": 174,
                                                                 "test": 174}
    everything = sum(names.values(), [])
    assert all(re.fullmatch(r"[\w -]+:[0-9a-f]{8}", name) for name in everything)
    assert not set(names["rl"]) & set(names["test"]) and not set(names["val"]) & set(names["test"])
    assert t["doubts"].shape == (870, 2) and 300 < t["wrong"].sum() < 400
    near = matching.Matcher(t["pool"], 1)
    near.candidates = 16
    for split in ("rl", "val", "test"):
        rewards = t[f"reward.{split}"]  # (N, P)
        known = ~rewards.isnan()
        assert (known.sum(1) == 16).all() and rewards[known].min() >= 0 and 0.9 < rewards[known].max() <= 1
        assert t[split].shape == (len(names[split]), t["pool"].size(1)) and t[split].isfinite().all()
        # what the policy may pick is known, to the last tie, though embeddings are stored as int8
        picks, _, _ = near.act(t[split], 16, greedy=True)
        assert known.gather(1, picks).all()
        # the rewards belong to the queries: right prompts of a query's own task are the better ones
        task = [[a.split(":")[0] == b.split(":")[0] for b in names["pool"]] for a in names[split]]
        own = torch.tensor(task) & ~t["wrong"]
        assert rewards[own & known].mean() > rewards[~own & known].mean() + 0.1


@pytest.mark.slow
def test_without_a_baseline_the_policy_collapses_and_ours_does_not():
    """All rewards are positive, so without a baseline whatever was drawn is reinforced. m = 2, 400 steps from
    one start, with the same draws at first; three seeds, since chance decides much."""
    t, _ = experiment.table_of(experiment.Settings())
    ours, bare = [], []
    for seed in range(3):
        s = train_rl.Settings(m=2, steps=400, seed=seed)
        ours.append(experiment.run(t, s)[1])
        bare.append(experiment.run(t, replace(s, entropy=0.0), advantage_fn=lambda rewards: rewards)[1])
        assert ours[-1][0]["val_reward"] == pytest.approx(ours[-1][0]["val"])  # step 0 is the start
        assert ours[-1][1]["reward"] == bare[-1][1]["reward"]
    def mean(logs: list, key: str) -> float:
        return sum(log[-1][key] for log in logs) / len(logs)
    print({key: (mean(ours, key), mean(bare, key)) for key in ("entropy", "reward", "val", "val top share")})
    assert mean(bare, "entropy") < mean(ours, "entropy") - 0.03
    assert mean(bare, "val") < mean(ours, "val") and mean(ours, "val") > ours[0][0]["val"] + 0.02


def test_promptpgs_slip_is_what_it_says():
    """Pairs without replacement, log-probabilities of single picks that do not see each other: over all pairs
    with repeats they would sum to one, so over those that can be drawn they sum to less."""
    generator = torch.Generator().manual_seed(0)
    pool, query = torch.randn(5, 6, generator=generator), torch.randn(1, 6, generator=generator)
    matcher = experiment.WithReplacement(pool, 8, 3.0, 5, generator)
    for mlp in (matcher.prompt_mlp, matcher.state_mlp):
        mlp.down.weight.data.copy_(torch.randn(mlp.down.weight.shape, generator=generator))
    pairs = torch.tensor(list(itertools.permutations(range(5), 2)))  # (20, 2)
    _, log_probs, entropy = matcher.act(query.expand(20, -1), 2, picks=pairs)
    _, single, shannon = matcher.act(query.expand(5, -1), 1, picks=torch.arange(5)[:, None])
    torch.testing.assert_close(log_probs, single[:, 0][pairs])
    p = single.exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-6) and torch.equal(entropy[:5], shannon)
    total = log_probs.sum(1).exp().sum().item()
    assert total == pytest.approx(1 - p.square().sum().item(), abs=1e-6) and total < 0.95
    drawn, _, _ = matcher.act(query.expand(20_000, -1), 2, generator=generator)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    share = torch.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25).view(5, 5) / 20_000
    wanted = (p @ p.T / (1 - p)).masked_fill(torch.eye(5, dtype=torch.bool), 0)
    assert ((share - wanted).abs() < 5 * (wanted * (1 - wanted) / 20_000).sqrt() + 1e-6).all()
    greedy = matcher.act(query, 2, greedy=True)[0]
    assert greedy.tolist() == single[:, 0].topk(2).indices[None].tolist()


def test_learning_on_the_table_beats_the_nearest_prompt():
    """Greedy picks for test queries, the mean of three seeds: better prompts, and fewer planted mistakes. The
    prompts that the policy values least are mistakes twice as often as chance would have it."""
    t, _ = experiment.table_of(experiment.Settings())
    nearest = experiment.greedy(matching.Matcher(t["pool"], 1, candidates=16), t, "test", 1)
    learned = []
    for seed in range(3):
        matcher, _ = experiment.run(t, train_rl.Settings(seed=seed))
        learned.append(experiment.greedy(matcher, t, "test", 1))
        assert t["wrong"][matcher.usefulness().argsort()[:50]].float().mean() > 2 * t["wrong"].float().mean()
    def mean(key: str) -> float:
        return sum(line[key] for line in learned) / 3
    best = t["reward.test"].nan_to_num(0).amax(1).mean().item()
    assert nearest["test"] + 0.03 < mean("test") < best
    assert mean("test wrong") < 0.6 * nearest["test wrong"]


def test_the_rules_that_learn_nothing_are_read_off_the_table():
    """Nearest equals the untrained policy; the nearest plausible prompt is the better choice."""
    t, _ = experiment.table_of(experiment.Settings())
    levels = experiment.levels(t, "val", "test")
    of_split = [experiment.levels(t, split) for split in ("val", "test")]
    for name, level in levels.items():  # both splits have 174 queries
        assert level == pytest.approx((of_split[0][name] + of_split[1][name]) / 2)
    untrained = matching.Matcher(t["pool"], 1, candidates=16)
    assert of_split[1]["nearest"] == pytest.approx(experiment.greedy(untrained, t, "test", 1)["test"])
    assert levels["nearest"] + 0.01 < levels[experiment.LPR] < 1


def test_play_and_collapse_say_what_they_find(capsys):
    experiment.main(experiment.Settings(seeds=2, steps=2))
    shown = capsys.readouterr().out
    assert "best of all" in shown and "seed 1: learned" in shown and "PromptPG" in shown
