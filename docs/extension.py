"""What these pages need of Sphinx beside its own: docstrings that are plain text, tables whose cells do not wrap."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx

SHORT = 30  # characters
NUMBER = re.compile(r"[-−+±–∞.,%\d\s]*(e[+-]?\d+)?")


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


def mark_columns(app: Sphinx, document: nodes.document) -> None:
    """Tell the style sheet, by classes, the cells that are to stay on one line, and those that are numbers."""
    for body in document.findall(nodes.tbody):
        for column in zip(*(row.children for row in body), strict=False):
            texts = [cell.astext() for cell in column]
            marks = {"short": max(map(len, texts)) <= SHORT, "number": all(map(NUMBER.fullmatch, texts))}
            for cell in column:
                cell["classes"] += [mark for mark, is_so in marks.items() if is_so]


def setup(app: Sphinx) -> dict[str, bool]:
    """Be an extension of Sphinx."""
    app.connect("doctree-read", mark_columns)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before numpydoc
    return {"parallel_read_safe": True}
