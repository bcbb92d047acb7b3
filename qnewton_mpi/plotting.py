"""Figures of runs; needs matplotlib (extra `plot`)."""

from __future__ import annotations

from pathlib import Path

from qnewton_mpi.errors import UserError
from qnewton_mpi.training.runfile import Run


def plot_runs(runs: list[Run], target: Path) -> None:
    """Draw training (solid) and test (dashed) NLL against epochs, a colour a run. Local.

    Raises
    ------
    UserError
        Without matplotlib, or where the picture cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plot needs matplotlib: pip install 'qnewton_mpi[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for run in runs:
        (line,) = axes.plot(run.epochs["epoch"], run.epochs["train_nll"], label=run.label)
        axes.plot(run.epochs["epoch"], run.epochs["test_nll"], "--", color=line.get_color(), linewidth=1)
    names = sorted({str(run.attributes["data"]) for run in runs})
    axes.set(xlabel="epochs", ylabel="negative log-likelihood (nats)", yscale="log", title=", ".join(names))
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(title="training (dashed: test)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{target}: the picture cannot be written ({error})") from error
    finally:
        plt.close(figure)
