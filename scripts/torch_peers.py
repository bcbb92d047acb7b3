"""Run a study whose rows may name optimizers of PyTorch packages, on the same network, parameters and batches.

Usage: mpiexec -n 2 python scripts/torch_peers.py STUDY.toml STUDY.h5       needs the extra `peers`

It is `qnewton-mpi compare` with one method more, `torch`, whose option `optimizer` is one of PEERS. The gradients are
this package's own (they equal PyTorch's to rounding, and are faster); what differs between rows is the optimizer alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from extended_study import run

from qnewton_mpi.core.optimizers import Optimizer, Settings
from qnewton_mpi.core.optimizers.values import Array, Figures, LossAndGradient
from qnewton_mpi.core.settings import POSITIVE, one_of, setting
from qnewton_mpi.models.reference import torch_layers

Module = torch.nn.Module


def soap(module: Module, rate: float) -> torch.optim.Optimizer:
    """SOAP (Vyas et al. 2024, arXiv 2409.11321), no weight decay, biases preconditioned too."""
    from pytorch_optimizer import SOAP

    return SOAP(module.parameters(), lr=rate, weight_decay=0.0, precondition_1d=True)


def _heavyball() -> Any:
    import heavyball

    heavyball.utils.compile_mode = None  # compiling takes longer than these runs
    return heavyball


def soap_heavyball(module: Module, rate: float) -> torch.optim.Optimizer:
    """SOAP of the package heavyball, at its defaults but for the weight decay."""
    return _heavyball().SOAP(module.parameters(), lr=rate, weight_decay=0.0)


def shampoo(module: Module, rate: float) -> torch.optim.Optimizer:
    """Shampoo (Anil et al. 2020, arXiv 2002.09018), grafted to AdaGrad, its roots renewed every 10 steps."""
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(
        module.parameters(), lr=rate, preconditioning_compute_steps=10, start_preconditioning_step=10
    )


def psgd(module: Module, rate: float) -> torch.optim.Optimizer:
    """PSGD with Kronecker factors (Li 2018, arXiv 1512.04202; Li et al. 2024)."""
    return _heavyball().PSGDKron(module.parameters(), lr=rate)


def muon(module: Module, rate: float) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) with AdamW for the biases."""
    return _heavyball().Muon(module.parameters(), lr=rate, weight_decay=0.0)


def lbfgs(module: Module, rate: float) -> torch.optim.Optimizer:
    """L-BFGS, one iteration with up to 4 more gradients for a strong-Wolfe line search on each batch."""
    return torch.optim.LBFGS(module.parameters(), lr=rate, max_iter=1, max_eval=5, line_search_fn="strong_wolfe")


def kfac(module: Module, rate: float) -> torch.optim.Optimizer:
    """K-FAC as singd has it: dense Kronecker factors, inverse-free, renewed every 4 steps (Lin et al. 2024)."""
    from singd.optim.optimizer import SINGD

    return SINGD(module, lr=rate, T=4, kfac_like=True)


PEERS: dict[str, Callable[[Module, float], torch.optim.Optimizer]] = {
    "soap": soap,
    "soap-heavyball": soap_heavyball,
    "shampoo": shampoo,
    "psgd": psgd,
    "muon": muon,
    "lbfgs": lbfgs,
    "kfac": kfac,
}
WATCHING = {"kfac"}  # see the activations: PyTorch has to compute their gradients itself


@dataclass(frozen=True)
class PeerSettings(Settings):
    """Settings of `torch`."""

    lr: float | str = setting(0.003, "learning rate", POSITIVE)
    optimizer: str = setting("soap", ", ".join(PEERS), one_of(*PEERS))


class Peer(Optimizer[PeerSettings]):
    """A PyTorch optimizer on the mean gradient of one rank's replicas."""

    settings_type = PeerSettings

    def direction(self, loss_and_gradient: LossAndGradient) -> tuple[Array, Array, Figures]:
        """Return d = (w − w')/α of the peer's step from w to w'."""
        name = self.settings.optimizer
        if self.steps == 1:
            self.module = torch_layers(loss_and_gradient.network, self.parameters)  # type: ignore[attr-defined]
            self.peer = PEERS[name](self.module, self.rate)
        evaluated: list[tuple[float, Any]] = []

        def closure() -> torch.Tensor:
            self.parameters = self.held = self.flat()
            evaluated.append((self.watched if name in WATCHING else self.handed)(loss_and_gradient))
            return torch.tensor(evaluated[-1][0])

        before = self.parameters
        for group in self.peer.param_groups:
            group["lr"] = self.rate
        if name == "lbfgs":
            self.peer.step(closure)
        else:
            closure()
            self.peer.step()
        loss, mean = evaluated[0]
        direction = (before - self.flat()) / self.rate
        self.parameters = self.held = np.array(before)
        return mean, direction, {"loss": loss}

    def handed(self, loss_and_gradient: LossAndGradient) -> tuple[float, Array]:
        """Hand this package's gradient to the module's parameters; return the loss and the gradient."""
        gradients, loss = self.evaluate(loss_and_gradient)
        mean = self.exchange.mean(gradients)
        start = 0
        for tensor in self.module.parameters():
            tensor.grad = torch.tensor(mean[start : start + tensor.numel()]).reshape(tensor.shape)
            start += tensor.numel()
        return loss, mean

    def watched(self, loss_and_gradient: Any) -> tuple[float, Array]:
        """Have PyTorch compute the gradient; return the loss and the gradient."""
        rows = [loss_and_gradient.order.indices(loss_and_gradient.step, replica) for replica in self.exchange.local]
        images, labels = loss_and_gradient.split.batch(np.concatenate(rows))
        self.evaluations += self.exchange.replicas
        self.peer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.module(torch.tensor(images)), torch.tensor(labels).long())
        loss.backward()
        return loss.item(), torch.cat([tensor.grad.ravel() for tensor in self.module.parameters()]).numpy()

    def flat(self) -> Array:
        """Return the module's parameters as one vector."""
        return torch.nn.utils.parameters_to_vector(self.module.parameters()).detach().numpy().copy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run(sys.argv[1:], {"torch": Peer}))
