"""The tables of these pages that the program itself knows: `make reference` writes them, a test holds them to it.

A page has a place for each, between two comments, of which the first names the table:

    <!-- table: train --> … <!-- end -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import Field
from pathlib import Path
from typing import Any, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qnewton_mpi.cli import build_parser
from qnewton_mpi.cli.options import METHODS, metavar, purposes
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import base_type
from qnewton_mpi.options import TrainSettings
from qnewton_mpi.studies.plan import IN_A_ROW, OF_THE_STUDY, TOP_LEVEL

FOLDER = Path(__file__).resolve().parent
PAGES = ("reference/options.md", "reference/study-keys.md")
PLACE = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(text: str) -> str:
    """Return a page with its tables as they are now."""
    return PLACE.sub(lambda place: f"{place[1]}\n{chr(10).join(content(place[2]))}\n\n{place[3]}", text)


def content(name: str) -> list[str]:
    """Return the lines of a table: of `train`, of a method, of another command, of what a study's TOML has."""
    if name == "study keys":
        return table(("key", "may be", "default", "meaning"), [(f"`{key}`", *said) for key, said in TOP_LEVEL.items()])
    if name == "row keys":
        rows = [(key if " " in key else f"`{key}`", *said) for key, said in IN_A_ROW.items()]
        return table(("key", "may be", "default", "meaning"), rows)
    if name == "not in a study":
        return [", ".join(f"`{option}`" for option in sorted(OF_THE_STUDY))]
    if name in METHODS:
        kind = METHODS[name]
        said = (OPTIMIZERS[name].__doc__ or "").splitlines()[0]
        return [said, "", *settings_table(kind, list(kind.__dataclass_fields__.values()))]  # type: ignore[attr-defined]
    if name == "train":
        lines: list[str] = []
        for purpose, items in purposes().items():
            lines += ["", f"### {purpose[0].upper()}{purpose[1:]}", "", *settings_table(TrainSettings, items)]
        return lines[1:]
    return arguments_table(name)


def settings_table(kind: type, items: Iterable[Field[Any]]) -> list[str]:
    """Return fields of a dataclass of settings as a table in Markdown."""
    hints = get_type_hints(kind)
    rows = [(flags(item, hints), values(item), default(item), item.metadata["help"]) for item in items]
    return table(("option", "values", "default", "meaning"), rows)


def flags(item: Field[Any], hints: dict[str, Any]) -> str:
    """Return how an option is given on the command line."""
    name = item.name.replace("_", "-")
    if base_type(hints[item.name]) is bool:
        return f"`--{name}`, `--no-{name}`"
    unit = metavar([item])
    return f"`--{name}`" if unit.startswith("{") else f"`--{name} {unit}`"


def values(item: Field[Any]) -> str:
    """Return what an option may be: its choices, or its range and the words that stand for something else."""
    check, words = item.metadata["check"], item.metadata["words"]
    if check is None:
        return ""
    if check.choices:
        return ", ".join(f"`{choice}`" for choice in check.choices)
    return ", or ".join([check.says.removeprefix("must be "), *(f"`{word}`" for word in words)])


def default(item: Field[Any]) -> str:
    """Return an option's default; what None stands for is part of its meaning."""
    if item.default is None:
        return "–"
    return f"`{str(item.default).lower() if isinstance(item.default, bool) else item.default}`"


def arguments_table(command: str) -> list[str]:
    """Return the arguments of a command as a table in Markdown, and the examples of its help."""
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parser = commands.choices[command]
    rows = []
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            choices = f"{{{','.join(action.choices)}}}" if action.choices else ""
            name = " ".join([*action.option_strings, str(action.metavar or choices)]).strip()
            rows.append((f"`{name}`", (action.help or "") % vars(action)))
    examples = [line.strip() for line in str(parser.epilog).splitlines()[1:]]
    arguments = table(("argument", "meaning"), rows) if rows else ["It has no options."]
    return [str(parser.description), "", *arguments, "", "```sh", *examples, "```"]


def table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> list[str]:
    """Return a table in Markdown."""
    cells = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


if __name__ == "__main__":
    for page in PAGES:
        path = FOLDER / page
        path.write_text(written(path.read_text()))
