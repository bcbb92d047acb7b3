"""The shapes that the annotations of the core tell are those of what it is called with, and of what it returns."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import types
from typing import Annotated, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from problems import VARIANTS, Quadratic, make_optimizer

import qnewton_mpi.core
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.optimizers import BlockBFGS

SIZE, REPLICAS = 23, 5


def classes():
    for found in pkgutil.walk_packages(qnewton_mpi.core.__path__, "qnewton_mpi.core."):
        module = importlib.import_module(found.name)
        yield from (c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__)


class Shapes:
    """Compares values with annotations, and counts them."""

    def __init__(self, sizes):
        self.sizes, self.count = sizes, 0

    def fit(self, value, hint):
        """Tell whether a value has the shape of its annotation, if that says any."""
        origin, inside = get_origin(hint), get_args(hint)
        if origin is Annotated and isinstance(hint.__metadata__[0], str):
            axes = [self.sizes.get(name) for name in hint.__metadata__[0].split()]
            self.count += 1
            host = get_origin(inside[0]) is not np.ndarray or isinstance(value, np.ndarray)
            shape = getattr(value, "shape", None)
            return (
                host
                and shape is not None
                and len(shape) == len(axes)
                and all(axis in (None, length) for axis, length in zip(axes, shape, strict=True))
            )
        if origin in (Union, types.UnionType):
            return any(value is None if part is type(None) else self.fit(value, part) for part in inside)
        if origin is tuple and Ellipsis not in inside and isinstance(value, tuple):
            return all(self.fit(v, part) for v, part in zip(value, inside, strict=True))
        if origin is list:
            return all(self.fit(v, inside[0]) for v in value)
        return True

    def checked(self, function, hints):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*arguments, **options):
            for name, value in signature.bind(*arguments, **options).arguments.items():
                variadic = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
                for each in value if variadic else (value,):
                    assert self.fit(each, hints.get(name)), f"{function.__qualname__}: {name}"
            result = function(*arguments, **options)
            assert self.fit(result, hints.get("return")), f"{function.__qualname__}: what it returns"
            return result

        return call


def shaped(hints):
    return any("Annotated" in repr(hint) for hint in hints.values())


@pytest.fixture
def shapes(monkeypatch):
    """Return Shapes whose `sizes` are to be set."""
    shapes = Shapes({})
    for kind in classes():
        for name, function in list(vars(kind).items()):
            if name == "__init__" and dataclasses.is_dataclass(kind):
                hints = get_type_hints(kind, include_extras=True)
            elif (inspect.isfunction(function) and not name.startswith("__")) or name == "__init__":
                try:
                    hints = get_type_hints(function, include_extras=True)
                except NameError:  # of what is imported for annotations alone
                    continue
            else:
                continue
            if shaped(hints):
                monkeypatch.setattr(kind, name, shapes.checked(function, hints))
    return shapes


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("variant", [*VARIANTS, "block BFGS"])
def test_shapes_are_those_of_the_annotations(communicator, shapes, variant, exchange):
    problem = Quadratic(SIZE, REPLICAS)
    mover = EXCHANGES[exchange](communicator, REPLICAS, SIZE)
    held = len(range(SIZE)[mover.held])
    if variant == "kronecker":  # one layer, which one rank holds whole
        mover.divide([SIZE])
        held = len(range(SIZE)[mover.held])
    shapes.sizes = {"N": SIZE, "held": held, "M": REPLICAS, "R": len(mover.local)}
    if variant == "block BFGS":
        problem._centres[:] = problem._centres[0]
        optimizer = BlockBFGS(BlockBFGS.settings_type(), problem.start, mover)
    else:
        optimizer = make_optimizer(variant, problem, communicator, REPLICAS, exchange=exchange)
    for _ in range(3):
        optimizer.step(problem)
    assert shapes.count > 30


def test_another_shape_is_found(communicator, shapes):
    exchange = EXCHANGES["allgather"](communicator, REPLICAS, SIZE)
    shapes.sizes = {"N": SIZE, "held": SIZE}
    exchange.hold(np.zeros(SIZE))
    with pytest.raises(AssertionError, match="hold: vector"):
        exchange.hold(np.zeros(SIZE + 1))
    with pytest.raises(AssertionError, match="mean: rows"):
        exchange.mean(np.zeros(SIZE))
