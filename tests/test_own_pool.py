"""own_pool.py: the example pool and its queries as they should be, and the script on a tiny model.

    pytest tests/test_own_pool.py
"""
import json
from collections import Counter

import own_pool
import tiny

from data.download import DATA
from data.records import read_records


def test_the_example_pool_and_its_queries():
    """Four prompts and three queries of each kind. No query is in the pool, and no answer can be copied."""
    pool, queries = (read_records(DATA / f"example_{name}.jsonl") for name in ("pool", "queries"))
    assert set(Counter(p["task"] for p in pool).values()) == {4}
    assert set(Counter(q["task"] for q in queries).values()) == {3}
    assert {p["task"] for p in pool} == {q["task"] for q in queries} > set(own_pool.STYLED)
    for field in ("input", "output"):
        texts = [r[field].lower() for r in pool + queries]
        assert len(set(texts)) == len(texts) == 84


def test_points_and_kinds():
    entries = [{"exact": True, "rouge": 1.0}, {"exact": False, "rouge": 0.5}]
    assert own_pool.points(entries) == {"right": 1, "of": 2, "ROUGE-L": 75.0}
    assert own_pool.points([]) == {"right": 0, "of": 0, "ROUGE-L": 0.0}
    pool = [{"task": task} for task in "abab"]
    assert own_pool.of_kind([{"task": "b"}, {"task": "c"}], pool, 1) == [[1], []]
    assert own_pool.of_kind([{"task": "a"}], pool, 3) == [[0, 2]]


def test_the_script(tmp_path, capsys):
    base, adapter, matcher = tiny.trained(tmp_path)
    (tmp_path / "out").mkdir()
    tiny.write_records(tmp_path / "pool.jsonl", tiny.records(8))
    tiny.write_records(tmp_path / "queries.jsonl", tiny.records(12)[8:])
    own_pool.main(own_pool.Settings(
        base=str(base), adapter=str(adapter), matcher=str(matcher), pool=str(tmp_path / "pool.jsonl"),
        queries=str(tmp_path / "queries.jsonl"), out_dir=str(tmp_path / "out"), max_new_tokens=4,
        device="cpu"))
    rows = json.loads((tmp_path / "out" / "own_pool.json").read_text())["rows"]
    assert list(rows) == ["no prompt", "1 nearest", "2 nearest", "1 learned", "2 learned", "1 of the kind",
                          "2 of the kind", "3 of the kind"]
    assert all([part["of"] for part in row] == [4, 0, 4] for row in rows.values())
    out = capsys.readouterr().out
    assert out.count(" learned minus ") == 2
    assert out.count("wrong, ") + out.count("right, ") >= 8 * 4 and "loud: Say it" in out
