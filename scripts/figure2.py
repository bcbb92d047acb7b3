"""Draw training NLL per epoch in the layout of the poster's Figure 2, from the studies that are there.

Usage: python scripts/figure2.py [FILE.png]      default: docs/explanation/figure2.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from qnewton_mpi.results.plotting import label_decades
from qnewton_mpi.results.words import rate_text
from qnewton_mpi.studies.store import read_runs

STUDIES = Path(__file__).parent.parent / "studies"
PICTURE = STUDIES.parent / "docs/explanation/figure2.png"
PANELS = [(data, activation) for data in ("mnist", "cifar10") for activation in ("relu", "tanh")]
COLOURS = {"sgd": "black", "multisecant": "C1", "kronecker": "C0"}
LINES = {2: ":", 4: "--", 8: "-"}


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default=PICTURE, metavar="FILE.png")
    target = parser.parse_args().target
    found = [
        (data, activation, path)
        for data, activation in PANELS
        if (path := STUDIES / f"figure2-{data}-{activation}.h5").exists()
    ]
    if not found:
        sys.exit(f"none of the studies {STUDIES}/figure2-*.h5 is there: make them with qnewton-mpi compare")
    figure, panels = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4.5), layout="constrained", squeeze=False)
    for axes, (data, activation, path) in zip(panels[0], found, strict=True):
        for run in read_runs(path):
            a = run.attributes
            name = "SGD" if a["method"] == "sgd" else f"{a['method']} M={a['replicas']}"
            axes.plot(
                run.epochs["epoch"],
                run.epochs["train_nll"],
                LINES[int(a["replicas"])],
                color=COLOURS[a["method"]],
                label=f"{name}, rate {rate_text(a['lr'])}",
            )
        axes.set(xlabel="epochs", ylabel="training NLL (nats)", yscale="log", title=f"{data}, {activation}")
        label_decades(axes)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
