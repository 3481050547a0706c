"""Plumbing of the scripts: settings -> flags and --help, errors -> one sentence, Ctrl-C, what a user types.

A script has one dataclass of settings, whose fields are made by `opt`, and a function main(settings); it ends
with cli(Settings, main). Nothing of the method lives here.
"""
import atexit
import dataclasses
import os
import select
import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def stop(*_) -> None:
    """Ctrl-C while torch is loading, which takes seconds: end at once, whatever is half imported."""
    os.write(2, f"\n{Path(sys.argv[0]).name}: stopped\n".encode())
    os._exit(130)  # 128 + SIGINT, what a shell expects


def let_go() -> None:
    """`| head`: whoever reads stdout has seen enough, also of --help. Python would complain at its end."""
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):  # None: there is no stdout
        with suppress(OSError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Only our own scripts set these handlers, and they import this file before torch.
own_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve().parent in (
    ROOT, ROOT / "data", ROOT / "tests")
if own_script:
    atexit.register(let_go)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)

from data.files import lock_folder  # noqa: E402

PATHS = ("base", "adapter", "data", "pool", "queries", "matcher", "full", "out_dir")  # may name a path


# ---- settings and errors ---------------------------------------------------------------------------------

def opt(default, help: str, least: float = 0):
    """A field of a settings dataclass: its default (and with it the flag's type), its line in --help, and its
    least value if it is a number."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


def parse(settings: type, doc: str):
    """The command line as an instance of `settings`: one --flag for each field."""
    class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
        """Shows defaults, but no empty ones, and keeps line breaks."""
        def _get_help_string(self, action):
            return action.help if action.default == "" else super()._get_help_string(action)
    examples = [line for line in doc.splitlines() if line.startswith(("    python ", "    torchrun "))]
    parser = ArgumentParser(description=doc.split("\n\n")[0], epilog="\n".join(["for example:", *examples]),
                            formatter_class=Help)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}; see --help")
    for field in dataclasses.fields(settings):
        kind = type(field.default)
        # type=bool would read "--flag False" as True: a flag that defaults to False is a switch
        how = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": kind.__name__.upper()}
        help = field.metadata["help"].replace("%", "%%")  # argparse formats it with %
        parser.add_argument(f"--{field.name}", default=field.default, help=help, **how)
    return settings(**vars(parser.parse_args()))


def find_paths(s) -> None:
    """A path that is not in the working directory may lie beside the code, as out/ does. Says which."""
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        if field.name not in PATHS or not isinstance(value, str) or not value:
            continue
        path, beside = Path(os.path.expanduser(value)), ROOT / value
        found = value == field.default if field.name == "out_dir" else beside.exists()
        if found and not path.exists() and not ROOT.samefile("."):
            print(f"(--{field.name}: {beside})")
            path = beside
        if path != Path(value):
            setattr(s, field.name, str(path))


def typed() -> Iterator[tuple[str, str]]:
    """(instruction, input) as a user types them, until an empty instruction; of a pipe each line is one."""
    if not sys.stdin or not sys.stdin.isatty():
        yield from ((line.strip(), "") for line in sys.stdin or () if line.strip())
        return
    def read(prompt: str) -> str:
        """A line, or all lines of a text that was pasted."""
        lines = [input(prompt)]
        with suppress(EOFError):
            while os.name == "posix" and select.select([sys.stdin], [], [], 0.05)[0]:
                lines.append(input())
        return "\n".join(lines).strip()
    print("type an instruction (then its input, or nothing); an empty instruction ends")
    with suppress(EOFError):
        while instruction := read("instruction> "):
            text = ""
            with suppress(EOFError):
                text = read("input> ")
            yield instruction, text


def cli(settings: type, main: Callable) -> None:
    """Parses the command line and calls main(settings).

    An error that a user can cause (ValueError, OSError, out of memory) ends in one line and status 1; any
    other error is our bug and shows its traceback.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal cannot show must not end a run
            stream.reconfigure(errors="replace")
    s = parse(settings, (sys.modules[main.__module__].__doc__ or "").strip())
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    name = Path(sys.argv[0]).name
    def kept() -> str:
        out = getattr(s, "out_dir", "")
        if not out or not Path(out).is_dir() or not any(Path(out).iterdir()):
            return ""
        return f"; finished work is kept in {out}: run it again" + " with --resume" * hasattr(s, "resume")
    try:
        for field in dataclasses.fields(s):
            value, least = getattr(s, field.name), field.metadata["least"]
            if isinstance(value, int | float) and not least <= value < 1 << 62:  # refuses NaN too
                raise ValueError(f"--{field.name} {value}: must be a number from {least:g} on; see --help.")
        find_paths(s)
        out = getattr(s, "out_dir", "")
        with lock_folder(Path(out)) if out and os.environ.get("RANK", "0") == "0" else nullcontext():
            main(s)
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head`: whoever reads has seen enough
        let_go()
        sys.exit(141)  # 128 + SIGPIPE
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError | MemoryError):
            if "no kernel image" in text:
                text = "this PyTorch was not built for this GPU; use --device cpu, or another PyTorch"
            elif isinstance(error, RuntimeError) and "memory" not in text:
                raise
            else:
                text = f"out of memory ({text[:90]}); use a smaller model or fewer tokens at once{kept()}"
        elif getattr(error, "errno", None):  # the system's own words name no remedy
            where = error.filename or out or "the output"
            text = f"{where}: {error.strerror}; fix that{kept() or ' and run it again'}"
        # A broken file may hold a long text, or control characters that would steer the terminal.
        sys.exit(f"{name}: " + "".join(c if c.isprintable() else "?" for c in text[:600]))
    except KeyboardInterrupt:
        print(f"\n{name}: stopped{kept()}", file=sys.stderr)
        sys.exit(130)
