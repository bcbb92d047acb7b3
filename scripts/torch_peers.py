"""Run a study whose rows may name optimizers of PyTorch packages, on the same network, parameters and batches.

Usage: mpiexec -n 2 python scripts/torch_peers.py STUDY.toml STUDY.h5       needs the extra `peers`

It is `qnewton-mpi compare` with one method more, `torch`, whose option `optimizer` is one of PEERS. The gradients are
this package's own (they equal PyTorch's to rounding, and are faster); what differs between rows is the optimizer alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qnewton_mpi.core.optimizers import OPTIMIZERS, Optimizer, Settings
from qnewton_mpi.core.optimizers.base import Array, Figures, LossAndGradient
from qnewton_mpi.core.settings import POSITIVE, one_of, setting
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.communicator import Communicator, abort_on_exception

Parameters = list[torch.nn.Parameter]


def soap(parameters: Parameters, rate: float) -> torch.optim.Optimizer:
    """SOAP (Vyas et al. 2024, arXiv 2409.11321), no weight decay, biases preconditioned too."""
    from pytorch_optimizer import SOAP

    return SOAP(parameters, lr=rate, weight_decay=0.0, precondition_1d=True)


def _heavyball() -> Any:
    import heavyball

    heavyball.utils.compile_mode = None  # compiling takes longer than these runs
    return heavyball


def soap_heavyball(parameters: Parameters, rate: float) -> torch.optim.Optimizer:
    """SOAP of the package heavyball, at its defaults but for the weight decay."""
    return _heavyball().SOAP(parameters, lr=rate, weight_decay=0.0)


def shampoo(parameters: Parameters, rate: float) -> torch.optim.Optimizer:
    """Shampoo (Anil et al. 2020, arXiv 2002.09018), grafted to AdaGrad, its roots renewed every 10 steps."""
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(parameters, lr=rate, preconditioning_compute_steps=10, start_preconditioning_step=10)


def psgd(parameters: Parameters, rate: float) -> torch.optim.Optimizer:
    """PSGD with Kronecker factors (Li 2018, arXiv 1512.04202; Li et al. 2024)."""
    return _heavyball().PSGDKron(parameters, lr=rate)


def muon(parameters: Parameters, rate: float) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) with AdamW for the biases."""
    return _heavyball().Muon(parameters, lr=rate, weight_decay=0.0)


def lbfgs(parameters: Parameters, rate: float) -> torch.optim.Optimizer:
    """L-BFGS, one iteration with up to 4 more gradients for a strong-Wolfe line search on each batch."""
    return torch.optim.LBFGS(parameters, lr=rate, max_iter=1, max_eval=5, line_search_fn="strong_wolfe")


PEERS: dict[str, Callable[[Parameters, float], torch.optim.Optimizer]] = {
    "soap": soap,
    "soap-heavyball": soap_heavyball,
    "shampoo": shampoo,
    "psgd": psgd,
    "muon": muon,
    "lbfgs": lbfgs,
}


@dataclass(frozen=True)
class PeerSettings(Settings):
    """Settings of `torch`."""

    lr: float = setting(0.003, "learning rate", POSITIVE)
    optimizer: str = setting("soap", ", ".join(PEERS), one_of(*PEERS))


class Peer(Optimizer[PeerSettings]):
    """A PyTorch optimizer on the mean gradient, its parameters shaped as the layers' tensors."""

    settings_type = PeerSettings

    def start(self) -> None:
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        parts = np.split(np.array(self.parameters), ends[:-1])
        self.tensors = [
            torch.nn.Parameter(torch.tensor(part.reshape(shape)))
            for part, shape in zip(parts, self.shapes, strict=True)
        ]
        self.peer = PEERS[self.settings.optimizer](self.tensors, self.rate)

    def direction(self, loss_and_gradient: LossAndGradient) -> tuple[Array, Array, Figures]:
        """Return d = (w − w')/α of the peer's step from w to w'."""
        first: list[tuple[float, Any]] = []

        def closure() -> torch.Tensor:
            self.parameters = self.held = self.flat()
            gradients, loss = self.evaluate(loss_and_gradient)
            mean = self.exchange.mean(gradients)
            first.append((loss, mean))
            start = 0
            for tensor in self.tensors:
                part = torch.from_numpy(mean[start : start + tensor.numel()].copy())
                tensor.grad, start = part.reshape(tensor.shape), start + tensor.numel()
            return torch.tensor(loss)

        before = self.parameters
        for group in self.peer.param_groups:
            group["lr"] = self.rate
        if self.settings.optimizer == "lbfgs":
            self.peer.step(closure)
        else:
            closure()
            self.peer.step()
        loss, mean = first[0]
        direction = (before - self.flat()) / self.rate
        self.parameters = self.held = np.array(before)
        return mean, direction, {"loss": loss}

    def flat(self) -> Array:
        """Return the peer's parameters as one vector."""
        return np.concatenate([tensor.detach().numpy().ravel() for tensor in self.tensors])


def main(arguments: list[str]) -> int:
    """Run the study; return the exit code."""
    torch.set_num_threads(1)
    OPTIMIZERS["torch"] = Peer  # before the modules that list the methods are imported
    from qnewton_mpi.studies.compare import compare
    from qnewton_mpi.studies.plan import read_study

    world = Communicator()
    abort_on_exception(world)
    try:
        study, output = arguments
        compare(read_study(study), Path(output), 1, world)
    except (UserError, ValueError) as error:
        print(f"torch_peers: {error}; usage: torch_peers.py STUDY.toml STUDY.h5", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
