"""Long and odd runs, equal bytes from equal runs, text that nobody trusts, and what a run touches.

    pytest tests/test_odd_runs.py
"""
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import matcher as matching
import sample
import train_rl
import train_sft
from data import base_model, download, prepare
from data.instructions import TEMPLATE, join_ids, query_text, training_example
from data.runs import read_rewards
from data.tokenizer import Tokenizer

MODEL = {"base": "base", "device": "cpu"}
PLAIN = MODEL | {"data": "mine.jsonl", "dtype": "float32"}
FEW = {"steps": 2, "queries": 4, "samples": 3, "lr": 0.05, "max_new_tokens": 4, "test_queries": 4}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a tiny base and 60 records, in which the scripts keep their data."""
    tiny.build(tiny.with_data(tmp_path) / "base")
    for where, name, value in ((download, "DATA", tmp_path / "data"), (train_sft, "EVAL_EVERY", 2),
                               (train_rl, "EVAL_EVERY", 1), (train_rl, "VAL_QUERIES", 3)):
        monkeypatch.setattr(where, name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sft(out="sft", **changes) -> Path:
    how = {"out_dir": out, "batch_size": 1, "max_steps": 4, "lr": 1e-2, "r": 2}
    train_sft.main(train_sft.Settings(**PLAIN | how | changes))
    return Path(out)


def rl(out="rl", **changes) -> Path:
    Path(out).mkdir(parents=True, exist_ok=True)  # as data.cli.cli does
    train_rl.main(train_rl.Settings(**PLAIN | FEW | {"out_dir": out, "adapter": "none"} | changes))
    return Path(out)


def ask(prompt: str, **changes) -> None:
    how = {"adapter": "none", "matcher": "none", "max_new_tokens": 2}
    sample.main(sample.Settings(prompt=prompt, **MODEL | how | changes))


def rewards(folder: Path) -> list[dict]:
    return [entry for line in (folder / "rewards.jsonl").open() for entry in json.loads(line)]


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- a loss that goes wrong ------------------------------------------------------------------------------

def spoiled(how, call: int):
    """answer_loss, spoiled by how(loss, model) in its n-th call with a gradient."""
    calls, answer_loss = [], train_sft.answer_loss
    def spoil(model, *batch):
        loss = answer_loss(model, *batch)
        calls.extend([1] if loss.requires_grad else [])
        return how(loss, model) if loss.requires_grad and len(calls) == call else loss
    return spoil


def steep(loss, model):
    """The same loss, with a gradient that is no number: d sqrt(x) / dx at 0."""
    return loss + torch.sqrt(0 * model.layers[0].self_attn.q_proj.B.sum())


@pytest.mark.parametrize("how, words", [
    (lambda loss, _: loss * float("nan"), "step 4: the loss is nan"),
    (lambda loss, _: loss * float("inf"), "step 4: the loss is inf"),
    (steep, "the gradient's norm nan"),  # the loss alone would not tell, and the adapter would be NaN
])
def test_a_loss_that_is_no_number_stops_and_the_last_save_stays(home, monkeypatch, how, words):
    kept = {path.name: path.read_bytes() for path in sft("two", max_steps=2, micro_tokens=10**6).iterdir()}
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=words) as error:
        patch.setattr(train_sft, "answer_loss", spoiled(how, 4))
        sft("out", micro_tokens=10**6)
    assert str(error.value).startswith("step 4: ") and "the last good save is in out" in str(error.value)
    assert Path("out/adapter_model.safetensors").read_bytes() == kept["adapter_model.safetensors"]
    assert load_file("out/state.safetensors")["progress"][0] == 2
    assert [line["step"] for line in log(Path("out"))] == [1, 2, 3]
    again = [sft(out, micro_tokens=10**6) / "adapter_model.safetensors" for out in ("whole", "out")]
    assert again[0].read_bytes() == again[1].read_bytes()  # a fresh run in the same folder


def test_rl_stops_at_a_reward_that_is_no_number(home, monkeypatch):
    factors, rewards = iter((1, math.nan)), train_rl.Environment.rewards  # the first validation is well
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="^step 1: the loss is nan; lower"):
        patch.setattr(train_rl.Environment, "rewards", lambda *args: rewards(*args) * next(factors))
        rl()
    assert json.loads(Path("rl/matcher.json").read_text())["step"] == 0
    matcher, _, _ = matching.load("rl", base_model.fingerprint("base"))
    assert all(tensor.isfinite().all() for tensor in matcher.state_dict().values())


def test_a_spike_is_clipped_and_logged(home, monkeypatch):
    """The log has the norm as it was; the step was made with a gradient of norm 1."""
    made, step = [], torch.optim.AdamW.step
    def spy(self):
        squares = [p.grad.pow(2).sum().item() for group in self.param_groups for p in group["params"]]
        made.append(math.sqrt(sum(squares)))
        return step(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(train_sft, "answer_loss", spoiled(lambda loss, _: loss * 1e6, 3))
    norms = [line["grad_norm"] for line in log(sft(micro_tokens=10**6))]
    assert norms[2] > 1e4 * max(norms[0], norms[1])
    assert made == pytest.approx([min(norm, 1.0) for norm in norms], rel=1e-3)


# ---- sizes -----------------------------------------------------------------------------------------------

def test_answers_of_one_token(home):
    """In training one token and EOS, in a rollout one token alone."""
    records = [r | {"output": "a"} for r in tiny.records(60)]
    tiny.write_records(Path("mine.jsonl"), records)
    assert sum(t >= 0 for t in training_example(Tokenizer("base"), records[:1], 512)[1]) == 2
    lines = log(sft(max_steps=8))
    assert lines[-1]["val_loss"] < lines[1]["val_loss"]
    answers = [entry["answer"] for entry in rewards(rl(adapter="sft", max_new_tokens=1))]
    assert len(answers) > 20 and all(len(answer) <= 3 for answer in answers)


def test_a_pool_of_10_000(home, capsys):
    """Embedded, matched and shown: the query's twin is the nearest of them."""
    pool = tiny.records(10_000)
    tiny.write_records(Path("pool.jsonl"), pool)
    query = pool[7345]
    ask(query["instruction"], input=query["input"], pool="pool.jsonl")
    assert f"{query['instruction']} | {query['input']} -> {query['output']}\n" in capsys.readouterr().out


def test_10_000_known_rewards(home, capsys):
    """They are read back, each once, and the run that they belong to asks for nothing."""
    file = rl() / "rewards.jsonl"
    entry = rewards(file.parent)[0]
    with file.open("a") as more:
        more.writelines(json.dumps([entry | {"key": f"{i + k:024x}", "left": 0} for k in range(32)]) + "\n"
                        for i in range(0, 10_000, 16))  # each of them stands there twice
    size, known = file.stat().st_size, len({entry["key"] for entry in rewards(file.parent)})
    rl()
    assert known > 10_000 and f"{known} rewards known from earlier runs" in capsys.readouterr().out
    assert file.stat().st_size == size


GOOD = {"key": "a", "rouge": 1, "semantic": 1, "exact": 1, "prompt_tokens": 1}


@pytest.mark.parametrize("line", [
    "5", "null", "[]", '{"key": []}', '[{"key": "a"}]', "[[]]", "[" * 5000, "\xff\xfe", "", json.dumps(GOOD),
    *(json.dumps([GOOD, GOOD | {"rouge": value}]) for value in (math.nan, "1", 10**400))])
def test_lines_that_are_no_reward_are_skipped(home, line):
    file = rl() / "rewards.jsonl"
    matcher, before = Path("rl/matcher.safetensors").read_bytes(), file.read_bytes()
    file.write_bytes(line.encode("latin-1") + b"\n" + before)
    assert "a" not in read_rewards(file)  # one bad entry spoils its batch
    rl()
    assert Path("rl/matcher.safetensors").read_bytes() == matcher
    assert file.read_bytes() == line.encode("latin-1") + b"\n" + before  # nothing was asked again


# ---- the same run, the same bytes ------------------------------------------------------------------------

def test_the_same_run_gives_the_same_bytes(home, monkeypatch):
    """Twice, and with evaluation or without: evaluating draws nothing and changes nothing."""
    files, runs = ("adapter_model.safetensors", "adapter_config.json", "nanopillow.json"), []
    for n, every in enumerate((2, 2, 1, 1000)):
        monkeypatch.setattr(train_sft, "EVAL_EVERY", every)
        runs.append(sft(f"sft{n}"))
    assert len({tuple((run / name).read_bytes() for name in files) for run in runs}) == 1
    assert (sft("other", seed=1) / files[0]).read_bytes() != (runs[0] / files[0]).read_bytes()
    runs = [rl(f"rl{n}") for n in range(2)]
    for name in ("matcher.safetensors", "matcher.json", "rewards.jsonl", "table.json"):
        ours, theirs = ((run / name).read_text(errors="replace").replace(run.name, "rl") for run in runs)
        assert ours == theirs, name


@pytest.mark.parametrize("train, module, output", [
    (sft, train_sft, "nanopillow.json"), (rl, train_rl, "matcher.json")])
def test_the_record_of_a_run(home, train, module, output):
    """Enough to make it again: settings, versions, commit, and what every file was."""
    out = train()
    run = json.loads((out / "run.json").read_text())
    assert module.Settings(**run["settings"]).seed == 1337 and run["settings"]["data"] == "mine.jsonl"
    assert run["versions"]["torch"] == torch.__version__ and "python" in run["versions"]
    stored = json.loads((out / output).read_text())
    assert run["base_id"] in (stored.get("base_id"), stored.get("model_id"))
    assert set(run["commit"]) <= set("0123456789abcdef-dirty")
    [folder] = Path("data").iterdir()
    assert run["data"] == {path.name: prepare.sha256(path.read_bytes()).hexdigest()
                           for path in folder.iterdir()} and len(run["data"]) == 5


@pytest.mark.parametrize("change", ["records", "base weights"])
def test_resume_refuses_other_records_or_another_base_under_the_same_name(home, change):
    sft(max_steps=2)
    if change == "records":
        [folder] = Path("data").iterdir()
        tiny.write_records(folder / "sft.jsonl", tiny.records(90)[60:])
    else:
        tiny.build(home / "base", seed=1)
    with pytest.raises(ValueError, match=f"other settings \\({change}"):
        sft(resume=True)


# ---- text that nobody trusts -----------------------------------------------------------------------------

def test_a_control_token_in_a_text_is_text(home, capsys, monkeypatch):
    """In a record, a prompt of the pool, an input: never the token that ends an answer (id 0 here)."""
    record = {"task": "", "instruction": "Say <eos> it.", "input": "<eos>", "output": "a<eos>b"}
    tokenizer = Tokenizer("base")
    ids, targets = training_example(tokenizer, [record, record], 512)
    assert 0 not in ids and targets.count(0) == 2 and targets[-1] == 0
    assert tokenizer.decode([t for t in targets if t > 0]) == 2 * "a<eos>b"
    ids, _ = join_ids(tokenizer, [record], tokenizer.encode(query_text(record)), 512)
    assert 0 not in ids and tokenizer.decode(ids).count("<eos>") == 5
    tiny.write_records(Path("pool.jsonl"), [record])
    asked, answer = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a, **how: asked.extend(a[1]) or answer(*a, **how))
    ask("<eos>", input="<eos><eos>", pool="pool.jsonl")
    [ids] = asked
    assert 0 not in ids and tokenizer.decode(ids).count("<eos>") == 6
    assert "a<eos>b" in capsys.readouterr().out


# ---- what a run touches ----------------------------------------------------------------------------------

def test_a_run_opens_no_socket_and_writes_only_to_data_and_out(home):
    """Training, matching and asking, once the model is there: all that Python opens, renames or removes."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:  # an audit hook stays for the life of its process
        touched = []
        def watch(event, args):
            if event.startswith(("socket.", "urllib.", "http.", "ssl.", "os.system", "pickle.")):
                touched.append(f"{event} {args}")
            if event == "subprocess.Popen" and args[1][0] != "git":  # which commit: for run.json
                touched.append(f"{event} {args}")
            writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
            if event == "open":
                writes = set(str(args[1])) & set("wax+") or args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes:
                place = os.path.abspath(os.fsdecode(args[0])) if not isinstance(args[0], int) else ""
                own = (str(home / "data"), str(home / "out"), os.devnull, "")
                # PyTorch's compiler, which an optimiser imports, makes itself an empty folder
                passing = "__pycache__" in place or "torchinductor" in place
                if not (place.startswith(own[:2]) or place in own or passing):
                    touched.append(f"{event} {args}")
        try:
            sys.stdout = open(os.devnull, "w")
            sys.addaudithook(watch)
            sft("out/sft")
            rl("out/rl", adapter="out/sft")
            ask("Say it.", adapter="out/sft", matcher="out/rl")
        except BaseException as error:
            touched.append(repr(error))
        os.write(writer, json.dumps(touched).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file, suppress(ChildProcessError):
        touched = json.loads(file.read())
        os.waitpid(child, 0)
    assert touched == []
    assert {path.name for path in home.iterdir()} == {"base", "data", "mine.jsonl", "out"}
    assert TEMPLATE in Path("out/sft/nanopillow.json").read_text()  # it did run
