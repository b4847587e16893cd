"""`--distributed`: one run or one sweep in several processes, of which the first one speaks."""

import argparse
import atexit
import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from lorajax.cli.finetuning import MOST, bounded
from lorajax.cli.interrupts import interruptible
from lorajax.cli.output import prepare_jax

WAIT = 300
"""Seconds that processes wait for each other to begin."""
_WELCOME = b"welcome"
_LEAVE = 15
"""Seconds that one which ends early waits for the others to end."""


def configure(add: Callable[..., Any], what: str) -> None:
    """Adds the options; `what` is done in several processes."""
    add(
        "--distributed",
        action="store_true",
        help=f"{what} in several processes, each started with this same command, over all of their "
        "devices; what the cluster (Slurm, Open MPI, Kubernetes, TPU) tells JAX is enough, or give",
    )
    add("--coordinator", metavar="HOST:PORT", help="a free port where process 0 runs,")
    add("--processes", type=int, metavar="N", help="how many there are,")
    add("--process", type=int, metavar="I", help="and which one this is, from 0")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, before jax is imported, for options that mean nothing together."""
    given = {name: getattr(args, name) for name in ("coordinator", "processes", "process")}
    named = {name: value for name, value in given.items() if value is not None}
    args.distributed = args.distributed or args.coordinator is not None
    if not args.distributed:
        for name, value in named.items():
            raise ValueError(f"--{name} is {value}; it goes with --distributed.")
        return
    bounded(args, "processes", 1, MOST)
    bounded(args, "process", 0, MOST)
    if named and len(named) < len(given):
        missing = ", ".join(f"--{name}" for name, value in given.items() if value is None)
        raise ValueError(
            f"{missing} is missing; give --coordinator HOST:PORT, --processes N and --process I, "
            "or none of them, where the cluster tells JAX."
        )
    if named and args.process >= args.processes:
        raise ValueError(f"--process is {args.process}; it must be below {args.processes}.")
    if args.coordinator is not None:
        _address(args)


def check_run(args: argparse.Namespace) -> None:
    """As `check`, for a training run, which takes all devices of its processes."""
    check(args)
    if not args.distributed:
        return
    if args.dry_run:
        raise ValueError("--distributed is given with --dry-run; plan by --devices N instead.")
    if args.devices != 1:
        raise ValueError(
            f"--devices is {args.devices}; --distributed takes all that the processes have."
        )


def _address(args: argparse.Namespace) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})", args.coordinator)
    if not found or not 0 < int(found[2]) < 2**16:
        raise ValueError(
            f"--coordinator is {args.coordinator!r}; it must be HOST:PORT, such as node1:12355."
        )
    return found[1].strip("[]"), int(found[2])


def _meet(args: argparse.Namespace) -> None:
    """Waits until all processes are there; raises ValueError where they are not within `WAIT`.

    JAX would wait as well, and then abort the process with a page of addresses. Each process tells
    its number to process 0, at the port that JAX takes over when all have come.
    """
    until = time.monotonic() + WAIT
    (_host if args.process == 0 else _guest)(args, until)


def _host(args: argparse.Namespace, until: float) -> None:
    port, both = _address(args)[1], socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    guests: dict[int, socket.socket] = {}
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise ValueError(
            f"--coordinator is {args.coordinator}, of which process 0 cannot have the port "
            f"({os.strerror(error.errno or 0)}); give a free port of the machine that it runs on."
        ) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        while len(guests) < args.processes - 1:
            server.settimeout(max(until - time.monotonic(), 1e-3))
            try:
                guest, _ = server.accept()
            except TimeoutError as error:
                missing = sorted({*range(1, args.processes)} - {*guests})
                raise ValueError(
                    f"--processes is {args.processes}, and after {WAIT} s process "
                    f"{', '.join(map(str, missing))} is missing; start all of them at one time, "
                    "with the same --coordinator and --processes."
                ) from error
            stack.enter_context(guest)
            guest.settimeout(_LEAVE)
            with contextlib.suppress(OSError, ValueError):  # of a stranger at the port
                number, count = map(int, guest.recv(64).split())
                if count != args.processes:
                    guest.sendall(f"--processes is {args.processes} there".encode())
                elif number in guests or not 0 < number < count:
                    guest.sendall(f"there is a process {number} already".encode())
                else:
                    guests[number] = guest
        for guest in guests.values():
            guest.sendall(_WELCOME)
        for guest in guests.values():
            guest.recv(1)  # they leave first, or the port would stay taken for a minute


def _guest(args: argparse.Namespace, until: float) -> None:
    host, port = _address(args)
    why = "no answer"
    while time.monotonic() < until:
        try:
            with socket.create_connection((host, port), timeout=_LEAVE) as line:
                line.sendall(f"{args.process} {args.processes}".encode())
                line.settimeout(max(until - time.monotonic(), 1e-3))
                answer = line.recv(256)
        except OSError as error:  # process 0 may not have begun yet
            why = str(error.strerror or error)
            time.sleep(0.2)
            continue
        if answer == _WELCOME:
            return
        why = answer.decode(errors="replace")
        if why:
            break
        time.sleep(0.2)
    raise ValueError(
        f"--coordinator is {args.coordinator}, where process {args.process} is not joined with "
        f"process 0 ({why or 'it has ended'}); start all of them within {WAIT} s, with the same "
        "--coordinator and --processes and each with a --process of its own."
    )


def _join(args: argparse.Namespace) -> None:
    import jax

    options: dict[str, Any] = {}
    if args.coordinator is not None:
        _meet(args)
        options = {
            "coordinator_address": args.coordinator,
            "num_processes": args.processes,
            "process_id": args.process,
        }
    try:
        jax.distributed.initialize(
            **options, initialization_timeout=WAIT, shutdown_timeout_seconds=_LEAVE
        )
    except Exception as error:  # of several kinds, by what failed and by the version of JAX
        if not options and "should be defined" in str(error):
            raise ValueError(
                "--distributed is given, and JAX finds no cluster that it knows; give "
                "--coordinator HOST:PORT --processes N --process I as well."
            ) from error
        raise ValueError(
            f"--distributed cannot join the processes ({str(error).splitlines()[0].rstrip('.')})."
        ) from error


@contextlib.contextmanager
def joined(args: argparse.Namespace, x64: bool = False) -> Iterator[None]:
    """Within the block this process is one of those that --distributed asks for.

    Args:
      args: of the command.
      x64: whether it computes in double precision.

    Raises:
      ValueError: where they do not find each other, and for errors in the block, with the number of
        the process that has met it.
    """
    prepare_jax(x64=x64)
    if not args.distributed:
        yield
        return
    _join(args)
    import jax

    where = f"process {jax.process_index()} of {jax.process_count()}"
    silent = contextlib.ExitStack()
    with silent, interruptible():  # once more, since JAX has taken SIGTERM for itself
        if jax.process_index():
            nowhere = silent.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silent.enter_context(contextlib.redirect_stdout(nowhere))
            silent.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            yield
        except (ValueError, OSError) as error:
            if not getattr(error, "agreed", False):
                _leave(2)
            raise ValueError(f"{where}: {error}") from error
        except KeyboardInterrupt as error:
            if not error.args:  # with words all of them stop at the same step
                _leave(128 + getattr(error, "signal", signal.SIGINT))
            raise
        except Exception:
            _leave(1)
            raise


def _leave(status: int) -> None:
    """Lets the process end without the others, once it has said why.

    JAX would wait for them at its exit, and abort with a page of addresses when they do not come.
    """

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(end)  # what was registered last runs first


def mesh(args: argparse.Namespace) -> Any:
    """The mesh that --devices or --distributed asks for; None for one device."""
    from lorajax.finetune import sharding

    if args.distributed:
        found = sharding.mesh_of()
        args.devices = found.size
        return found
    return sharding.mesh_of(args.devices) if args.devices > 1 else None
