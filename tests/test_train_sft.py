"""train_sft.py: the loss is divided rightly, a resumed run is the run, and only what should be trained is.

    pytest tests/test_train_sft.py
"""
import json
import random
import signal
from collections import Counter

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora
import model as llama
import train_sft
from data import cli, download, files
from data.instructions import TEMPLATE, join_ids, query_text, training_example
from data.samples import collate, deal, marked, micro_batches, plan_steps, related_records
from data.tokenizer import Tokenizer
from train_sft import Settings, answer_loss

SMALL = {"r": 4, "shots": 1, "batch_size": 2, "epochs": 2, "lr": 1e-2, "device": "cpu", "dtype": "float32"}
IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """run(out_dir, **changes): one tiny train_sft.main; 60 records make 30 for sft, 8 steps an epoch."""
    monkeypatch.setattr(download, "DATA", tmp_path / "data")
    monkeypatch.setattr(train_sft, "EVAL_EVERY", 5)
    (tmp_path / "data").mkdir()
    tiny.write_records(tmp_path / "mine.jsonl", tiny.records(60))
    def go(out, main=train_sft.main, **changes):
        where = {"base": str(base), "data": str(tmp_path / "mine.jsonl"), "out_dir": str(tmp_path / out)}
        main(Settings(**where | SMALL | changes))
        return tmp_path / out
    return go


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_files(one, other, name="adapter_model.safetensors") -> bool:
    return same(load_file(one / name), load_file(other / name))


# ---- the parts -------------------------------------------------------------------------------------------

def test_the_plan_depends_on_its_arguments_alone():
    """What --resume rests on; and each record is in each pass, in samples of near-equal length."""
    records = tiny.records(30)
    lengths = [30 + 7 * i % 11 for i in range(30)]
    def plan(**changes):
        random.seed(len(changes))  # the global generators must not matter
        torch.manual_seed(len(changes))
        s = Settings(**{"batch_size": 4, "shots": 2, "epochs": 2} | changes)
        return plan_steps(records, related_records(records), lengths, s.shots, s.batch_size,
                          s.epochs, s.seed)
    steps = plan()
    assert plan() == steps and plan(seed=1) != steps
    assert plan(epochs=1) == steps[:len(steps) // 2] != steps[len(steps) // 2:]
    for half in (steps[:len(steps) // 2], steps[len(steps) // 2:]):
        assert sorted(len(step) for step in half)[1:] == [4] * (len(half) - 1)
        assert {i for step in half for sample in step for i in sample} == set(range(30))
    assert {len(sample) for sample in sum(steps, [])} == {3}
    assert {len(sample) for sample in sum(plan(shots=0), [])} == {1}


def test_micro_batches_hold_to_the_tokens_and_lose_no_record():
    """A piece is filled from the longest record down, so that what is padded to its length is close to it."""
    examples = [([7] * length, [-1] * (length - 2) + [7, 8]) for length in (20, 50, 40, 70, 60, 60)]
    pieces = micro_batches(examples, 140)
    assert [tuple(ids.shape) for ids, _ in pieces] == [(2, 70), (2, 60), (2, 40)]
    assert sum((targets >= 0).sum().item() for _, targets in pieces) == 12
    assert [len(ids) for ids, _ in micro_batches(examples, 1)] == [1] * 6  # never less than one record
    assert len(micro_batches(examples, 6 * 70)) == 1
    assert micro_batches([], 140) == []  # torchrun's second process, when a step has one record


def test_a_sample_has_no_record_twice_and_mostly_one_task(monkeypatch):
    """Trap 11, in training: the answer would stand before the question, and copying it be learned."""
    records, rng = tiny.records(31), random.Random(0)
    related, own, all_samples = related_records(records), 0, []
    for _ in range(200):
        samples = deal(records, related, 4, rng)
        assert all(len(set(sample)) == len(sample) == 4 for sample in samples)
        assert len(samples) == 8  # 31 records: the last sample is filled with one that was dealt already
        all_samples += samples
    for sample in all_samples:
        tasks = Counter(records[i]["task"] for i in sample)
        own += tasks.most_common(1)[0][1] == 4
    # a record is exchanged with probability 0.1, and then half of the others are of its own task
    assert 0.7 < own / len(all_samples) < 0.9
    monkeypatch.setattr("data.samples.RELATED_SHARE", 1.0)
    samples = deal(records, related, 4, rng)
    assert all(len({records[i]["task"] for i in sample}) == 1 for sample in samples)
    assert sorted(sum(deal(records[:1], [[0]], 4, rng), [])) == [0]  # nothing to stand beside it


def test_records_without_a_task_get_prompts_that_share_their_rare_words():
    """Random ones would teach the LoRA to ignore prompts. A task that only one record has is no task."""
    texts = ["Paint the red barn", "Paint the blue barn", "Count the sheep", "Count the black sheep at night"]
    records = [{"task": "", "instruction": text, "input": "", "output": "x"} for text in texts]
    for tasks in ([""] * 4, ["a", "b", "c", "d"]):
        for record, task in zip(records, tasks, strict=True):
            record["task"] = task
        related = related_records(records)
        assert [of[0] for of in related] == [1, 0, 3, 2] and all(i not in of for i, of in enumerate(related))
    for record in records:
        record["task"] = "all"
    assert related_records(records) == [[0, 1, 2, 3]] * 4


def test_a_word_that_all_records_have_is_looked_up_50_times():
    """No two records are compared: with 52,002 records of Alpaca that took half a minute."""
    records = [{"task": "", "instruction": f"Say word{i}", "input": "", "output": "x"} for i in range(300)]
    assert all(set(of) <= set(range(50)) and len(of) == 8 for of in related_records(records))


def test_answer_loss_is_the_log_likelihood_of_the_answers(base):
    """Trap 2: EOS is inside the loss, the prompt is not, and id 0 is a token like any though it pads too."""
    tokenizer, model = Tokenizer(base), llama.load(base)
    records, wanted = tiny.records(5), 0.0
    samples = records[:2], records[2:]
    examples = [training_example(tokenizer, sample, 512) for sample in samples]
    for sample in samples:
        for n, record in enumerate(sample):
            answer = [*tokenizer.encode(record["output"]), 0]
            question = tokenizer.encode(query_text(record))
            ids, _ = join_ids(tokenizer, sample[:n], question + answer, 512)
            log_probs = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
            wanted -= sum(log_probs[t - 1, ids[t]].item() for t in range(len(ids) - len(answer), len(ids)))
    assert tokenizer.eos == 0
    assert answer_loss(model, *collate(examples)).item() == pytest.approx(wanted, rel=1e-5)


def test_the_printed_sample_shows_what_has_loss(base):
    tokenizer, [one, other] = Tokenizer(base), tiny.records(2)
    shown = marked(tokenizer, *training_example(tokenizer, [one, other], 512))
    assert shown == (f"{query_text(one)}>>>{one['output']}<EOS><<<\n\n"
                     f"{query_text(other)}>>>{other['output']}<EOS><<<")


def test_learning_rate_rises_and_falls_to_a_tenth(monkeypatch):
    monkeypatch.setattr(train_sft, "WARMUP", 0.1)
    rates = [train_sft.learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[:11] == pytest.approx([0.2 * k for k in range(1, 11)] + [2.0])
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert (rates[55], rates[100]) == pytest.approx((1.1, 0.2))  # half-way down, and the end


# ---- whole runs ------------------------------------------------------------------------------------------

def test_gradient_accumulation_is_one_large_batch(run, tmp_path, monkeypatch):
    """Trap 3: 8 micro-batches of one record give the gradient of one batch of 8, though their answers
    differ in length; a mean of the micro-batches' means does not."""
    tiny.write_records(tmp_path / "mine.jsonl", tiny.records(14))  # 8 of them for sft: an epoch is one step
    gradients, sums, clip = [], [], torch.nn.utils.clip_grad_norm_
    def spy(parameters, limit):
        gradients.append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)
    def spy_loss(model, ids, targets):
        loss = answer_loss(model, ids, targets)
        if loss.requires_grad:
            sums.append((loss.item(), (targets >= 0).sum().item()))
        return loss
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    monkeypatch.setattr(train_sft, "answer_loss", spy_loss)
    one = run("one", batch_size=8, shots=0, epochs=1, micro_tokens=10**6)
    eight = run("eight", batch_size=8, shots=0, epochs=1, micro_tokens=1)
    assert len(gradients) == 2 and len(sums) == 1 + 8
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in gradients[0]) > 1e-2
    [a], [b] = log(one), log(eight)
    assert a["loss"] == pytest.approx(b["loss"], abs=2e-4) and a["tokens"] == b["tokens"]
    mean_of_means = sum(total / n for total, n in sums[1:]) / len(sums[1:])
    assert abs(mean_of_means - a["loss"]) > 5e-3  # so the test could have told


def test_a_resumed_run_is_bitwise_the_run(run):
    """10 steps, against 5 and a resume for 5 more; across the end of an epoch (8 steps). Log lines after the
    last save (a kill came before the next) are dropped; tokens and seconds add up."""
    whole, halves = run("whole", max_steps=10), run("halves", max_steps=5)
    assert not same_files(whole, halves)
    with open(halves / "log.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 9.9}\n{"step": 7, "lo')
    run("halves", max_steps=10, resume=True)
    assert same_files(whole, halves)
    states = [load_file(folder / "state.safetensors") for folder in (whole, halves)]
    seconds = [state["progress"][2].item() for state in states]
    assert [state.pop("progress")[:2].tolist() for state in states] == [[10, log(whole)[-1]["tokens"]]] * 2
    assert same(*states) and seconds == [log(folder)[-1]["seconds"] for folder in (whole, halves)]
    keys = ("step", "loss", "lr", "grad_norm", "val_loss", "tokens")
    assert [{k: line.get(k) for k in keys} for line in log(whole)] == [
        {k: line.get(k) for k in keys} for line in log(halves)]
    assert [line["step"] for line in log(halves)] == list(range(1, 11))
    seconds = [line["seconds"] for line in log(halves)]
    assert seconds == sorted(seconds)
    assert not list(halves.glob("*.tmp"))


def test_full_run_resumes_bitwise_too(run):
    whole = run("whole", max_steps=4, full=True, lr=1e-3)
    run("halves", max_steps=2, full=True, lr=1e-3)
    halves = run("halves", max_steps=4, full=True, lr=1e-3, resume=True)
    assert same_files(whole, halves, "model.safetensors")


def ctrl_c_in_call(n):
    """answer_loss, with Ctrl-C pressed during its n-th call."""
    calls = []
    def pressed(*args):
        calls.append(1)
        if len(calls) == n:
            signal.raise_signal(signal.SIGINT)
        return answer_loss(*args)
    return pressed


@pytest.mark.parametrize("call", [1, 7])
def test_an_interrupted_run_saves_and_resumes(run, monkeypatch, capsys, call):
    """Ctrl-C in a step: the step is finished and saved, the exit status is 130, and the resumed run is the
    whole run."""
    monkeypatch.setattr(train_sft, "EVAL_EVERY", 100)
    how = {"max_steps": 10, "micro_tokens": 10**6}  # a step is one call
    whole, handler = run("whole", **how), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(train_sft, "answer_loss", ctrl_c_in_call(call))
        def through_cli(settings):
            patch.setattr(cli, "parse", lambda *_: settings)
            cli.cli(Settings, train_sft.main)
        with pytest.raises(SystemExit) as ended:
            run("broken", through_cli, **how)
    assert ended.value.code == 130 and f"stopped after step {call}," in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    assert same_files(whole, run("broken", resume=True, **how))


def test_resume_refuses_other_settings(run, capsys):
    """Without a state a run that was killed before its first save starts again; no run at all is an error."""
    out = run("out", max_steps=2)
    with pytest.raises(ValueError, match=r"state.safetensors: .* other settings \(r 4, lr 0.01\)") as error:
        run("out", resume=True, lr=1e-3, r=2)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="nothing: there is no run to resume"):
        run("nothing", resume=True)
    before = load_file(out / "adapter_model.safetensors")
    (out / "state.safetensors").unlink()
    run("out", max_steps=2, resume=True)
    assert "had not saved anything yet" in capsys.readouterr().out
    assert same(load_file(out / "adapter_model.safetensors"), before) and len(log(out)) == 2


@pytest.mark.parametrize("name, change, sentence", [
    ("progress", None, "1 tensors are missing, e.g. 'progress'"),
    ("progress", torch.zeros(2), r"tensor 'progress' is torch.float32 \[2\], but floats \[3\] are needed"),
    ("exp_avg.layers.1.mlp.down_proj.A", torch.full((4, 96), torch.nan),
     "tensor 'exp_avg.layers.1.mlp.down_proj.A' is not finite everywhere"),
    ("step.norm.weight", torch.zeros(()), r"unexpected tensor 'step.norm.weight' \(not part of it\)")])
def test_a_broken_state_is_refused_by_name(run, name, change, sentence):
    """Every tensor of the state goes through the one checker, progress as well."""
    file = run("out", max_steps=2) / "state.safetensors"
    metadata, tensors = files.read_metadata(file), load_file(file) | {name: change}
    save_file({n: t for n, t in tensors.items() if t is not None}, file, metadata)
    with pytest.raises(ValueError, match=f"state.safetensors: {sentence}; train without --resume"):
        run("out", max_steps=4, resume=True)


def test_log_is_json_lines_with_what_is_needed_to_plot(run, monkeypatch):
    monkeypatch.setattr(train_sft, "MAX_LENGTH", 200)
    lines = log(run("out", epochs=1))
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all({"loss", "lr", "grad_norm", "tokens", "seconds"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "val_loss" in line] == [5, 8]
    assert all(a["tokens"] < b["tokens"] for a, b in zip(lines, lines[1:], strict=False))


def test_training_lowers_the_loss(run):
    lines = log(run("out", epochs=6, shots=0))
    assert lines[-1]["val_loss"] < 0.8 * lines[0]["loss"]


@torch.no_grad()
@pytest.mark.parametrize("no_int8", [False, True])
def test_lora_leaves_the_base_alone_and_can_be_loaded(run, base, no_int8, monkeypatch):
    """int8 or not: after training the base's bits are what they were; load_tuned gives the trained model."""
    kept, file = [], (base / "model.safetensors").read_bytes()
    def spy(model, *args, **kwargs):
        kept.append((model, {n: t.clone() for n, t in model.state_dict().items()}))
        return lora.add_lora(model, *args, **kwargs)
    monkeypatch.setattr(train_sft, "add_lora", spy)
    with torch.enable_grad():
        out = run("out", max_steps=3, no_int8=no_int8)
    [(model, before)] = kept
    after = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()
             if not name.endswith((".A", ".B"))}
    assert same(before, after) and (base / "model.safetensors").read_bytes() == file
    assert any(t.dtype == torch.int8 for t in before.values()) != no_int8
    layers = lora.lora_layers(model)
    assert len(layers) == 2 * 7
    assert all(layer.B.abs().max() > 0 for layer in layers.values())
    tuned, _ = lora.load_tuned(base, str(out), TEMPLATE, torch.float32, "cpu")
    torch.testing.assert_close(tuned(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    assert (tuned(IDS) - llama.load(base)(IDS)).abs().max() > 0.01


def test_full_trains_all_weights_into_a_folder_of_its_own(run, base):
    """Its folder is a --base, for us and for transformers: the same logits."""
    out = run("full", full=True, lr=1e-3, max_steps=3)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (out / "adapter_model.safetensors").exists()
    run("again", base=str(out), max_steps=1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model = llama.load(out)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(IDS)), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_three_steps_equal_transformers_and_peft(run, base, tmp_path):
    """The same batches through Hugging Face's model, PEFT's LoRA and torch's AdamW, from the same A: the same
    losses and the same adapter. Nothing of ours but the batches takes part on the other side."""
    out = run("ours", no_int8=True, epochs=1, max_steps=3, shots=1, micro_tokens=500)
    s = Settings(batch_size=2, shots=1, epochs=1, lr=1e-2)
    [folder] = (tmp_path / "data").iterdir()
    records = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    start = llama.load(base)
    lora.add_lora(start, 4, 16.0, lora.ALL_LINEAR, torch.Generator().manual_seed(s.seed))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=4, lora_alpha=16.0, target_modules=list(lora.ALL_LINEAR), task_type="CAUSAL_LM"))
    with torch.no_grad():
        named = dict(theirs.named_parameters())
        for name, tensor in lora.adapter_tensors(start).items():
            named[name.replace(".weight", ".default.weight")].copy_(tensor)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.lr, betas=(0.9, 0.95), weight_decay=0.0)
    lines = log(out)
    tokenizer, related = Tokenizer(base), related_records(records)
    lengths = [len(training_example(tokenizer, [r], 512)[0]) for r in records]
    plan = plan_steps(records, related, lengths, s.shots, s.batch_size, s.epochs, s.seed)
    for line, step in zip(lines, plan, strict=False):
        answers = []  # (ids, answer's length): each answer alone, without padding, behind its prompts
        for sample in step:
            for at, i in enumerate(sample):
                answer = [*tokenizer.encode(records[i]["output"]), tokenizer.eos]
                question, before = tokenizer.encode(query_text(records[i])), [records[j] for j in sample[:at]]
                answers.append((join_ids(tokenizer, before, question + answer, 512)[0], len(answer)))
        n, total = sum(length for _, length in answers), 0.0
        for ids, length in answers:
            labels = [-100] * (len(ids) - length) + ids[-length:]
            mean = theirs(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            (mean * length / n).backward()
            total += mean.item() * length / n
        assert line["loss"] == pytest.approx(total, abs=2e-4)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3, abs=1e-3)
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.step()
        optimizer.zero_grad()
    wanted = peft.get_peft_model_state_dict(theirs)
    ours = load_file(out / "adapter_model.safetensors")
    assert ours.keys() == wanted.keys() and len(lines) == 3
    for name in ours:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-2, atol=2e-4)


def test_two_processes_are_one(run, base, tmp_path, monkeypatch):
    """torchrun with two processes: each takes half of a step's records, and the losses and the adapter are
    those of one process, but for the order in which the sums are made."""
    monkeypatch.setattr(train_sft, "EVAL_EVERY", 40)  # as in the two processes
    how = {"epochs": 6, "max_steps": 41}
    one, two = run("one", **how), tmp_path / "two"
    flags = SMALL | {"base": base, "data": tmp_path / "mine.jsonl", "out_dir": two} | how
    ended = tiny.two_processes("train_sft", tmp_path, flags)
    assert ended.stdout.count("step 41/41") == 1  # the first process speaks for both
    assert {f.name for f in two.iterdir()} == {f.name for f in one.iterdir()}
    for a, b in zip(log(one), log(two), strict=True):
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)
        assert a.get("val_loss") == pytest.approx(b.get("val_loss"), abs=2e-3)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=2e-3)
