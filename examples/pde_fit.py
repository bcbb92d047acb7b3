"""The diffusivity k(x) of u_t = (k u_x)_x from 64 noisy experiments, by its discrete adjoint; a replica has 8 of them.

mpiexec -n 2 python examples/pde_fit.py [200 kronecker]
"""

import sys

import numpy as np

from qnewton_mpi.core.create import create

steps, method, *words = sys.argv[1:] or ["200", "kronecker"]
random, x, noise = np.random.default_rng(0), np.linspace(0, 1, 41), 0.2
truth, D = np.exp(np.sin(6 * x) + np.cos(5 * x) / 2), 41 * (np.eye(41, 40) - np.eye(41, 40, -1))  # u = 0 at both ends
L = np.column_stack([np.ones(41), 0.1 * np.tri(41)[:, 1:]])  # log k = L w: for normal w a random walk along x


def solve(k, u):
    """Return what a step of implicit Euler multiplies with, and the states after each of 10."""
    inverse = np.linalg.inv(np.eye(40) + 0.002 * D.T @ (k[:, None] * D))
    return inverse, np.stack([u := inverse @ u for _ in range(10)])


def loss_and_gradient(w, replica):
    """Return the nats of an observation, mean over the replica's, and of a normal prior of w."""
    k, mine, a = np.exp(L @ w), slice(replica, None, 8), 0
    inverse, u = solve(k, starts[:, mine])
    residuals = (u - observed[..., mine]) / noise
    adjoints = np.stack([a := inverse @ (a + r / noise) for r in residuals[::-1]])[::-1]
    gradient = L.T @ (-0.002 * k * ((D @ adjoints) * (D @ u)).sum(axis=(0, 2))) / u.size + w / observed.size
    return (residuals**2).mean() / 2 + w @ w / 2 / observed.size, gradient


starts = np.sin(np.pi * np.outer(x[1:], range(1, 9))) @ random.standard_normal((8, 64))
observed = solve(truth, starts)[1] + noise * random.standard_normal((10, 40, 64))
optimizer = create(method, np.zeros(41), 8, samples=3200, **dict(word.split("=") for word in words))
losses = [optimizer.step(loss_and_gradient)["loss"] for _ in range(int(steps))]
if optimizer.exchange.communicator.rank == 0:
    error = np.linalg.norm(np.exp(L @ optimizer.parameters) - truth) / np.linalg.norm(truth)
    print(f"loss {losses[0]:.4f}, last {losses[-1]:.8f}, error of k {error:.2%}")
