"""sample.py at every stage of training, and its streaming.

    pytest tests/test_sample.py
"""
import contextlib
import io
import re

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import matcher as matching
import model as llama
import sample
from data.instructions import NEXT_BLOCK, TEMPLATE, answering_prompt, clean_answer
from data.tokenizer import Tokenizer
from sample import Settings, Stream

POOL = tiny.POOL
QUERY = {"instruction": "Say it louder.", "input": "a sleepy fox"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.trained(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def run(made, capsys):
    """run(**settings) -> the lines that sample.main prints."""
    base, adapter, matcher = made
    def go(**changes):
        capsys.readouterr()
        sample.main(
            Settings(
                **{
                    "prompt": QUERY["instruction"],
                    "input": QUERY["input"],
                    "base": str(base),
                    "adapter": str(adapter),
                    "matcher": str(matcher),
                    "max_new_tokens": 12,
                    "device": "cpu",
                    "dtype": "float32",
                }
                | changes
            )
        )
        return capsys.readouterr().out
    return go


def expected(made, adapter: str, exemplars: list[dict]) -> str:
    base = made[0]
    tokenizer = Tokenizer(base)
    model, _ = matching.load_tuned(base, adapter, TEMPLATE, torch.float32, "cpu")
    ids, _ = answering_prompt(tokenizer, {**QUERY, "task": "", "output": ""}, exemplars, 400)
    [answer] = llama.generate(model, [ids], 12, tokenizer.eos, tokenizer.encode(NEXT_BLOCK))
    return clean_answer(tokenizer, answer)


def shown(records):
    return [f"{r['instruction']} | {r['input']} -> {r['output']}" for r in records]


def matched(text: str) -> list[tuple[int, str]]:
    return [(int(p), line) for p, line in re.findall(r"^matched \((\d+)%\): (.*)$", text, re.MULTILINE)]


def test_nothing_trained_yet(run, made, tmp_path):
    """A fresh clone: the base answers, and both commands that would improve it are named."""
    text = run(adapter=str(tmp_path / "sft"), matcher=str(tmp_path / "rl"))
    first, second, answer = text.split("\n", 2)
    assert "python train_sft.py" in first and "python train_rl.py" in second
    assert answer == expected(made, "none", []) + "\n"


def test_adapter_and_matcher(run, made):
    """Both prompts of the stored pool, with each step's probability, and the tuned model's answer to them."""
    base, adapter, folder = made
    model, model_id = matching.load_tuned(base, str(adapter), TEMPLATE, torch.float32, "cpu")
    matcher, pool, m = matching.load(folder, model_id)
    tokenizer = Tokenizer(base)
    query, prompts = (matching.embed_records(model, tokenizer, r) for r in ([QUERY], pool))
    with torch.no_grad():
        picks, _, _ = matcher.episodes(query, prompts, m, greedy=True)
        first = matcher.episodes(query.expand(8, -1), prompts, 1, picks=torch.arange(8)[:, None])[1].exp()
        pairs = torch.tensor([[picks[0, 0], j] for j in range(8) if j != picks[0, 0]])
        second = matcher.episodes(query.expand(7, -1), prompts, 2, picks=pairs)[1].exp()
    exemplars = [pool[j] for j in picks[0]]
    text = run()
    assert [line for _, line in matched(text)] == shown(exemplars)
    # the second is a probability given the first, not of the pair
    assert [p for p, _ in matched(text)] == [round(100 * first.max().item()),
                                             round(100 * (second / second.sum()).max().item())]
    assert text.endswith("\n" + expected(made, str(adapter), exemplars) + "\n") and "python train" not in text
    assert expected(made, str(adapter), exemplars) != expected(made, str(adapter), [])


def test_no_match(run, made):
    assert run(no_match=True) == expected(made, str(made[1]), []) + "\n"
    assert run(no_match=True, adapter="none") == expected(made, "none", []) + "\n"


def test_pool_of_ones_own(run, tmp_path):
    """Also one of another size: prompts are embedded, not indexed."""
    mine = [{**r, "output": "mine " + r["output"]} for r in tiny.records(20)[8:]]
    lines = matched(run(pool=str(tiny.write_records(tmp_path / "mine.jsonl", mine))))
    assert len(lines) == 2 and all("-> mine " in line for _, line in lines)
    assert len(matched(run(pool=str(tiny.write_records(tmp_path / "one.jsonl", mine[:1])))) ) == 1
    with pytest.raises(ValueError, match="mine.jsonl:2"):
        (tmp_path / "mine.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
        run(pool=str(tmp_path / "mine.jsonl"))


def test_pool_without_a_matcher_is_matched_by_knn(run, made, tmp_path):
    base, adapter, _ = made
    model, _ = matching.load_tuned(base, str(adapter), TEMPLATE, torch.float32, "cpu")
    tokenizer = Tokenizer(base)
    query, prompts = (matching.embed_records(model, tokenizer, r) for r in ([QUERY], POOL))
    nearest = [POOL[j] for j in matching.knn(query, prompts, 3)[0]]
    text = run(matcher=str(tmp_path / "rl"), pool=str(tiny.write_records(tmp_path / "p.jsonl", POOL)), m=3)
    assert [line for _, line in matched(text)] == shown(nearest) and "nearest" in text.split("\n")[0]


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
    with pytest.raises(ValueError, match="train again"):
        run(adapter="none")  # its embeddings are others


def test_interactive_loop(run, monkeypatch):
    """Instruction, input, answer, and again; ends at an empty instruction or at the end of the input."""
    alone = run(no_match=True)
    for end in ("", EOFError):
        typed = iter(["Say it louder.", "a sleepy fox", " Say it louder. ", "a sleepy fox", end, "too late"])
        def answer(_prompt, typed=typed):
            line = next(typed)
            if line is EOFError:
                raise EOFError
            return line
        monkeypatch.setattr("builtins.input", answer)
        assert run(prompt="", no_match=True).split("\n", 1)[1] == alone * 2
        assert next(typed) == "too late"


def test_sampling_repeats_with_its_seed(run):
    hot = {"temperature": 1.0, "no_match": True, "num_samples": 2}
    first = run(**hot)
    assert run(**hot) == first != run(**hot, seed=1)
    one = run(temperature=1.0, no_match=True)
    assert first.startswith(one) and first != 2 * one  # the second sample is another one
    assert run(temperature=1.0, top_k=1, no_match=True) == run(no_match=True) == run(
        temperature=1.0, top_p=1e-6, no_match=True)


# ---- streaming ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(made):
    return Tokenizer(made[0])


def streamed(tokenizer, ids) -> tuple[str, list[str]]:
    """(all that was printed, what stood there after each token)"""
    out, states = io.StringIO(), []
    with contextlib.redirect_stdout(out):
        stream = Stream(tokenizer)
        for token in ids:
            stream(0, token)
            states.append(out.getvalue())
        stream.end()
    return out.getvalue(), states


def test_stream_holds_back_the_next_block_and_half_characters(tokenizer):
    text = "Größe: 😀 #1\n\n### In short\n\n### Instruction:\nthe next"
    ids = tokenizer.encode(text) + [tokenizer.eos]
    assert len(ids) > len("Größe: 😀")  # four bytes of the face, four tokens
    printed, states = streamed(tokenizer, ids)
    assert printed == "Größe: 😀 #1\n\n### In short\n"
    assert all(printed.startswith(state) and "\ufffd" not in state for state in states)
    assert "Größe: 😀" in states and len(set(states)) > 8  # it does grow


pieces = st.lists(
    st.sampled_from(
        [
            "a",
            " ",
            "\n",
            "\n\n",
            "#",
            "###",
            "### Inst",
            "ruction",
            "é",
            "😀",
            "\u2003",
            "### Instruction",
            "<eos>",
        ]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=pieces, cut=st.integers(0, 5))
def test_streamed_text_is_the_final_answer(tokenizer, text, cut):
    ids = tokenizer.encode(text)
    ids = ids[:len(ids) - cut]  # max_new_tokens may end an answer in the middle of a character
    assert streamed(tokenizer, ids)[0] == clean_answer(tokenizer, ids) + "\n"


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 269), max_size=30))
def test_streamed_text_is_the_final_answer_for_any_tokens(tokenizer, ids):
    """Also for bytes that are no UTF-8 at all, as an untuned model may give."""
    assert streamed(tokenizer, ids)[0] == clean_answer(tokenizer, ids) + "\n"
