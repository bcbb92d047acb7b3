"""`python -m benchmarks.STUDY run|suite|table`: what the command lines of the studies have in common."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.store import Key, Store
from benchmarks.suite import suite
from qnewton_mpi.errors import ENDED_BY_CTRL_C, USAGE_ERROR, UserError
from qnewton_mpi.files.whole import replace_whole, writing


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise."""
        raise UserError(f"{message}; see `{self.prog} --help`")


class Commands:
    """The parsers of a study's command line.

    Attributes
    ----------
    top : Parser
        Of it all.
    run : Parser
        Of `run`, which the study gives what makes a run, beside workload and optimizer.
    several : list of Parser
        The parents of a command on several workloads.
    """

    def __init__(
        self, study: str, about: str, results: Path, workloads: Iterable[str], optimizers: Iterable[str]
    ) -> None:
        common = Parser(add_help=False)
        common.add_argument("--results", type=Path, default=results, help="folder of the records")
        common.add_argument("--data-dir", help="folder of the data sets, as of qnewton-mpi train")
        placed = Parser(add_help=False)
        placed.add_argument("--device", default="cpu", help="of PyTorch; CPU seconds are of the CPU alone")
        several = Parser(add_help=False)
        several.add_argument("--workloads", nargs="+", default=list(workloads), metavar="NAME")
        several.add_argument("--optimizers", nargs="+", default=list(optimizers), metavar="NAME")
        self.several = [common, several]
        self.top = Parser(prog=f"python -m benchmarks.{study}", description=about)
        self.commands = self.top.add_subparsers(dest="command", required=True)
        self.run = self.commands.add_parser("run", parents=[common, placed], help="one run, unless there is its record")
        self.run.add_argument("workload")
        self.run.add_argument("optimizer", help="default, a peer, or a method with settings, as kronecker:damping=0.1")
        self.run.add_argument("--lr", type=float)
        self.run.add_argument("--seed", type=int, default=0)
        every = self.commands.add_parser("suite", parents=[*self.several, placed], help="all runs that are missing")
        every.add_argument("--seeds", type=int, default=3)
        every.add_argument("--jobs", type=int, default=1)
        every.add_argument(
            "--rerun", nargs="+", default=[], metavar="NAME", help="optimizers whose records are dropped first"
        )
        shown = self.commands.add_parser("table", parents=self.several, help="tables and a picture of what there is")
        shown.add_argument("--output", type=Path, help="the page; the picture beside it has its name")


def call(parser: Parser, commands: Mapping[str, Callable[[argparse.Namespace], int]], words: list[str] | None) -> int:
    """Do the command that words ask for; return the exit code."""
    try:
        options = parser.parse_args(words)
        return commands[options.command](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted: the same command, without --rerun, goes on", file=sys.stderr)
        return ENDED_BY_CTRL_C


def check_suite(options: argparse.Namespace, check: Callable[[str], None]) -> None:
    """Raise `UserError` for counts below 1, and for optimizers that cannot be had."""
    for name in ("jobs", "seeds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: at least 1")
    for name in [*options.optimizers, *options.rerun]:
        check(name)


def do_suite(
    options: argparse.Namespace,
    store: Store[Any],
    wanted: Callable[[], Iterable[Key]],
    command: Callable[[Key], list[str]],
) -> int:
    """Do what is missing, after dropping what is to be done again; return the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs are to end too

    def tell(line: str) -> None:
        print(line, flush=True)

    for name in options.rerun:
        tell(f"{name}: {sum(store.drop(workload, name) for workload in options.workloads)} records dropped")
    return 1 if suite(store, wanted, command, options.jobs, tell) else 0


def command_line(study: str, key: Key, options: argparse.Namespace, words: dict[str, Any]) -> list[str]:
    """Return the command line of a run: what makes it in words, and where everything is."""
    data = options.data_dir and Path(options.data_dir).resolve()  # the run is elsewhere
    words = words | {"results": options.results.resolve(), "device": options.device, "data-dir": data}
    return [sys.executable, "-m", f"benchmarks.{study}", "run", key.workload, key.optimizer] + [
        part for name, value in words.items() if value is not None for part in (f"--{name}", str(value))
    ]


def write_page(output: Path | None, draw: Callable[[Path], bool], page: Callable[[str | None], str]) -> None:
    """Draw a picture, write the page of its name beside it; without an output, print the page."""
    if output is None:
        print(page(None), end="")
        return
    picture = output.with_suffix(".png")
    text = page(picture.name if draw(picture) else None)
    with writing(output):
        replace_whole(output, text.encode())
