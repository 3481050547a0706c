"""The figures: drawn from logs, from compare.py's tables and from the reward table; what they print.

    pytest tests/test_figures.py
"""
import json

import compare
import figures
import pytest


def names(folder) -> list[str]:
    """The files of a folder, all of which are PNG files."""
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in folder.iterdir())
    return sorted(f.name for f in folder.iterdir())


def test_pipeline_audit_and_collapse_need_no_run(tmp_path, monkeypatch):
    made = figures.experiment.Settings
    monkeypatch.setattr(figures.experiment, "Settings", lambda **changes: made(**{"steps": 2} | changes))
    figures.main(figures.Settings(out_dir=str(tmp_path), seeds=2))
    assert names(tmp_path) == ["audit.png", "collapse.png", "pipeline.png"]


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
    for chosen, drawn in ((folders[:2], ["sft.png"]), (folders, ["rl.png", "sft.png"])):
        out = tmp_path / f"figures{len(chosen)}"
        figures.main(figures.Settings(logs=",".join(chosen), out_dir=str(out)))
        assert names(out) == drawn


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
    figures.main(figures.Settings(compared=str(tmp_path), out_dir=str(tmp_path / "figures")))
    shown = capsys.readouterr().out
    assert "for 6 of 8 queries; 4 different picks; the pick tells 2.00 of the 2.00 bits" in shown
    assert "beats the nearest prompt by 50 points: t1: Do | q1 -> x" in shown
    assert "loses to it by 25 points: t2: Do | q2 -> x\n  learned t2: Do | p2 -> x\n  nearest t0" in shown
    assert names(tmp_path / "figures") == ["comparison.png", "matched.png"]
    table["picks"]["learned"] = [[3]] * 8
    (tmp_path / "table.json").write_text(json.dumps(table))
    assert figures.what_is_learned(tmp_path)[0].sum(0).tolist() == [0, 0, 0, 8]
    assert "the pick tells 0.00 of the 2.00 bits" in capsys.readouterr().out


def test_the_mean_of_seeds_stands_where_all_have_a_value():
    figure, [axis] = figures.panels(1)
    figures.seeds_and_mean(axis, [[(0, 1.0), (1, 3.0), (2, 5.0)], [(0, 2.0), (2, 7.0)]], figures.BLUE, "mean")
    assert [line.get_xydata().tolist() for line in axis.lines] == [
        [[0, 1], [1, 3], [2, 5]], [[0, 2], [2, 7]], [[0, 1.5], [2, 6]]]
    figures.pyplot.close(figure)


def test_rewards_by_the_share_of_wrong_prompts(tmp_path):
    """One point a share and row; a flag that is not SHARE=FOLDER is refused."""
    for share in (0, 40):
        (tmp_path / str(share)).mkdir()
        scores = {name: [0.5, 0.7, 0.9] for name in ("no prompt", "nearest", compare.LPR, "learned")}
        (tmp_path / str(share) / "table.json").write_text(json.dumps(
            {"rows": {}, "rouge of each query": scores}))
    shares = ",".join(f"{share}={tmp_path / str(share)}" for share in (0, 40))
    figures.main(figures.Settings(shares=shares, out_dir=str(tmp_path / "figures")))
    assert names(tmp_path / "figures") == ["shares.png"]
    with pytest.raises(ValueError, match="0=FOLDER"):
        figures.main(figures.Settings(shares=str(tmp_path)))
