"""The same network in PyTorch (extra `torch`): what the gradients are tested against and timed beside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.models.layers import ConvPoolShape
from qnewton_mpi.parallel.device import Array, to_host

if TYPE_CHECKING:
    import torch


def torch_convnet(network: Convnet, parameters: Array) -> torch.nn.Sequential:
    """Return a PyTorch module of a convnet's layers, dtype and parameters; its own order of the parameters is ours."""
    import torch

    activation = torch.nn.Tanh if network.activation.tanh else torch.nn.ReLU
    layers: list[torch.nn.Module] = []
    for shape in network.shapes:
        if isinstance(shape, ConvPoolShape):
            channels, filters = shape.input_shape[0], shape.filters
            layers += [torch.nn.Conv2d(channels, filters, shape.kernel), activation(), torch.nn.MaxPool2d(2)]
        else:
            if not any(isinstance(layer, torch.nn.Flatten) for layer in layers):
                layers.append(torch.nn.Flatten())
            layers.append(torch.nn.Linear(shape.inputs, shape.outputs))
            if shape.activated:
                layers.append(activation())
    flat = torch.tensor(to_host(parameters))
    module = torch.nn.Sequential(*layers).to(flat.dtype)
    torch.nn.utils.vector_to_parameters(flat, module.parameters())
    return module
