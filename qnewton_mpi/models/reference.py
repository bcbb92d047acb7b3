"""Networks in PyTorch (extra `torch`): to test gradients against and to time beside, and trained ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch

from qnewton_mpi.arrays import Array, to_host
from qnewton_mpi.models.layered import Layered
from qnewton_mpi.models.layers import ConvPoolShape


class Normalisation(torch.nn.Module):
    """(p − mean)/deviation of the pixels of each channel, which are buffers; the first layer of a trained network.

    Parameters
    ----------
    mean, deviation : (C, 1, 1)
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, mean: Array, deviation: Array) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (n, C, H, W), of any type, in that of the buffers."""
        return (images.to(self.mean.dtype) - self.mean) / self.deviation


def torch_layers(network: Layered, parameters: Array) -> torch.nn.Sequential:
    """Return a PyTorch module of a network's layers, dtype and parameters; their order and their names are ours."""
    activation = getattr(torch.nn, network.activation.module)
    layers: OrderedDict[str, torch.nn.Module] = OrderedDict()
    for name, shape in zip(network.layer_names, network.shapes, strict=True):
        if isinstance(shape, ConvPoolShape):
            layers[name] = torch.nn.Conv2d(shape.input_shape[0], shape.filters, shape.kernel)
        else:
            layers.setdefault("flatten", torch.nn.Flatten())
            layers[name] = torch.nn.Linear(shape.inputs, shape.outputs)
        if isinstance(shape, ConvPoolShape) or shape.activated:
            layers[f"{name}_activation"] = activation()
        if isinstance(shape, ConvPoolShape):
            layers[f"{name}_pool"] = torch.nn.MaxPool2d(2)
    flat = torch.tensor(to_host(parameters))
    module = torch.nn.Sequential(layers).to(flat.dtype)
    torch.nn.utils.vector_to_parameters(flat, module.parameters())
    return module


def with_ends(layers: Mapping[str, torch.nn.Module], mean: Array, deviation: Array) -> torch.nn.Sequential:
    """Return a module of layers by name, from images as files have them, (n, C, H, W), to log-probabilities (n, K)."""
    ends = Normalisation(mean, deviation), torch.nn.LogSoftmax(dim=1)
    return torch.nn.Sequential(OrderedDict([("normalisation", ends[0]), *layers.items(), ("log_softmax", ends[1])]))
