"""Networks of one's own, as a user writes them: `--model own_networks:Net`."""

import torch
from torch import nn


class Net(nn.Module):
    """With running statistics, random numbers, a parameter without a gradient, and buffers that do not change."""

    def __init__(self, num_classes, width=4):
        super().__init__()
        self.convolution = nn.Conv2d(1, width, 5)
        self.norm = nn.BatchNorm2d(width)
        self.rest = nn.Sequential(nn.ReLU(), nn.MaxPool2d(6), nn.Flatten(), nn.Dropout(0.3))
        self.dense = nn.Linear(16 * width, num_classes)
        self.frozen = nn.Parameter(torch.randn(num_classes), requires_grad=False)
        self.register_buffer("mask", torch.full((3,), -torch.inf))

    def forward(self, images):
        return self.dense(self.rest(self.norm(self.convolution(images)))) + 0.1 * self.frozen


def perceptron(input_shape, classes):
    """Be the network of `--model mlp --hidden 12,8`."""
    layers = [nn.Flatten(), nn.Linear(input_shape[1] * input_shape[2], 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, classes))


def cubes():
    """Have no second derivative."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), Cubes())


class Cubes(nn.Module):
    def forward(self, x):
        return Cube.apply(x)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return 3 * x**2 * gradient


def number():
    return 3


def deep(depth):
    return perceptron((1, 28, 28), 10)


def thousand():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 1000))


def elsewhere():
    return nn.Linear(4, 4)


made = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))  # where a factory is to be


def constant():
    return nn.Flatten()


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
