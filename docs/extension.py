"""What these pages need of Sphinx beside its own: tables of options, and docstrings that are plain text.

The tables are written from what the program itself reads: the settings' dataclasses and the parser of the command line.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from sphinx.util.docutils import SphinxDirective

from qnewton_mpi.cli import build_parser
from qnewton_mpi.config import TrainSettings
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import ACCEPTED, base_type

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx


class Options(SphinxDirective):
    """The options of `train`, of one of its methods, or of another command, as tables."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name in OPTIMIZERS:
            kind = OPTIMIZERS[name]
            lines = [(kind.__doc__ or "").splitlines()[0], "", *settings_table(kind.settings_type)]
        else:
            lines = settings_table(TrainSettings) if name == "train" else arguments_table(name)
        return self.parse_text_to_nodes("\n".join(lines))


def settings_table(kind: type) -> list[str]:
    """Return the fields of a dataclass of settings as a table in Markdown."""
    hints = get_type_hints(kind)
    rows = []
    for item in fields(kind):
        may_be, said = values(item, hints), item.metadata["help"]
        said = "" if may_be == f"one of {said}" else said  # a terminal's help has no other place for the choices
        rows.append((flags(item, hints), may_be, default(item), said))
    return table(("option", "values", "default", "meaning"), rows)


def flags(item: Field[Any], hints: dict[str, Any]) -> str:
    """Return how an option is given on the command line."""
    name = item.name.replace("_", "-")
    return f"`--{name}`, `--no-{name}`" if base_type(hints[item.name]) is bool else f"`--{name}`"


def values(item: Field[Any], hints: dict[str, Any]) -> str:
    """Return what an option may be: its type, its range, and the words that stand for something else."""
    check, words = item.metadata["check"], item.metadata["words"]
    kind = base_type(hints[item.name])
    if kind is str and check:
        return str(check[1]).removeprefix("must be ")
    wanted = ACCEPTED[kind][2] + (f", {check[1].removeprefix('must be ')}" if check else "")
    return ", or ".join([wanted, *(f"`{word}`" for word in words)])


def default(item: Field[Any]) -> str:
    """Return an option's default; what None stands for is part of its meaning."""
    if item.default is None:
        return "–"
    return f"`{str(item.default).lower() if isinstance(item.default, bool) else item.default}`"


def arguments_table(command: str) -> list[str]:
    """Return the arguments of a command as a table in Markdown."""
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    told = next(a.help for a in commands._choices_actions if a.dest == command)
    rows = []
    for action in commands.choices[command]._actions:
        if not isinstance(action, argparse._HelpAction):
            name = " ".join([*action.option_strings, str(action.metavar or "")]).strip()
            rows.append((f"`{name}`", (action.help or "") % vars(action)))
    sentence = f"{str(told)[0].upper()}{str(told)[1:]}."
    return [sentence, "", *(table(("argument", "meaning"), rows) if rows else ["It has no options."])]


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Return a table in Markdown."""
    cells = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def marked_up(match: re.Match[str]) -> str:
    """Return a bar as a bar, and what stands in backticks and is not a name as code that is no link."""
    if match[1] is None:
        return "\\|"
    return match[0] if re.fullmatch(r"\w+(\.\w+)*", match[1]) else f"``{match[1]}``"


def plain_docstring(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Have an indented block outside the lists of parameters stand as it is, an equation mostly, and |λ| mean |λ|."""
    found: list[str] = []
    heading = ""
    block = False
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if line and re.fullmatch("-{3,}", following):
            heading = line
        indented = line.startswith(" ")
        if line and not indented:
            block = False
        elif indented and heading in ("", "Notes") and not block and not lines[number - 1]:
            found += ["::", ""]
            block = True
        code = block or line.lstrip().startswith((">>>", "..."))
        found.append(line if code else re.sub(r"`([^`]*)`|\|", marked_up, line))
    lines[:] = found


def setup(app: Sphinx) -> dict[str, bool]:
    """Be an extension of Sphinx."""
    app.add_directive("options", Options)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before numpydoc
    return {"parallel_read_safe": True}
