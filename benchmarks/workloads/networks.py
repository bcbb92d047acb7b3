"""The networks of the workloads in PyTorch, as their authors would write them: nothing is made for an optimizer."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Attention and two dense layers, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, t, width)."""
        b, t, width = x.shape
        parts = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(b, t, width))
        return x + self.narrow(functional.gelu(self.wide(self.norm2(x))))


class GPT(nn.Module):
    """A small transformer on bytes, its embedding also its last layer, initialised as GPT-2."""

    def __init__(self, length: int, layers: int = 2, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks, self.norm = nn.ModuleList(Block(width, heads) for _ in range(layers)), nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0, 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for weight in (block.mix.weight, block.narrow.weight):
                nn.init.normal_(weight, 0, 0.02 / math.sqrt(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, t, 256)."""
        h = self.bytes(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.norm(h) @ self.bytes.weight.T


class Transformer(nn.Module):
    """PyTorch's own encoder layers with a causal mask, initialised as they are."""

    def __init__(self, alphabet: int, length: int, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, alphabet)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, t, characters)."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.out(self.layers(self.characters(x) + self.positions, mask=mask, is_causal=True))


class Residual(nn.Module):
    """Two convolutions with batch norm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, outputs, h, w)."""
        return functional.relu(self.norm2(self.second(functional.relu(self.norm1(self.first(x))))) + self.shortcut(x))


def resnet8(width: int = 16) -> nn.Sequential:
    """Return a ResNet of 8 layers for 32×32 images in colour and 10 classes."""
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return model


def dense(*widths: int) -> nn.Sequential:
    """Return dense layers of images, ReLU between them."""
    layers = [part for sides in itertools.pairwise(widths) for part in (nn.Linear(*sides), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def autoencoder(pixels: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Return an encoder and its mirror: tanh, the code and the logits linear."""
    sides = [pixels, *widths, *widths[-2::-1], pixels]
    layers: list[nn.Module] = []
    for k, (inputs, outputs) in enumerate(itertools.pairwise(sides), start=1):
        dense = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(dense.weight)
        nn.init.zeros_(dense.bias)
        layers.append(dense)
        if k not in (len(widths), len(sides) - 1):
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


class Diffusivity(nn.Module):
    """u_t = (k u_x)_x on (0, 1), u = 0 at both ends, by implicit Euler; log k = L w is a random walk for normal w.

    Attributes
    ----------
    w : (41,) float64, zero at the start
    """

    def __init__(self) -> None:
        super().__init__()
        ones = torch.ones(41, 41, dtype=torch.float64)
        walk = torch.cat([ones[:, :1], 0.1 * ones.tril()[:, 1:]], 1)
        difference = 41 * (torch.eye(41, dtype=torch.float64) - torch.diag(ones[0, 1:], -1))[:, :40]
        # Not buffers: nothing here is a running statistic.
        self.walk, self.difference = walk, difference
        self.w = nn.Parameter(torch.zeros(41, dtype=torch.float64))

    def forward(self, starts: Tensor) -> Tensor:
        """Return (n, 10, 40), the states after each of 10 steps, of starts (n, 40)."""
        return self.states(torch.exp(self.walk @ self.w), starts)

    def states(self, k: Tensor, starts: Tensor) -> Tensor:
        """Return (n, 10, 40) for a diffusivity k (41,)."""
        D = self.difference
        step = torch.linalg.inv(torch.eye(40, dtype=torch.float64) + 0.002 * D.T @ (k[:, None] * D))
        states = [starts]
        for _ in range(10):
            states.append(states[-1] @ step.T)
        return torch.stack(states[1:], 1)
