"""A deep autoencoder on images, data-parallel: encoder and its mirror, cross-entropy of the pixels.

mpiexec -n 2 python examples/autoencoder.py [--data mnist] [--widths 250 100 50 12] [--steps 300] [--method kronecker]
"""

import argparse
import itertools

import torch
from mpi4py import MPI

from qnewton_mpi.data import datasets
from qnewton_mpi.torch import QuasiNewton

BATCH, REPLICAS = 256, 8

parser = argparse.ArgumentParser()
parser.add_argument("--data", default=datasets.EMBEDDED)
parser.add_argument("--widths", type=int, nargs="+", default=[250, 100, 50, 12], help="of the encoder; the last, code")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--method", default="kronecker")
parser.add_argument("--lr", default=argparse.SUPPRESS)
options = parser.parse_args()
settings = {name: value for name, value in vars(options).items() if name == "lr"}

rank, ranks = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
splits = datasets.load(options.data, None)
train, test = (torch.tensor(split.images).flatten(1) / 255 for split in (splits.train, splits.test))

torch.manual_seed(options.seed)
sides = [train.shape[1], *options.widths]
sides += sides[-2::-1]
layers = []
for inputs, outputs in itertools.pairwise(sides):
    layers += [torch.nn.Linear(inputs, outputs), torch.nn.Tanh()]
    torch.nn.init.xavier_uniform_(layers[-2].weight)
    torch.nn.init.zeros_(layers[-2].bias)
code = 2 * len(options.widths) - 1
model = torch.nn.Sequential(*(layer for k, layer in enumerate(layers[:-1]) if k != code))  # code and logits are linear


def nats(images):
    """Return the cross-entropy of an image, the sum over its pixels, mean over the images."""
    total = torch.nn.functional.binary_cross_entropy_with_logits(model(images), images, reduction="sum")
    return total / len(images)


per_rank = max(1, REPLICAS // ranks)
rows = BATCH // ranks
optimizer = QuasiNewton(
    model.parameters(), samples=rows // per_rank, replicas_per_rank=per_rank, method=options.method, **settings
)
random = torch.Generator().manual_seed(options.seed * ranks + rank)  # each rank its own samples
recent = []
for step in range(1, options.steps + 1):
    images = train[torch.randint(len(train), (rows,), generator=random)]
    recent.append(optimizer.step(nats, images))
    if step % 50 == 0 or step == options.steps:
        if rank == 0:
            with torch.no_grad():
                print(f"step {step}: {sum(recent) / len(recent):.1f} nats an image, test {nats(test):.1f}", flush=True)
        recent.clear()
