"""A run in a process of its own: if a backend ends or hangs it, the result file is completed."""

from __future__ import annotations

import faulthandler
import multiprocessing
import re
import signal
import sys
import tempfile
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from agc.errors import AGCError
from agc.files import part_of, written

__all__ = ["run_apart"]

_SECONDS_TO_END: Final = 10.0


def run_apart(spec: str, out: Path, *, timeout: float | None = None, **options: Any) -> int:
    """Run :func:`agc_conformance.suite.run` in a process of its own.

    If that process ends before its run does, a check takes too long, or the user interrupts it,
    what it wrote is completed by a ``died`` record that names the check, and the stack of the
    process is printed. Once the run is over the process has 10 seconds to end.

    Parameters
    ----------
    spec, out, **options
        As :func:`agc_conformance.suite.run` takes them.
    timeout : float, optional
        Seconds that a check may take: a vector in one dtype, a step of training, a question about
        an NFNet, and loading the backend. After that the process is ended.

    Returns
    -------
    int
        Exit status of the run; 1 if the process died.

    Raises
    ------
    AGCError, OSError
        What the run raises.
    KeyboardInterrupt
        If the user interrupts the run; the file is complete.
    """
    part = part_of(out)
    if part.is_file():
        part.unlink()  # of another run, which was interrupted
    # A fork costs nothing, and no framework is loaded yet; it is safe on Linux only.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        arguments = (receiver, sender, trace, timeout, spec, out, options)
        process = context.Process(target=_child, args=arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's threads are idle
            process.start()
        sender.close()
        # Whoever ends this process means the run.
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        check = "loading the backend"
        answer: tuple[str, Any] | None = None
        try:
            for what, value in _messages(process, receiver):
                if what == "check":
                    check = value
                else:
                    answer = what, value
                    break
        except KeyboardInterrupt:
            process.terminate()
            answer = "interrupted", "interrupted by the user"
        finally:
            process.join(_SECONDS_TO_END)
            process.kill()  # a thread of the backend's may never end
            process.join()
            signal.signal(signal.SIGTERM, before)
        stack = trace.read_text(encoding="utf-8", errors="replace") if trace.exists() else ""
    ending: tuple[str, Any] = answer or ("died", _how(process.exitcode, stack, timeout))
    what, value = ending
    if what == "raised":
        raise value
    if what == "returned":
        return int(value)
    if what == "died":
        sys.stderr.write(stack.partition("\nExtension modules")[0])
    _complete(spec, out, options, check, value)
    if what == "interrupted":
        raise KeyboardInterrupt
    return 1


def _messages(process: Any, receiver: Connection) -> Any:
    """Yield what a process sends until it ends, also if its own children keep the pipe open."""
    while process.is_alive() or receiver.poll():
        if receiver.poll(1.0):
            try:
                yield receiver.recv()
            except EOFError:
                return


def _child(
    receiver: Connection,
    sender: Connection,
    trace: Path,
    timeout: float | None,
    spec: str,
    out: Path,
    options: dict[str, Any],
) -> None:
    """Run the suite, and send the name of every check and how the run ended."""
    receiver.close()  # so that sending fails once the parent is gone
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with trace.open("w") as file:
        faulthandler.enable(file)

        def watch(check: str) -> None:
            sender.send(("check", check))
            if timeout is not None:
                faulthandler.dump_traceback_later(timeout, exit=True, file=file)

        try:
            from agc_conformance.suite import run

            watch("loading the backend")
            answer: tuple[str, Any] = "returned", run(spec, out, watch=watch, **options)
        except (AGCError, OSError) as error:
            answer = "raised", error
        except BaseException as error:  # KeyboardInterrupt too: the backend may raise it
            from agc_conformance.records import describe

            traceback.print_exc(file=file)
            answer = "died", describe(error)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        sender.send(answer)


def _how(code: int | None, stack: str, timeout: float | None) -> str:
    """Say how a process ended and, if it is known, where."""
    threads = re.split(r"^(?=(?:Current t|T)hread )", stack, flags=re.MULTILINE)
    mine = next((thread for thread in threads if thread.startswith("Current")), threads[-1])
    frame = re.search(r'File "([^<].*)", line (\d+) in (.+)', mine)
    place = f" ({Path(frame[1]).name}:{frame[2]}, in {frame[3]})" if frame else ""
    if stack.startswith("Timeout"):
        return f"no answer in {timeout:g} s{place}"
    if code is not None and code < 0:
        return f"{signal.Signals(-code).name}{place}"
    return f"the process ended with status {code}{place}"


def _complete(spec: str, out: Path, options: dict[str, Any], check: str, reason: str) -> None:
    """Complete the result file of a process that died, and say so."""
    from rich.console import Console
    from rich.markup import escape

    from agc_conformance.records import DiedRecord, complete, make_header
    from agc_conformance.vectors import digest

    given = {key: options[key] for key in ("device", "select", "full", "train", "models")}
    header = make_header(
        "run", backend=spec, role=options["role"] or "backend", vectors=digest(), **given
    )
    died: DiedRecord = {"type": "died", "check": check, "reason": reason}
    complete(out, header, died)
    Console(stderr=True).print(
        f"[red]died[/] in {escape(check)}: {escape(reason)}; the checks after it were not run "
        f"-> {written(out)}",
        highlight=False,
        soft_wrap=True,
    )
