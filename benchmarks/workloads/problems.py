"""The workloads: a model, its batches, its loss, how it is judged. None of them knows who trains it.

All in one module, of more than 300 lines: each is a few, and one that is added is read beside the others.
"""

from __future__ import annotations

import functools
import math
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import networks
from qnewton_mpi.data import datasets
from qnewton_mpi.errors import UserError
from qnewton_mpi.files.whole import read_whole
from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.models.reference import torch_layers

Batch = tuple[Tensor, ...]
REPLICAS = 8
HELD_OUT = 4000  # images at most
# Of Python's standard library, without what later versions have dropped: a text that is on every machine. The version
# of Python stands with each run.
# fmt: off
MODULES = [
    "poplib", "ssl", "pathlib", "contextvars", "numbers", "tabnanny", "stat", "trace", "symtable", "codeop", "os",
    "_pydecimal", "threading", "traceback", "smtplib", "fileinput", "optparse", "zipfile", "pydoc", "inspect",
    "weakref", "statistics", "random", "copy", "graphlib", "pkgutil", "_compat_pickle", "netrc", "filecmp",
    "_weakrefset", "pdb", "__future__", "_strptime", "opcode", "sysconfig", "tty", "tokenize", "reprlib", "zipapp",
    "hmac", "__hello__", "plistlib", "_aix_support", "secrets", "tarfile", "subprocess", "ipaddress", "_pyio",
    "keyword", "configparser", "decimal", "colorsys", "enum",
]
# fmt: on


@dataclass(frozen=True)
class Problem(ABC):
    """A workload.

    Attributes
    ----------
    name, about : str
    steps : int
    samples : int
        B, the independent predictions of a batch.
    minimum : float
        What is taken from a loss before losses are compared: the least that can be had, where it is known.
    floor : float
        What is left then counts as this at least: below is rounding.
    signed : bool
        The loss may be negative: compared by differences, not ratios.
    data : str, optional
        A data set by name.
    folder : str, optional
        Where its files are.
    """

    name: str
    about: str
    steps: int
    samples: int
    minimum: float = 0.0
    floor: float = 0.0
    signed: bool = False
    data: str | None = None
    folder: str | None = None

    def model(self, seed: int) -> nn.Module:
        """Return the network, its parameters drawn by the seed."""
        torch.manual_seed(seed)
        return self.network()

    @abstractmethod
    def network(self) -> nn.Module:
        """Return the network, drawn from the present state of PyTorch's random numbers."""

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield batches without end, the same for all who ask with the seed."""
        random = torch.Generator().manual_seed(1000 + seed)
        while True:
            yield from self.draw(random)

    @abstractmethod
    def draw(self, random: torch.Generator) -> Iterator[Batch]:
        """Yield some batches: one, or an epoch's."""

    @abstractmethod
    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Return the mean loss of a batch, or of a replica's share of one."""

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> float:
        """Return the mean loss of some batches, the model as it is used."""
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        losses = [(len(batch[0]), self.loss(model, *(part.to(device) for part in batch)).item()) for batch in batches]
        model.train(training)
        return sum(n * loss for n, loss in losses) / sum(n for n, _ in losses)

    @property
    @abstractmethod
    def held_out(self) -> list[Batch]:
        """What is never trained on."""

    @property
    def images(self) -> datasets.Dataset:
        """The data set; read once, also for workloads that differ in their batches only."""
        assert self.data is not None
        return _read(self.data, self.folder)


class Images(Problem):
    """Classes of images: epochs of batches in a random order, normalised, the last rows left out."""

    def draw(self, random: torch.Generator) -> Iterator[Batch]:
        """Yield an epoch."""
        train = self.images.train
        order = torch.randperm(len(train), generator=random).numpy()
        for start in range(0, len(order) - self.samples + 1, self.samples):
            images, labels = train.batch(order[start : start + self.samples])
            yield self.seen(torch.tensor(images), random), torch.tensor(labels).long()

    def seen(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Return images as they are trained on."""
        return images

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Return the mean negative log-likelihood."""
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    @cached_property
    def held_out(self) -> list[Batch]:
        """The first of the test images."""
        images, labels = self.images.test.batch(slice(HELD_OUT))
        return list(zip(torch.tensor(images).split(500), torch.tensor(labels).long().split(500), strict=True))


class ConvnetImages(Images):
    """The poster's network, tanh."""

    def network(self) -> nn.Module:
        """Return the network with the package's own initial parameters, of PyTorch's seed."""
        network = Convnet(self.images.input_shape, "tanh")
        return torch_layers(network, network.initial_parameters(torch.initial_seed()))


class ResNet(Images):
    """ResNet-8 with batch norm, random crops and flips."""

    def network(self) -> nn.Module:
        """Return the network."""
        return networks.resnet8()

    def seen(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Return each image moved by up to 4 pixels and perhaps mirrored."""
        n, sides = len(images), torch.arange(32)
        padded = functional.pad(images, (4, 4, 4, 4))
        top, left = (torch.randint(9, (n, 1), generator=random) for _ in range(2))
        rows, columns = top + sides, left + sides
        columns = torch.where(torch.rand(n, 1, generator=random) < 0.5, columns.flip(1), columns)
        one = torch.arange(n)[:, None, None, None]
        return padded[one, torch.arange(3)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


class Mlp(Images):
    """Wide dense layers, ReLU."""

    def network(self) -> nn.Module:
        """Return 784-512-512-10."""
        return networks.dense(784, 512, 512, 10)


class Softmax(Images):
    """Softmax regression from zero: convex."""

    def network(self) -> nn.Module:
        """Return one dense layer, all zero."""
        layer = nn.Linear(784, 10)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return nn.Sequential(nn.Flatten(), layer)


class Autoencoder(Problem):
    """A deep autoencoder: cross-entropy of the pixels, the sum over an image."""

    def network(self) -> nn.Module:
        """Return 784-250-100-50-12 and its mirror."""
        return networks.autoencoder(784, (250, 100, 50, 12))

    def draw(self, random: torch.Generator) -> Iterator[Batch]:
        """Yield a batch of images, drawn with replacement."""
        rows = torch.randint(len(self.images.train), (self.samples,), generator=random)
        yield (self.pixels(self.images.train.images[rows.numpy()]),)

    def pixels(self, images: Any) -> Tensor:
        """Return (n, 784) between 0 and 1."""
        return torch.tensor(images).flatten(1) / 255

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Return the nats of an image."""
        (images,) = batch
        return functional.binary_cross_entropy_with_logits(model(images), images, reduction="sum") / len(images)

    @cached_property
    def held_out(self) -> list[Batch]:
        """The first of the test images."""
        return [(part,) for part in self.pixels(self.images.test.images[:HELD_OUT]).split(500)]


class Language(Problem):
    """The next letter of each position: rows of a text, drawn at random; its last tenth is held out."""

    length: int

    @property
    @abstractmethod
    def codes(self) -> Tensor:
        """The text, as numbers."""

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.samples // self.length

    def cut(self, codes: Tensor, rows: int, random: torch.Generator) -> Tensor:
        """Return rows of a text, one letter longer than what a model sees."""
        starts = torch.randint(len(codes) - self.length - 1, (rows, 1), generator=random)
        return codes[starts + torch.arange(self.length + 1)]

    def draw(self, random: torch.Generator) -> Iterator[Batch]:
        """Yield a batch."""
        yield (self.cut(self.codes[: int(0.9 * len(self.codes))], self.rows, random),)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Return the nats of a letter."""
        (rows,) = batch
        return functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    @cached_property
    def held_out(self) -> list[Batch]:
        """The same rows for all."""
        random = torch.Generator().manual_seed(99)
        return [(self.cut(self.codes[int(0.9 * len(self.codes)) :], 64, random),) for _ in range(8)]


class Text(Language):
    """A small GPT on the bytes of Python's own library."""

    length = 64

    def network(self) -> nn.Module:
        """Return the GPT."""
        return networks.GPT(self.length)

    @cached_property
    def codes(self) -> Tensor:
        """Some 2 MB."""
        return torch.tensor(np.frombuffer(library(*MODULES), np.uint8).astype(np.int64))


class Characters(Language):
    """A small transformer of PyTorch's own layers on the characters of one module of Python's library."""

    length = 32

    @cached_property
    def codes(self) -> Tensor:
        """Some 100,000 characters, as places in the alphabet of those that occur."""
        return torch.tensor(np.unique(np.frombuffer(library("argparse"), np.uint8), return_inverse=True)[1])

    def network(self) -> nn.Module:
        """Return the transformer."""
        return networks.Transformer(int(self.codes.max()) + 1, self.length, 48)


class Linear(Problem):
    """y linear in x without noise: what a newcomer tries first."""

    def network(self) -> nn.Module:
        """Return one layer."""
        return nn.Linear(8, 1)

    def draw(self, random: torch.Generator) -> Iterator[Batch]:
        """Yield new points."""
        x = torch.randn(self.samples, 8, generator=random)
        yield x, x.sum(1, keepdim=True)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Return the mean squared error."""
        x, y = batch
        return ((model(x) - y) ** 2).mean()

    @cached_property
    def held_out(self) -> list[Batch]:
        """Other points."""
        return [next(self.batches(77))]


class Gaussian(Linear):
    """y ~ N(μ(x), σ(x)²), both learnt: a likelihood of densities, whose loss falls below zero."""

    def network(self) -> nn.Module:
        """Return a network of one hidden layer, to μ and log σ."""
        return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))

    def draw(self, random: torch.Generator) -> Iterator[Batch]:
        """Yield new points."""
        x = torch.randn(self.samples, 4, generator=random)
        yield x, torch.sin(x.sum(1, keepdim=True)) + 0.01 * torch.randn(self.samples, 1, generator=random)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Return the nats of a density."""
        x, y = batch
        mean, log_deviation = model(x).chunk(2, dim=1)
        return (0.5 * ((y - mean) / log_deviation.exp()) ** 2 + log_deviation).mean() + 0.5 * math.log(2 * math.pi)


class Pde(Problem):
    """A diffusivity from 64 noisy experiments, all in each batch, as in examples/pde_fit.py."""

    def network(self) -> nn.Module:
        """Return the solver, log k = 0."""
        return networks.Diffusivity()

    def experiments(self, seed: int) -> Batch:
        """Return starts (64, 40) and noisy observations (64, 10, 40), in the order of the replicas of the example."""
        random, x = np.random.default_rng(seed), np.linspace(0, 1, 41)
        truth = torch.tensor(np.exp(np.sin(6 * x) + np.cos(5 * x) / 2))
        starts = np.sin(np.pi * np.outer(x[1:], range(1, 9))) @ random.standard_normal((8, 64))
        states = networks.Diffusivity().states(truth, torch.tensor(starts.T))
        noisy = states + 0.2 * torch.tensor(random.standard_normal((10, 40, 64))).permute(2, 0, 1)
        order = torch.arange(64).reshape(8, 8).T.flatten()
        return torch.tensor(starts.T)[order], noisy[order]

    def draw(self, random: torch.Generator) -> Iterator[Batch]:
        """Yield all there is."""
        yield self.observed

    @cached_property
    def observed(self) -> Batch:
        """All there is."""
        return self.experiments(0)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Return the nats of an observation, and its part of the normal prior of w."""
        starts, observed = batch
        w = next(model.parameters())
        misfit = (((model(starts) - observed) / 0.2) ** 2).mean() / 2
        return misfit + w @ w / 2 / self.observed[1].numel()

    @cached_property
    def held_out(self) -> list[Batch]:
        """Other experiments."""
        return [self.experiments(1)]


PROBLEMS: dict[str, Callable[[str | None], Problem]] = {}


def _add(kind: type[Problem], name: str, about: str, steps: int, samples: int, **more: Any) -> None:
    PROBLEMS[name] = lambda folder: kind(name, about, steps, samples, folder=folder, **more)


# The cheap ones first: the suite goes by this order.
_add(Linear, "linear", "`nn.Linear(8, 1)`, no noise", 200, 256, floor=1e-6)
_add(Gaussian, "gaussian", "mean and deviation, 4-32-2", 400, 256, signed=True)
# The minimum by L-BFGS in double precision to a gradient of 1e-9.
_add(Pde, "pde", "diffusivity, full batch", 150, 25600, minimum=0.497024780221, floor=1e-8)
_add(Softmax, "softmax", "regression, Fashion-MNIST (embedded)", 200, 512, data=datasets.EMBEDDED)
_add(Autoencoder, "autoencoder", "250-100-50-12, MNIST", 200, 256, data="mnist")
_add(Characters, "characters", "transformer, one module's text", 200, 64 * 32)
_add(Mlp, "mlp", "784-512-512-10, MNIST", 300, 256, data="mnist")
_add(ConvnetImages, "convnet-mnist", "the poster's network", 400, 256, data="mnist")
_add(ConvnetImages, "convnet-fashion", "the same, Fashion-MNIST (embedded)", 400, 256, data=datasets.EMBEDDED)
_add(ConvnetImages, "convnet-cifar10", "the same, CIFAR-10", 400, 256, data="cifar10")
_add(Text, "text", "GPT on bytes", 300, 32 * 64)
_add(ResNet, "resnet", "ResNet-8, batch norm, augmented CIFAR-10", 200, 128, data="cifar10")


def load(name: str, folder: str | None = None) -> Problem:
    """Return a workload by name; its data are read when they are first asked for.

    Raises
    ------
    UserError
        For a name that there is not.
    """
    if name not in PROBLEMS:
        raise UserError(f"no workload is called {name!r:.60}: there are {', '.join(PROBLEMS)}")
    return PROBLEMS[name](folder)


def library(*modules: str) -> bytes:
    """Return the source of modules of Python's library, one after the other.

    Raises
    ------
    UserError
        Where Python has come without them.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    packages = {name: folder / name / "__init__.py" for name in modules}  # zipfile is one from Python 3.12 on
    places = (found if found.exists() else folder / f"{name}.py" for name, found in packages.items())
    return b"".join(read_whole(place) for place in places)


@functools.cache
def _read(data: str, folder: str | None) -> datasets.Dataset:
    return datasets.load(data, folder)
