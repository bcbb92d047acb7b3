"""What the program says of itself: help, suggestions, and the pages that are made of the same."""

import argparse
import importlib.util
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from qnewton_mpi import cli
from qnewton_mpi.cli.options import METHODS, UNITS, metavar, purposes
from qnewton_mpi.config import run_config
from qnewton_mpi.core.create import method_settings
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.errors import UserError
from qnewton_mpi.options import TrainSettings
from qnewton_mpi.studies.plan import read_study

ROOT = Path(__file__).parents[1]
COMMANDS = [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]


@pytest.fixture(scope="module")
def parsers():
    return next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


@pytest.fixture(scope="module")
def reference():
    specification = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["reference/options.md", "reference/study-keys.md"])
def test_pages_are_what_the_program_reads(reference, page):
    text = (ROOT / "docs" / page).read_text()
    assert reference.written(text) == text, "run `make reference`"


def test_every_method_and_command_has_its_table(reference):
    tables = re.findall(r"<!-- table: ([\w -]+) -->", (ROOT / "docs" / "reference" / "options.md").read_text())
    assert sorted(tables) == sorted([*OPTIMIZERS, *COMMANDS])


def test_the_study_of_the_page_is_one(tmp_path):
    example = re.search(r"```toml\n(.*?)```", (ROOT / "docs" / "howto" / "studies.md").read_text(), re.DOTALL)[1]
    (tmp_path / "study.toml").write_text(example)
    study = read_study(str(tmp_path / "study.toml"))
    assert [row.name for row in study.rows] == ["Nesterov", "kronecker replicas=4", "kronecker replicas=8"]
    (tmp_path / "study.toml").write_text(example.replace("tune_by", "tuned_by"))
    with pytest.raises(UserError, match=r"line 3: unknown tuned_by; did you mean tune_by\?"):
        read_study(str(tmp_path / "study.toml"))


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_commands(parsers, command):
    """Three of each, which the parser takes, and whose options the settings take."""
    examples = [line.strip() for line in parsers[command].epilog.splitlines()[1:]]
    assert len(examples) == 3
    for line in examples:
        words = shlex.split(line.partition(" | ")[0].partition(" > ")[0])
        parsed = cli.parse(words[words.index("qnewton-mpi") + 1 :], first=False)
        assert parsed.command == command, line
        if command == "train":
            run_config({name: value for name, value in vars(parsed).items() if name in {*options_of_train()}})


def options_of_train():
    return {item.name for kind in (TrainSettings, *METHODS.values()) for item in fields(kind)}


def test_units_and_choices(parsers):
    """No value is called by the name of its option in capitals; each option has its help."""
    for command, parser in parsers.items():
        for action in parser._actions:
            assert action.help, (command, action.dest)
            if action.nargs != 0 and not action.choices:
                assert action.metavar, (command, action.dest)
                same = action.option_strings and action.metavar == action.dest.upper()
                assert not same or action.metavar in ("STEPS", "EPOCHS", "SAMPLES", "ROUNDS"), (command, action.dest)
    assert {*UNITS} <= options_of_train()
    lines = parsers["train"].format_help()
    for told in (
        "--warmup STEPS",
        "--time-limit SECONDS",
        "--checkpoint FOLDER",
        "--schedule {constant,cosine}",
        "--ema FRACTION",
        "--lr NUMBER|auto",
        "--log {tensorboard}",
    ):
        assert re.search(rf"^  {re.escape(told)}\s", lines, re.MULTILINE), told


def test_which_methods_take_the_rate_auto(parsers):
    told = next(action.help for action in parsers["train"]._actions if action.dest == "lr")
    takes = re.search(r"auto is for (.*)$", told)[1].split(", ")
    assert takes == [name for name in OPTIMIZERS if "auto" in accepted(name)]
    assert "adam" not in takes
    assert metavar([METHODS["adam"].__dataclass_fields__["lr"]]) == "NUMBER"


def accepted(method):
    try:
        method_settings(method, lr="auto")
    except UserError:
        return ()
    return ("auto",)


def test_groups(parsers):
    """Each option is in one group: by what it is for, or by the methods that have it."""
    groups = {group.title: [a.dest for a in group._group_actions] for group in parsers["train"]._action_groups}
    assert {"run", "data", "checkpoints and limits", "output", "every method", "method fisher"} <= {*groups}
    assert groups["method fisher"] == ["rank"]
    assert groups["every method"] == ["lr", "weight_decay"]
    for purpose, items in purposes().items():
        assert groups[purpose] == [item.name for item in items]
    for title, names in groups.items():
        for name in names if title.startswith("method ") else ():
            having = [method for method, kind in METHODS.items() if name in {item.name for item in fields(kind)}]
            assert title == f"method {', '.join(having)}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train --epoch 5", "unrecognized arguments: --epoch; did you mean --epochs? See `qnewton-mpi train --help`"),
        ("train --chekpoint=saved", "did you mean --checkpoint?"),
        ("train --no-resum", "did you mean --no-resume?"),
        ("train --wibble 3", "unrecognized arguments: --wibble; see `qnewton-mpi train --help`"),
        ("watch run.h5 --onec", "did you mean --once? See `qnewton-mpi watch --help`"),
        ("trian", "did you mean train? See `qnewton-mpi --help`"),
        ("Plot run.h5", "did you mean plot?"),
        ("data fecth mnist", "did you mean fetch?"),
        ("train --method kroneker", "did you mean kronecker?"),
        ("train --method fisher --exchange algather", "did you mean allgather?"),
        ("train --data fashion-mnits", "did you mean fashion-mnist?"),
        ("predict run.h5 --output x.csv --which tial", "did you mean tail?"),
    ],
)
def test_words_that_are_almost_right(capsys, monkeypatch, tmp_path, words, told):
    monkeypatch.chdir(tmp_path)
    assert cli.run(words.split()) == cli.USAGE_ERROR
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert told in said.err


def test_names_in_tables_and_programs():
    with pytest.raises(UserError, match=r"unknown option 'epoch'; did you mean epochs\?"):
        run_config({"epoch": 3})
    with pytest.raises(UserError, match=r"unknown option 'dampin'; did you mean damping\?"):
        method_settings("fisher", dampin=3)
    with pytest.raises(UserError, match=r"must be one of .*; did you mean fisher\?"):
        method_settings("fischer")
