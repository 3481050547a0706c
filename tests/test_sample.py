"""sample.py at every stage of training, and its streaming.

    pytest tests/test_sample.py
"""
import contextlib
import io
import json
import math
import re
import shutil

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import matcher as matching
import model as llama
import sample
from data import cli
from data.instructions import TEMPLATE, at_next_block, clean_answer, join_ids, query_text
from data.tokenizer import Tokenizer
from lora import load_tuned
from sample import Settings, Stream

POOL = tiny.POOL
QUERY = {"task": "", "instruction": "Say it louder.", "input": "a sleepy fox", "output": ""}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.trained(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def tuned(made):
    """(tokenizer, base + adapter, its id)"""
    return Tokenizer(made[0]), *load_tuned(made[0], str(made[1]), TEMPLATE, torch.float32, "cpu")


@pytest.fixture
def run(made, capsys, monkeypatch):
    """run(**settings) -> what sample.main prints."""
    monkeypatch.setattr(sample, "pick_device", lambda device: ("cpu", torch.float32))  # bf16 would round
    settings = {"prompt": QUERY["instruction"], "input": QUERY["input"], "max_new_tokens": 12}
    settings |= {key: str(folder) for key, folder in zip(("base", "adapter", "matcher"), made, strict=True)}
    def go(**changes):
        capsys.readouterr()
        unused = {"matcher": Settings.matcher} if changes.get("no_match") else {}  # or a line would say so
        sample.main(Settings(**settings | unused | changes))
        return capsys.readouterr().out
    return go


def answer_ids(tokenizer, model, prompts: list[dict]) -> list[int]:
    ids, _ = join_ids(tokenizer, prompts, tokenizer.encode(query_text(QUERY)), 400)
    return llama.generate(model, [ids], 12, tokenizer.ends, lambda ids: at_next_block(tokenizer, ids))[0]


def expected(tokenizer, model, prompts: list[dict]) -> str:
    return clean_answer(tokenizer, answer_ids(tokenizer, model, prompts)) + "\n"


def shown(records):
    return [f"{r['instruction']} | {r['input']} -> {r['output']}" for r in records]


def matched(text: str) -> list[tuple[int, str]]:
    """(probability in % of a trained matcher's pick, or 0; the prompt) for each prompt shown."""
    lines = re.findall(r"^(?:matched with probability (\d+)%|nearest): (.*)$", text, re.MULTILINE)
    return [(int(p or 0), line) for p, line in lines]


def test_nothing_trained_yet(run, made, tuned, tmp_path):
    """A fresh clone: the base answers, and the output names both commands that would improve it."""
    text = run(adapter=str(tmp_path / "sft"), matcher=str(tmp_path / "rl"))
    first, second, answer = text.split("\n", 2)
    assert "python train_sft.py" in first and "python train_rl.py" in second
    assert first.endswith(f" --out_dir {tmp_path / 'sft'})")
    assert second.endswith(f" --adapter {tmp_path / 'sft'} --out_dir {tmp_path / 'rl'})")
    assert answer == expected(tuned[0], llama.load(made[0]), [])


def test_adapter_and_matcher(run, made, tuned):
    """Two prompts of the stored pool, each with the probability of its step, and the tuned model's answer."""
    tokenizer, model, model_id = tuned
    matcher, pool, m = matching.load(made[2], model_id)
    query = matching.embed_records(model, tokenizer, [QUERY])
    def probabilities(picks):  # of whole episodes
        return matcher.act(query.expand(len(picks), -1), picks.size(1), picks)[1].sum(1).exp()
    with torch.no_grad():
        picks, _, _ = matcher.act(query, m, greedy=True)
        first = probabilities(torch.arange(8)[:, None])
        second = probabilities(torch.tensor([[picks[0, 0], j] for j in range(8) if j != picks[0, 0]]))
    prompts = [pool[j] for j in picks[0]]
    text = run()
    assert [line for _, line in matched(text)] == shown(prompts)
    # the second is a probability given the first, not of the pair
    assert [p for p, _ in matched(text)] == [round(100 * first.max().item()),
                                             round(100 * (second / second.sum()).max().item())]
    assert text.endswith("\n" + expected(tokenizer, model, prompts)) and "python train" not in text
    assert expected(tokenizer, model, prompts) != expected(tokenizer, model, [])


def test_no_match(run, made, tuned):
    assert run(no_match=True) == expected(*tuned[:2], [])
    assert run(no_match=True, adapter="none") == expected(tuned[0], llama.load(made[0]), [])


def test_each_end_of_a_chat_model_ends_the_answer(run, made, tuned, tmp_path):
    """Its generation_config.json often has more of them than config.json."""
    tokenizer, model, _ = tuned
    ids = answer_ids(tokenizer, model, [])
    cut = next(i for i in range(3, 12) if ids[i] not in ids[:i])
    base = shutil.copytree(made[0], tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids[cut]]}))
    text = run(base=str(base), no_match=True)
    assert text == clean_answer(tokenizer, ids[:cut]) + "\n" != expected(tokenizer, model, [])


def test_pool_of_ones_own(run, tmp_path):
    """It may have another size: prompts are embedded, not numbered."""
    file = tmp_path / "mine.jsonl"
    mine = [{**r, "output": "mine " + r["output"]} for r in tiny.records(20)[8:]]
    lines = matched(run(pool=str(tiny.write_records(file, mine))))
    assert len(lines) == 2 and all("-> mine " in line for _, line in lines)
    assert len(matched(run(pool=str(tiny.write_records(file, mine[:1]))))) == 1
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    with pytest.raises(ValueError, match="mine.jsonl:2"):
        run(pool=str(file))


@pytest.mark.parametrize("folder", ["none", "no/such/folder"])
def test_a_pool_without_a_matcher_gives_the_nearest_prompts(run, tuned, tmp_path, folder):
    tokenizer, model, _ = tuned
    query, prompts = (matching.embed_records(model, tokenizer, r) for r in ([QUERY], POOL))
    nearest = [POOL[j] for j in matching.nearest(query, prompts, 3)[0]]
    text = run(matcher=folder, pool=str(tiny.write_records(tmp_path / "p.jsonl", POOL)), m=3)
    assert [line for _, line in matched(text)] == shown(nearest) and "nearest" in text.split("\n")[0]
    assert "--out_dir none" not in text


def test_m_is_the_trained_one_unless_given(run):
    lines = [matched(run(m=m)) for m in (0, 1, 2, 3, 99)]
    assert [len(x) for x in lines] == [2, 1, 2, 3, 8]
    assert lines[0] == lines[2] and lines[1][0] == lines[0][0]


def test_a_full_context_leaves_the_farthest_prompts_out(run):
    text = run(m=8, max_new_tokens=350)  # 512 - 350 tokens hold the query and two blocks at most
    left = int(re.search(r"the first (\d+) matched prompts are left out", text)[1])
    assert 5 < left <= 8
    with pytest.raises(ValueError, match="shorten"):
        run(input="fox " * 400)


def test_matcher_of_another_model_is_refused(run):
    with pytest.raises(ValueError, match="train it again"):
        run(adapter="none")  # its embeddings are others


def typing(monkeypatch, *lines) -> list:
    """input() gives these lines, or raises one of them; what is not read stays in the list."""
    left = list(lines)
    def read(_prompt=""):
        if isinstance(line := left.pop(0), str):
            return line
        raise line
    monkeypatch.setattr("builtins.input", read)
    return left


@pytest.fixture
def terminal(monkeypatch):
    """Input comes from a terminal, in which nothing more waits to be read."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    waits = []
    monkeypatch.setattr(cli.select, "select", lambda *_: [waits.pop() if waits else []])
    return waits


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("end", ["", EOFError])
def test_interactive_loop(run, monkeypatch, end):
    """Instruction, input, answer, and again; an empty instruction or the end of the input ends it."""
    alone = run(no_match=True)
    typed = ("Say it louder.", "a sleepy fox", " Say it louder. ", "a sleepy fox", end, "too late")
    left = typing(monkeypatch, *typed)
    assert run(prompt="", input="", no_match=True).split("\n", 1)[1] == alone * 2 and left == ["too late"]


@pytest.mark.usefixtures("terminal")
def test_a_bad_line_or_ctrl_c_does_not_end_the_session(run, monkeypatch):
    """A line that is too long, Ctrl-C while it answers, Ctrl-D instead of an input."""
    alone, plain = run(no_match=True), run(no_match=True, input="")
    pressed, answering = [KeyboardInterrupt], sample.generate
    def generate(*args, **how):
        if pressed:
            raise pressed.pop()
        return answering(*args, **how)
    monkeypatch.setattr(sample, "generate", generate)
    asked = ["Say it louder.", "a sleepy fox"]
    left = typing(monkeypatch, "fox " * 600, "", *asked, *asked, asked[0], EOFError, "", "too late")
    text = run(prompt="", input="", no_match=True).split("\n", 1)[1]
    long, _, rest = text.partition("\n")
    assert "shorten it, or lower --max_new_tokens" in long and left == ["too late"]
    assert rest == "\n(stopped; an empty instruction ends)\n" + alone + plain


def test_a_text_that_was_pasted_is_one(monkeypatch, terminal):
    typing(monkeypatch, "Say it.", "a", "", "b", "")
    terminal += [[], [1], [1], []]  # is more waiting: after the instruction, then in the input
    assert next(cli.typed()) == ("Say it.", "a\n\nb")


def test_a_pipe_is_answered_line_by_line(run, monkeypatch):
    """The last line may lack its end, and a blank one is no question."""
    one = run(no_match=True, input="")
    monkeypatch.setattr("sys.stdin", io.StringIO("Say it louder.\n\n  Say it louder."))
    assert run(prompt="", input="", no_match=True) == one * 2


def test_flags_without_effect_are_said(run, tmp_path):
    file = str(tiny.write_records(tmp_path / "pool.jsonl", POOL[:3]))
    assert run(pool=file, m=5).count("(m = 5, but the pool has 3 prompts: all are taken)\n") == 1
    assert "(--matcher, --pool, --m: without effect with --no_match)\n" in run(
        matcher="nope", pool="nope", m=5, no_match=True)
    assert "(--top_k, --top_p: without effect at --temperature 0)\n" in run(top_k=3, top_p=0.5)
    assert "(--m: without effect without a matcher or --pool)\n" in run(matcher="none", m=2)
    with pytest.raises(ValueError, match="--input is given without --prompt; give both"):
        run(prompt="")


@pytest.mark.usefixtures("terminal")
def test_drawn_answers_differ_and_a_run_repeats_them(run, monkeypatch):
    hot = {"temperature": 1.0, "no_match": True}
    one = run(**hot)
    assert run(**hot) == one != run(no_match=True)
    typing(monkeypatch, *["Say it louder.", "a sleepy fox"] * 2, "")
    answers = run(prompt="", input="", **hot).split("\n", 1)[1]
    assert answers.startswith(one) and answers != 2 * one  # one generator draws all answers of a run


def test_draws_that_leave_one_token_are_greedy(run):
    greedy = run(no_match=True)
    assert run(temperature=1.0, top_k=1, no_match=True) == greedy
    assert run(temperature=1.0, top_p=1e-6, no_match=True) == greedy
    with pytest.raises(ValueError, match="--top_p 1.5 must be at most 1"):
        run(top_p=1.5)


def test_a_temperature_near_zero_counts_as_a_hundredth():
    """Logits divided by 1e-39 would be infinite."""
    logits = torch.tensor([[0.0, 0.01, 0.005]]).expand(3000, -1)
    cold, coldest = (sample.draw(logits, Settings(temperature=t), torch.Generator().manual_seed(0))
                     for t in (0.01, 1e-39))
    assert torch.equal(cold, coldest)
    assert (cold == 0).float().mean().item() == pytest.approx(1 / (1 + math.e + math.e**0.5), abs=0.03)


# ---- streaming -------------------------------------------------------------------------------------------

def streamed(tokenizer, ids) -> tuple[str, list[str]]:
    """(all that it prints, what stands there after each token)"""
    out, states = io.StringIO(), []
    with contextlib.redirect_stdout(out):
        stream = Stream(tokenizer)
        for token in ids:
            stream(0, token)
            states.append(out.getvalue())
        stream.end()
    return out.getvalue(), states


def test_stream_holds_back_the_next_block_and_half_characters(tuned):
    tokenizer, *_ = tuned
    text = "Größe: 😀 #1\n\n### In short\n\n### Instruction:\nthe next"
    ids = tokenizer.encode(text) + [tokenizer.eos]
    assert len(ids) > len("Größe: 😀")  # four bytes of the face, four tokens
    printed, states = streamed(tokenizer, ids)
    assert printed == "Größe: 😀 #1\n\n### In short\n"
    assert all(printed.startswith(state) and "\ufffd" not in state for state in states)
    assert "Größe: 😀" in states and len(set(states)) > 8  # it does grow


PIECES = ["a", " ", "\n", "\n\n", "#", "###", "### Inst", "ruction", "é", "😀", "\u2003", "### Instruction",
          "<eos>", ":\n", "s"]


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join), cut=st.integers(0, 5))
def test_streamed_text_is_the_final_answer(tuned, text, cut):
    ids = tuned[0].encode(text)
    ids = ids[:len(ids) - cut]  # max_new_tokens may end an answer in the middle of a character
    assert streamed(tuned[0], ids)[0] == clean_answer(tuned[0], ids) + "\n"


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 269), max_size=30))
def test_streamed_text_is_the_final_answer_for_any_tokens(tuned, ids):
    """An untuned model may also give bytes that are not UTF-8."""
    assert streamed(tuned[0], ids)[0] == clean_answer(tuned[0], ids) + "\n"
