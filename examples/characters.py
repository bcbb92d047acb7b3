"""A small transformer that learns the characters of a text, data-parallel.

mpiexec -n 2 python examples/characters.py [--text README.md] [--steps 200] [--method kronecker]

Embeddings, layer norms and attention: nothing that the optimizer has to know about.
"""

import argparse
from pathlib import Path

import torch
from mpi4py import MPI

from qnewton_mpi.torch import QuasiNewton

LENGTH, WIDTH, BATCH = 32, 48, 64

parser = argparse.ArgumentParser()
parser.add_argument("--text", default=Path(__file__).parent.parent / "README.md", type=Path)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--method", default="kronecker")
parser.add_argument("--lr", default=argparse.SUPPRESS)
options = parser.parse_args()

rank, ranks = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
text = options.text.read_text()
alphabet = sorted(set(text))
codes = torch.tensor([alphabet.index(character) for character in text])


class Transformer(torch.nn.Module):
    """Predicts the next character of each position."""

    def __init__(self):
        super().__init__()
        self.characters = torch.nn.Embedding(len(alphabet), WIDTH)
        self.positions = torch.nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = torch.nn.Linear(WIDTH, len(alphabet))

    def forward(self, x):
        """Return the logits (batch, LENGTH, characters)."""
        mask = torch.nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.out(self.layers(self.characters(x) + self.positions, mask=mask, is_causal=True))


torch.manual_seed(0)
model = Transformer()
settings = {name: value for name, value in vars(options).items() if name == "lr"}
per_rank = 1 if ranks > 1 else 2  # replicas: the methods look at how they differ
rows = BATCH // ranks
samples = rows // per_rank * LENGTH  # of a replica: characters that it predicts
optimizer = QuasiNewton(
    model.parameters(), samples=samples, replicas_per_rank=per_rank, method=options.method, **settings
)


def nats(texts):
    """Return the mean negative log-likelihood of each next character of texts (n, LENGTH + 1)."""
    logits = model(texts[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten())


random = torch.Generator().manual_seed(rank)  # each rank its own samples

recent = []
for step in range(1, options.steps + 1):
    starts = torch.randint(len(codes) - LENGTH - 1, (rows, 1), generator=random)
    batch = codes[starts + torch.arange(LENGTH + 1)]
    recent.append(optimizer.step(nats, batch))
    if step % 50 == 0 or step == options.steps:
        if rank == 0:
            print(f"step {step}: {sum(recent) / len(recent):.3f} nats a character", flush=True)
        recent.clear()
