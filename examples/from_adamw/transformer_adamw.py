"""A transformer that learns the characters of a text, with a weight decay by groups, warm-up and decay."""

import argparse
from pathlib import Path

import torch

LENGTH, WIDTH, BATCH, STEPS = 32, 48, 64, 200
RATE = 0.03  # AdamW ends at 1.62, 1.16, 1.06, 1.39 with 0.003, 0.01, 0.03, 0.1

text = Path(argparse.__file__).read_text()[:32768]
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


def nats(texts):
    """Return the mean negative log-likelihood of each next character of texts (n, LENGTH + 1)."""
    return torch.nn.functional.cross_entropy(model(texts[:, :-1]).flatten(0, 1), texts[:, 1:].flatten())


torch.manual_seed(0)
model = Transformer()
groups = [
    {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
    {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=RATE)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1, (STEPS - step) / 50))

for _ in range(STEPS):
    starts = torch.randint(len(codes) - LENGTH - 1, (BATCH, 1))
    batch = codes[starts + torch.arange(LENGTH + 1)]
    optimizer.zero_grad()
    loss = nats(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()

model.eval()
with torch.no_grad():
    loss = nats(codes.unfold(0, LENGTH + 1, LENGTH))
print(f"training loss {loss:.4f}")
