"""SGD, momentum and Adam against PyTorch's."""

import numpy as np
import pytest
from problems import REPLICAS, SIZE, Quadratic, make_optimizer, trajectory


@pytest.mark.parametrize(
    ("variant", "peer", "options"),
    [
        ("sgd", "SGD", {}),
        ("heavy-ball", "SGD", {"momentum": 0.9}),
        ("nesterov", "SGD", {"momentum": 0.9, "nesterov": True}),
        ("adam", "Adam", {}),
        ("nadam", "NAdam", {}),
    ],
)
def test_first_order_methods_are_pytorchs(communicator, variant, peer, options):
    torch = pytest.importorskip("torch")
    problem = Quadratic(SIZE, REPLICAS)
    ours = trajectory(make_optimizer(variant, problem, communicator, REPLICAS, lr=0.03), problem, 30)
    w = torch.tensor(problem.start, requires_grad=True)
    other = getattr(torch.optim, peer)([w], lr=0.03, **options)
    for k in range(30):
        w.grad = torch.tensor(np.mean([problem(w.detach().numpy(), i)[1] for i in range(REPLICAS)], axis=0))
        other.step()
        # PyTorch keeps NAdam's product of momenta in float32.
        np.testing.assert_allclose(ours[k], w.detach().numpy(), rtol=1e-6 if peer == "NAdam" else 1e-12)
