"""Commands report an error of their user in one line, and choose a device, in the way that is written here."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

if TYPE_CHECKING:  # torch takes seconds to import, which `--help` must not wait for
    import torch

T = TypeVar("T")

SHELLS = ("bash", "zsh", "fish")  # tyro completes for these without a further package

EXIT_STATUS = 2  # as for a wrong option


class CommandError(RuntimeError):
    """A command cannot go on, for a reason that its user can change; the message says all that is to be known."""


class Compiler(NamedTuple):
    """torch.compile needs this compiler for a device."""

    language: str
    variable: str  # of the environment, that can name it
    names: tuple[str, ...]  # that are looked for otherwise
    package: str  # of Debian
    error: str  # a part of torch's message where there is none


COMPILERS = {
    "cpu": Compiler(
        "C++", "CXX", ({"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++"),), "g++", "InvalidCxxCompiler"
    ),
    "cuda": Compiler("C", "CC", ("gcc", "clang"), "gcc", "Failed to find C compiler"),
}
INSTALL = {  # how a compiler comes to systems that have no apt
    "darwin": "install one (xcode-select --install)",
    "win32": "install Visual Studio's Build Tools for C++ and type this in their x64 Native Tools Command Prompt",
}
USER_ERRORS = (ValueError, OSError, ImportError, CommandError)


def take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--debug`, which every command has, out of the arguments of a command line; tell whether it was there."""
    return [argument for argument in arguments if argument != "--debug"], "--debug" in arguments


def expand_home(arguments: Sequence[str]) -> list[str]:
    """Write the home folder for a ~ that begins an argument or a value, where a shell left it: in quotes, after `=`."""
    parts = [re.fullmatch(r"(--[\w-]+=)?(~(?:[/\\].*)?)", argument, re.DOTALL) for argument in arguments]
    pairs = zip(arguments, parts, strict=True)
    return [(part[1] or "") + os.path.expanduser(part[2]) if part else argument for argument, part in pairs]


def parse_command(parse: Callable[..., T]) -> T:
    """Return what `parse` makes of the arguments of the command line, without `--debug`.

    An error of the user is one line, also where torchrun started several processes. So is Ctrl-C from here on, also
    while the script imports torch, until `run_reporting` takes over.

    Args:
        parse: takes `args`, the list of arguments.
    """
    open_streams()
    arguments, debug = take_debug(expand_home(sys.argv[1:]))
    try:
        check_completion(arguments)
        with stopping_with_reader():
            parsed = parse(args=arguments)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, end_import)
        return parsed
    except KeyboardInterrupt:
        end_import(signal.SIGINT, None)
    except USER_ERRORS as error:
        fail(Path(sys.argv[0]).stem, error, debug, lambda line: int(os.environ.get("RANK", 0)) == 0)


def end_import(number: int, frame: object) -> NoReturn:
    """End the process at Ctrl-C, without the traceback of an import. Nothing has begun that had to be cleaned up."""
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(2, f"{Path(sys.argv[0]).stem}: interrupted\n".encode())
    os._exit(128 + number)


def leave_interrupts() -> None:
    """Leave Ctrl-C to the process that this one works for, from here on.

    A worker that died while it imports torch would let that process wait for ever: where a worker is no copy of it,
    Python sends the worker its data through a pipe, and does not notice that nobody reads them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_completion(arguments: Sequence[str]) -> None:
    """Raise `ValueError` where tab completion is asked for, and for a shell that is not one of `SHELLS`."""
    for option, *rest in (arguments[i : i + 2] for i in range(len(arguments))):
        if option in ("--tyro-print-completion", "--tyro-write-completion") and not {*rest} & {*SHELLS}:
            raise ValueError(f"{' '.join([option, *rest])}: give one of the shells {', '.join(SHELLS)}")


def check_first(arguments: Sequence[str], names: Collection[str], kind: str) -> None:
    """Raise `ValueError` where the first argument is a wrong name, or an option that comes too early.

    Args:
        names: one of them comes first, or an option that stands alone, such as --help.
        kind: what messages call them, such as "preset".
    """
    first = next(iter(arguments), "--help")
    if first in names or first in ("-h", "--help") or first.startswith("--tyro-"):
        return
    choices = f"one of {', '.join(names)}"
    if first.startswith("-"):
        raise ValueError(f"{first}: the {kind} comes first, {choices}")
    near = difflib.get_close_matches(first, names, n=1)
    raise ValueError(f"{first!r} is no {kind}{f' (did you mean {near[0]!r}?)' if near else ''}; give {choices}")


def run_reporting(
    command: str, call: Callable[[], object], debug: bool = False, claim: Callable[[str], bool] = lambda line: True
) -> None:
    """Call a function; an error of the user goes to stderr without its traceback, and the process exits with 2.

    Ctrl-C is one line too, and the process exits with 130, as a shell would say. Where nobody reads what is printed, as
    in `| head`, the process ends without a word. Errors of other kinds are faults of the program, and keep their
    traceback.

    Args:
        command: the name before the message.
        debug: print the traceback too.
        claim: tells whether this process is to print the message, where several have the same error.
    """
    open_streams()
    if signal.getsignal(signal.SIGINT) is end_import:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with reporting_compiler(OMIT_COMPILE if "--compile" in sys.argv else ""), stopping_with_reader():
            call()
    except USER_ERRORS as error:
        fail(command, error, debug, claim)
    except KeyboardInterrupt as error:
        error.args = ("interrupted",)
        fail(command, error, debug, claim, 128 + signal.SIGINT)


def open_streams() -> None:
    """Make stdout and stderr take all that is printed.

    What is printed to a stream that was closed before the start, as by `>&-`, goes nowhere. Letters that stdout cannot
    encode are escaped, as on stderr: a file or pipe on Windows has cp1252, and a name of a file need not be UTF-8.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (as long as the process)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def check_place(folder: Path, what: str) -> None:
    """Raise `ValueError` where `what`, such as "--out found", is to be written in a folder, and cannot be.

    The folder need not be there, and is not made. This is called before work that takes long.
    """
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), Path("."))
    with refusing_place(there, what), tempfile.TemporaryFile(dir=there):
        pass


def make_folder(folder: Path, what: str) -> None:
    """Make a folder in which `what` is to be written; `ValueError` where that cannot be done, see `check_place`."""
    check_place(folder, what)
    with refusing_place(folder, what):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def refusing_place(place: Path, what: str) -> Iterator[None]:
    """Within this context, an `OSError` is raised as a `ValueError`: `what` cannot be written in `place`."""
    try:
        yield
    except OSError as error:
        reason = f"{place} is a file" if place.is_file() else f"{place}: {error.strerror}"
        raise ValueError(f"{what} cannot be written ({reason}); give another place") from error


OMIT_COMPILE = "omit --compile"  # of a command that has the option


def check_compiler(device: str, instead: str = "") -> None:
    """Raise `CommandError` where torch.compile has no compiler for a type of device, before work that takes long.

    `instead` tells how to do without, see `OMIT_COMPILE`; "" where that cannot be done.
    """
    if device in COMPILERS and not has_compiler(device):
        raise CommandError(no_compiler(device, instead))


def before_compiling(device: str, tell: Callable[[str], None]) -> None:
    """Check that a command can compile on a type of device, see `check_compiler`, and tell of the wait that follows."""
    check_compiler(device, OMIT_COMPILE)
    tell("--compile: the first images wait minutes for the compiler, and so may the first of another size")


@contextlib.contextmanager
def reporting_compiler(instead: str = "") -> Iterator[None]:
    """Within this context, torch's error where it finds no compiler is raised as a `CommandError` of one line."""
    try:
        yield
    except RuntimeError as error:
        device = next((device for device, compiler in COMPILERS.items() if compiler.error in str(error)), None)
        if device is None:
            raise
        raise CommandError(no_compiler(device, instead)) from error


def has_compiler(device: str = "cpu") -> bool:
    """Tell whether the compiler that torch.compile needs for a type of device is there, or torch may install it."""
    compiler = COMPILERS[device]
    named = os.environ.get(compiler.variable)
    if device == "cpu" and os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        return True
    return any(map(shutil.which, [named.partition(" ")[0]] if named else compiler.names))


def no_compiler(device: str, instead: str) -> str:
    """Say that a compiler is missing, and what to do."""
    missing = COMPILERS[device]
    install, name = how_to_install(missing.package), f"name it in {missing.variable}"
    ways = f"{install}, {name}, or {instead}" if instead else f"{install}, or {name}"
    return f"torch.compile finds no {missing.language} compiler; {ways}"


def how_to_install(package: str) -> str:
    """Say how a compiler is installed on this system; `package` is its name in Debian."""
    return INSTALL.get(sys.platform, f"install one (apt install {package})")


def command_line(words: Sequence[str]) -> str:
    """Join words to a line that a shell of this system takes as it is. Windows knows no single quotes."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


@contextlib.contextmanager
def stopping_with_reader() -> Iterator[None]:
    """Within this context, the process ends without a word if nobody reads what it prints, as in `| head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # it was stdout, not a connection to a server
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
            sys.exit(128 + 13)  # SIGPIPE, which Windows does not have
        raise


def fail(
    command: str, error: BaseException, debug: bool, claim: Callable[[str], bool], status: int = EXIT_STATUS
) -> NoReturn:
    """Print an error, and end the process."""
    line = describe(error)
    if debug:
        traceback.print_exception(error)
    if claim(line):
        print(f"{command}: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


def describe(error: BaseException) -> str:
    """Write the message of an error, without the traceback that torch adds to errors of data loading workers."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    if "Original Traceback" in text:
        name, _, message = text.splitlines()[-1].partition(": ")
        text = message or name
    return text or type(error).__name__


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """Within this context, what a logger tells of its progress goes to stderr."""
    logger, handler = logging.getLogger(name), logging.StreamHandler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def find_device(name: str | None, index: int | None = None) -> torch.device:
    """Choose the device that a user names; None is the GPU where there is one, otherwise the CPU.

    Args:
        index: which of several GPUs "cuda" stands for.

    Raises:
        ValueError: torch knows no such device, or it is not in this machine.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device == torch.device("cuda") and index is not None:
            device = torch.device("cuda", index)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise ValueError(
            f"--device {name}: torch cannot use it here ({reason:.120}); there is: {', '.join(there)}"
        ) from error
    return device
