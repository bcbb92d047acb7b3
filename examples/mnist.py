"""A PyTorch convnet on images, data-parallel.

mpiexec -n 4 python examples/mnist.py [--data fashion-mnist] [--epochs 5] [--method kronecker]

Lines that differ from a script for one process end with #.
"""

import argparse

import torch
from mpi4py import MPI  #

from qnewton_mpi.data import datasets
from qnewton_mpi.torch import QuasiNewton  #

parser = argparse.ArgumentParser()
parser.add_argument("--data", default=datasets.EMBEDDED)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--method", default="kronecker")
options = parser.parse_args()

rank, ranks = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size  #
splits = datasets.load(options.data, None)
train, test = (
    torch.utils.data.TensorDataset(torch.tensor(images), torch.tensor(labels).long())
    for images, labels in (split.batch(slice(None)) for split in (splits.train, splits.test))
)
sampler = torch.utils.data.DistributedSampler(train, ranks, rank)  #
loader = torch.utils.data.DataLoader(train, 256 // ranks, sampler=sampler, drop_last=True)  #

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(splits.input_shape[0], 16, 5),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(2),
    torch.nn.Conv2d(16, 16, 3),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(2),
    torch.nn.Flatten(),
    torch.nn.LazyLinear(10),
)
model(train[0][0][None])  # the lazy layer's shape
optimizer = QuasiNewton(model.parameters(), samples=256 // ranks, method=options.method)  #

for epoch in range(options.epochs):
    sampler.set_epoch(epoch)
    for inputs, targets in loader:

        def closure(inputs=inputs, targets=targets):  #
            """Leave the gradients of the loss, and return it."""
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss  #

        mean = optimizer.step(closure)  #
    if rank == 0:
        with torch.no_grad():
            right = (model(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean()
        print(f"epoch {epoch + 1}: loss {mean:.4f}, test accuracy {right:.2%}", flush=True)
