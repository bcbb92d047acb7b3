"""`qnewton-mpi slurm`: the batch scripts that come with the package."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from qnewton_mpi.cli.arguments import Commands, add_command
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.outputs import check_output
from qnewton_mpi.files.whole import replace_whole, writing

EXAMPLES = (
    "qnewton-mpi slurm slurm",
    "qnewton-mpi slurm jobs --partition gpu --account physics --overwrite",
    "qnewton-mpi slurm --pmi",
)
NAME = re.compile(r"[\w.,:@+-]{1,100}")
JOB_NAME = "#SBATCH --job-name=qnewton\n"  # after which further lines of options are put
PMIX, PMI2 = "pmix", "pmi2"


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "slurm", "write batch scripts for SLURM, which run from any folder", EXAMPLES)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="where to; made if it is not there")
    parser.add_argument("--partition", type=name_of("--partition"), metavar="NAME", help="written into the scripts")
    parser.add_argument("--account", type=name_of("--account"), metavar="NAME", help="written into the scripts")
    parser.add_argument("--pmi", action="store_true", help="only tell what srun speaks to this MPI library: pmi2, pmix")
    parser.add_argument("--overwrite", action="store_true", help="replace scripts that are there")
    parser.set_defaults(process=process, alone=True)


def name_of(option: str) -> Callable[[str], str]:
    """Return the type of an option that names something of the cluster's.

    Raises
    ------
    UserError
        Where it is called with what no line of a script can have.
    """

    def convert(text: str) -> str:
        if not NAME.fullmatch(text):
            raise UserError(f"{option} {printable(text)}: must be a name, of letters, digits and .,:@+-")
        return text

    return convert


def process(command: argparse.Namespace) -> None:
    """Write the scripts, or tell the interface."""
    if command.pmi:
        print(pmi(), flush=True)
        return
    if command.folder is None:
        raise UserError("slurm needs a FOLDER to write to, or --pmi")
    named = {"partition": command.partition, "account": command.account}
    scripts = texts({option: name for option, name in named.items() if name})
    for name in scripts:
        check_output(command.folder / name, "batch script", command.overwrite)
    for name, text in scripts.items():
        path = command.folder / name
        with writing(path):
            replace_whole(path, text.encode())
            path.chmod(0o755)
    print(f"{', '.join(scripts)} written to {command.folder}", flush=True)


def texts(options: dict[str, str]) -> dict[str, str]:
    """Return the scripts by their names, with further options of sbatch.

    Examples
    --------
    >>> "#SBATCH --partition=gpu" in texts({"partition": "gpu"})["train.sbatch"].splitlines()
    True
    """
    lines = "".join(f"#SBATCH --{option}={name}\n" for option, name in options.items())
    folder = resources.files("qnewton_mpi.batch")
    found = (file for file in folder.iterdir() if file.name.endswith((".sbatch", ".sh")))
    return {
        file.name: file.read_text("utf-8").replace(JOB_NAME, JOB_NAME + lines)
        for file in sorted(found, key=lambda file: file.name)
    }


def pmi() -> str:
    """Return what srun has to speak to the MPI library, which is loaded for that and not started.

    Raises
    ------
    UserError
        Where there is no library.
    """
    import mpi4py

    from qnewton_mpi.parallel.library import load_mpi

    mpi4py.rc.initialize = False
    return PMIX if load_mpi().get_vendor()[0] == "Open MPI" else PMI2
