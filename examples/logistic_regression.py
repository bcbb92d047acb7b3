"""Softmax regression on images, its gradient in NumPy, by any method of the core on any number of ranks.

mpiexec -n 2 python examples/logistic_regression.py [200 kronecker]
"""

import sys

import numpy as np

from qnewton_mpi.core.create import create
from qnewton_mpi.data import datasets

steps, method, *words = sys.argv[1:] or ["200", "kronecker"]
train, samples, replicas = datasets.load(datasets.EMBEDDED, None).train, 64, 8


def loss_and_gradient(w, replica):
    """Return the mean negative log-likelihood of a replica's samples, drawn anew at each step, and its gradient."""
    rows = np.random.default_rng([optimizer.steps, replica]).choice(len(train), samples)
    images, labels = train.batch(rows)
    inputs = np.column_stack([images.reshape(samples, -1), np.ones(samples, np.float32)])
    logits = inputs @ w.reshape(10, 785).T
    logits -= logits.max(axis=1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    residuals = np.exp(logp) - np.eye(10, dtype=np.float32)[labels]
    return -logp[range(samples), labels].mean(), (residuals.T @ inputs / samples).ravel()


settings, start = dict(word.split("=") for word in words), np.zeros(7850, np.float32)
optimizer = create(method, start, replicas, samples, shapes=[(10, 785)], **settings)
losses = [optimizer.step(loss_and_gradient)["loss"] for _ in range(int(steps))]
if optimizer.exchange.communicator.rank == 0:
    print(f"loss {losses[0]:.4f}, mean of the last 20 steps {np.mean(losses[-20:]):.4f}")
