"""Commands report an error of their user in one line, and choose a device, in the way that is written here."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:  # torch takes seconds to import, which `--help` must not wait for
    import torch

T = TypeVar("T")

EXIT_STATUS = 2  # as for a wrong option


class CommandError(RuntimeError):
    """A command cannot go on, for a reason that its user can change; the message says all that is to be known."""


NO_COMPILER = ("InvalidCxxCompiler", "Failed to find C compiler")  # in the errors of inductor and of Triton
USER_ERRORS = (ValueError, OSError, ImportError, CommandError)


def take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--debug`, which every command has, out of the arguments of a command line; tell whether it was there."""
    return [argument for argument in arguments if argument != "--debug"], "--debug" in arguments


def parse_command(parse: Callable[..., T]) -> T:
    """Return what `parse` makes of the arguments of the command line, without `--debug`.

    An error of the user is one line, also where torchrun started several processes.

    Args:
        parse: takes `args`, the list of arguments.
    """
    arguments, debug = take_debug(sys.argv[1:])
    try:
        return parse(args=arguments)
    except USER_ERRORS as error:
        fail(Path(sys.argv[0]).stem, error, debug, lambda line: int(os.environ.get("RANK", 0)) == 0)


def run_reporting(
    command: str, call: Callable[[], object], debug: bool = False, claim: Callable[[str], bool] = lambda line: True
) -> None:
    """Call a function; an error of the user goes to stderr without its traceback, and the process exits with 2.

    Ctrl-C is one line too, and the process exits with 130, as a shell would say. Errors of other kinds are faults of
    the program, and keep their traceback.

    Args:
        command: the name before the message.
        debug: print the traceback too.
        claim: tells whether this process is to print the message, where several have the same error.
    """
    try:
        call()
    except USER_ERRORS as error:
        fail(command, error, debug, claim)
    except KeyboardInterrupt as error:
        error.args = ("interrupted",)
        fail(command, error, debug, claim, 128 + signal.SIGINT)
    except RuntimeError as error:
        if not any(text in str(error) for text in NO_COMPILER):
            raise
        line = "torch.compile finds no C++ compiler; install one (apt install g++), name it in CXX, or omit --compile"
        missing = CommandError(line)
        missing.__cause__ = error
        fail(command, missing, debug, claim)


def stop_with_reader(call: Callable[[], object]) -> None:
    """Call a function that prints; end the process without a word if nobody reads its output, as in `| head`."""
    try:
        call()
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
    """Write the message of an error, without the traceback that torch adds to those of data loading workers."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    if "Original Traceback" in text:
        name, _, message = text.splitlines()[-1].partition(": ")
        text = message or name
    return text or type(error).__name__


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
