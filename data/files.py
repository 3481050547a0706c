"""Plumbing: files that are read with checks and written whole. The method is elsewhere.

Two promises that every other file relies on:
- Reading: a broken, hostile or wrong file ends in one sentence that names the file and the field or tensor.
- Writing: a file is complete or absent. A killed run or a full disk never leaves half of one.

Only JSON and safetensors are read: neither can run code, a pickle could.
"""
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows has no such locks: do not start two runs in one folder there
    fcntl = None

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # fp8 needs scales from elsewhere


# ---- JSON ------------------------------------------------------------------------------------------------

def check_fields(content: dict, file: Path | str, **kinds: type) -> dict:
    """Returns `content`; ValueError if a field is missing or of another kind. Numbers must be above 0 and not
    absurd: a model of a billion layers would be built before its first tensor is missed."""
    for field, kind in kinds.items():
        value, is_number = content.get(field), kind in (int, float)
        valid = isinstance(value, (int, float) if kind is float else kind)
        valid &= kind is bool or not isinstance(value, bool)  # Python counts True as an int
        if not valid or is_number and not 0 < value < (1 << 24 if kind is int else 1e18):
            wanted = "a number above 0" if is_number else getattr(kind, "__name__", kind)
            found = json.dumps(value)[:60] if field in content else "missing"
            raise ValueError(f"{file}: field '{field}' must be {wanted}, but it is {found}; fetch or make "
                             "this file again.")
    return content


def check_supported(content: dict, file: Path | str, remedy: str, **choices: Iterable) -> None:
    """ValueError if a field asks for what we do not do. Absent, null, false and empty mean "not used"."""
    for field, allowed in choices.items():
        if content.get(field) not in (None, False, [], {}, *allowed):
            raise ValueError(f"{file}: {field} = {content[field]} is not supported; {remedy}.")


def read_json(file: Path, **kinds: type) -> dict:
    """The JSON object in `file`, its fields checked. FileNotFoundError or ValueError in one sentence."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; check that {file.parent} is the right folder.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); fetch or make this file again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must be a JSON object, but it is a {type(content).__name__}; fetch or "
                         "make this file again.")
    return check_fields(content, file, **kinds)


# ---- safetensors -----------------------------------------------------------------------------------------

@contextmanager
def open_tensors(path: Path) -> Iterator:
    """safe_open's handle. FileNotFoundError or ValueError in one sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; check that {path.parent} is the right folder.")
    try:
        with safe_open(path, "pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{path}: broken safetensors file ({error}); fetch or make it again.") from None


def read_metadata(path: Path) -> dict[str, str]:
    with open_tensors(path) as handle:
        return handle.metadata() or {}


def read_tensors(paths: Iterable[Path], wanted: Mapping[str, Tensor], remedy: str,
                 optional: Iterable[str] = (), prefix: str = "",
                 dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) for each wanted tensor, one at a time; `wanted` gives the shapes.

    This is the one check of everything we load. ValueError names the file and the tensor if one is missing,
    unexpected, there twice, of another shape, not floats or not finite. `prefix` is taken off names; an
    `optional` tensor may be missing. dtype: of the tensors yielded (default: as in the file).
    """
    missing, path = dict.fromkeys(wanted), Path()
    for path in paths:
        with open_tensors(path) as handle:
            names = list(handle.keys())
        for first in range(0, len(names), 16):
            # Opened anew for each 16 tensors: pages of a mapped file stay in memory until it is closed.
            with open_tensors(path) as handle:
                for full_name in names[first:first + 16]:
                    name = full_name.removeprefix(prefix)
                    if name not in missing:
                        twice = "twice in these files" if name in wanted else "not part of it"
                        raise ValueError(f"{path}: unexpected tensor '{full_name}' ({twice}); {remedy}.")
                    del missing[name]
                    tensor, shape = handle.get_tensor(full_name), list(wanted[name].shape)
                    if list(tensor.shape) != shape or tensor.dtype not in FLOATS:
                        raise ValueError(f"{path}: tensor '{full_name}' is {tensor.dtype} "
                                         f"{list(tensor.shape)}, but floats {shape} are needed; {remedy}.")
                    if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN comes through both
                        raise ValueError(f"{path}: tensor '{full_name}' is not finite everywhere; {remedy}.")
                    # A copy: no memory map of the file stays, so the file may be replaced at any time. One
                    # copy: a second, freed at once, leaves holes in the heap, a fifth of a 1.7B model.
                    yield name, tensor.to(dtype or tensor.dtype, copy=True)
    if lost := sorted(missing.keys() - set(optional)):
        where = path if path.name else "the folder"
        raise ValueError(f"{where}: {len(lost)} tensors are missing, e.g. '{lost[0]}'; {remedy}.")


def file_hash(*paths: Path) -> str:
    """16 hex digits that name the content of these files: a hash of every byte (0.3 s for 269 MB)."""
    digest = sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


# ---- writing ---------------------------------------------------------------------------------------------

def atomic_replace(source: Path, target: Path) -> None:
    """Renames a finished file or folder into place. Its bytes are on the disk first, so that a power cut
    leaves the old one or the new one, never a part."""
    for path in [source, *source.rglob("*")]:
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    os.replace(source, target)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `path` at the end."""
    part = path.with_name(path.name + ".tmp")  # a folder, so that safetensors' own temporary file goes too
    shutil.rmtree(part, ignore_errors=True)  # left by a killed run
    part.mkdir(parents=True)
    try:
        yield part / path.name
        atomic_replace(part / path.name, path)
    except SafetensorError as error:  # how a full disk shows itself through safetensors
        raise OSError(f"{path}: not written ({error}); free some space and run it again.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def to_json(content: dict) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def save_json(content: dict, path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(to_json(content))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict | None = None,
                 beside: dict[str, bytes] | None = None) -> None:
    """Writes tensors and, `beside` them, the small files {name: bytes} that say how to read them.

    If such a file changes, the old tensors go first: a killed run must not leave its tensors with another
    run's settings. The new tensors are on the disk by then, so a full disk loses nothing.
    """
    with atomic_write(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary,
                  metadata={key: str(value) for key, value in (metadata or {}).items()})
        temporary.chmod(0o644)  # safetensors makes it readable for its owner only
        for name, content in (beside or {}).items():
            file = path.with_name(name)
            if not file.exists() or file.read_bytes() != content:
                path.unlink(missing_ok=True)
                with atomic_write(file) as new:
                    new.write_bytes(content)


# ---- folders ---------------------------------------------------------------------------------------------

@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """One run at a time in `folder`. The lock ends with its process, however that ends. A run that fails
    before its first file leaves no new folder behind."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another run is writing there; wait for it, or choose another "
                                 "folder.") from None
            except OSError:  # a network drive without locks
                pass
        yield
    finally:
        if fcntl:
            os.close(handle)
        for path in made:
            with suppress(OSError):
                path.rmdir()  # fails, as it should, if anything is in it


@contextmanager
def scratch_folder(home: Path) -> Iterator[Path]:
    """An empty folder inside `home` for unfinished files. It goes at the end; those of killed runs go now."""
    for old in home.glob("part-*") if fcntl else ():
        with suppress(ValueError), lock_folder(old):
            shutil.rmtree(old)
    with TemporaryDirectory(dir=home, prefix="part-") as temporary, lock_folder(Path(temporary)):
        yield Path(temporary)
