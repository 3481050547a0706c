"""assets/rewards.safetensors and what is shown with it: numbers and ids alone; collapse and its cure.

    pytest tests/test_experiment.py
"""
import re
from dataclasses import replace

import experiment
import torch

import train_rl


def test_the_table_is_numbers_and_ids():
    """No text of a data set is in this repository."""
    t, names = experiment.table_of(experiment.Settings())
    assert {split: len(ids) for split, ids in names.items()} == {"pool": 36, "rl": 96, "val": 24, "test": 48}
    everything = sum(names.values(), [])
    assert len(set(everything)) == len(everything)
    assert all(re.fullmatch(r"\w+:[0-9a-f]{8}", name) for name in everything)
    for split in ("rl", "val", "test"):
        rewards = t[f"reward.{split}"]
        assert rewards.shape == (len(names[split]), 36)
        assert 0 <= rewards.min() < 0.3 and 0.9 < rewards.max() <= 1
        assert t[split].shape == (len(names[split]), t["pool"].size(1)) and t[split].isfinite().all()
        # the rewards belong to the queries: prompts of a query's own task are the better ones
        task = [[a.split(":")[0] == b.split(":")[0] for b in names["pool"]] for a in names[split]]
        own = torch.tensor(task)
        assert rewards[own].mean() > rewards[~own].mean() + 0.05


def test_without_a_baseline_the_policy_collapses_and_ours_does_not():
    """PromptPG's published log: one fixed pair by epoch 5. All rewards are positive, so without a baseline
    whatever was drawn is reinforced; 400 steps at its learning rate, both from the same start."""
    t, _ = experiment.table_of(experiment.Settings())
    s = train_rl.Settings(m=2, steps=400, lr=1e-3, scale=20.0, candidates=1 << 20, seed=0)
    ours, bare = experiment.run(t, s)[1], replace(s, entropy=0.0)
    no_baseline = experiment.run(t, bare, advantage=lambda rewards: rewards)[1]
    promptpg = experiment.run(t, bare, experiment.WithReplacement, lambda rewards: rewards)[1]
    assert ours[0]["reward"] == no_baseline[0]["reward"]  # the same draws at first
    for other in (no_baseline, promptpg):
        assert ours[-1]["val"] > other[-1]["val"] + 0.03 and ours[-1]["reward"] > other[-1]["reward"] + 0.03
    assert max(line["val top share"] for line in promptpg) > 0.5  # one pair for most queries
    assert max(line["val top share"] for line in ours) <= 0.25


def test_learning_on_the_table_beats_the_nearest_prompt():
    """Greedy picks for test queries, the mean of three seeds; regret is against the best of all 36."""
    t, _ = experiment.table_of(experiment.Settings())
    nearest = experiment.greedy(experiment.matching.Matcher(t["pool"], 1), t, "test", 1)["test"]
    learned = []
    for seed in range(3):
        s = train_rl.Settings(m=1, steps=100, seed=seed)
        learned.append(experiment.greedy(experiment.run(t, s)[0], t, "test", 1)["test"])
    best = t["reward.test"].amax(1).mean().item()
    assert nearest + 0.005 < sum(learned) / 3 < best
