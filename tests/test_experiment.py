"""assets/rewards.safetensors and what is shown with it: numbers and ids alone; collapse and its cure.

    pytest tests/test_experiment.py
"""
import itertools
import json
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


def test_play_and_collapse_end_in_a_figure(tmp_path, capsys):
    experiment.main(experiment.Settings(seeds=2, steps=2, out_dir=str(tmp_path)))
    shown = capsys.readouterr().out
    assert "best of all" in shown and "seed 1: learned" in shown and "PromptPG" in shown
    assert [f.name for f in tmp_path.iterdir()] == ["collapse.png"]


def test_the_logs_of_both_trainings_become_figures(tmp_path):
    """Several runs in one figure; a log may have been stopped before its first validation."""
    def write(name: str, lines: list[dict]) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / name)
    sft = [{"step": n, "loss": 2 / n, "grad_norm": 0.5} for n in range(1, 9)]
    rl = [{"step": n, "reward": 0.5, "entropy": 1 - n / 9} for n in range(1, 9)]
    folders = [write("sft", [*sft[:-1], sft[-1] | {"val_loss": 0.3}]), write("stopped", sft),
               write("rl", [{"step": 0, "val_reward": 0.4}, *rl[:-1], rl[-1] | {"val_reward": 0.6}])]
    for chosen, figures in ((folders[:2], ["sft.png"]), (folders, ["rl.png", "sft.png"])):
        out = tmp_path / f"figures{len(chosen)}"
        experiment.main(experiment.Settings(logs=",".join(chosen), out_dir=str(out)))
        assert sorted(f.name for f in out.iterdir()) == figures
        assert all(f.read_bytes().startswith(b"\x89PNG") for f in out.iterdir())


def test_what_is_learned_is_read_off_the_table(tmp_path, capsys):
    """Four tasks, each query gets a prompt of its own: the pick tells all of the task's two bits; then one
    prompt for all, which tells nothing."""
    pool = [{"task": f"t{k}", "instruction": "Do", "input": f"p{k}", "output": "x"} for k in range(4)]
    queries = [p | {"input": f"q{i}"} for i, p in enumerate(2 * pool)]
    gaps = {name: {f"{group} minus no prompt": [2.0, 1.0, 3.0] for group in ("seen tasks", "new tasks")}
            for name in ("no prompt", "nearest", "learned")}
    table = {"queries": queries, "pool": pool, "gaps": gaps, "groups": {"seen tasks": [], "new tasks": []},
             "picks": {"nearest": [[0]] * 8, "learned": [[k] for k in range(4)] * 2},
             "rouge of each query": {"nearest": [0.5] * 8, "learned": [0.5, 1.0, 0.25] + [0.5] * 5}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    experiment.main(experiment.Settings(compared=str(tmp_path), out_dir=str(tmp_path / "figures")))
    shown = capsys.readouterr().out
    assert "for 6 of 8 queries; 4 different picks; the pick tells 2.00 of the 2.00 bits" in shown
    assert "beats the nearest prompt by 50 points: t1: Do | q1 -> x" in shown
    assert "loses to it by 25 points: t2: Do | q2 -> x\n  learned t2: Do | p2 -> x\n  nearest t0" in shown
    assert sorted(f.name for f in (tmp_path / "figures").iterdir()) == ["comparison.png", "matched.png"]
    table["picks"]["learned"] = [[3]] * 8
    (tmp_path / "table.json").write_text(json.dumps(table))
    assert experiment.what_is_learned(str(tmp_path))[0].sum(0).tolist() == [0, 0, 0, 8]
    assert "the pick tells 0.00 of the 2.00 bits" in capsys.readouterr().out
