"""The state of a PyTorch optimizer and its model: saved, loaded, copied, or refused."""

import copy
import io
import pickle

import pytest
import torch
from torch_models import METHODS, fails, once, perceptron, prepared

from qnewton_mpi.torch import QuasiNewton


@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("exchange", ["allgather", "sliced"])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_state_goes_on_bitwise(tmp_path, method, exchange, model_first):
    model = perceptron()
    optimizer, closure = prepared(model, method=method, exchange=exchange)
    for _ in range(12):
        optimizer.step(closure)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    expected = [optimizer.step(closure) for _ in range(8)]
    torch.manual_seed(5)
    again = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer, closure = prepared(again, method=method, exchange=exchange)
    states = torch.load(tmp_path / "state.pt")
    loads = [lambda: optimizer.load_state_dict(states[1]), lambda: again.load_state_dict(states[0])]
    for load in reversed(loads) if model_first else loads:
        load()
    assert [optimizer.step(closure) for _ in range(8)] == expected


def saved_size(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.tell()


def test_a_model_is_saved_and_copied_as_with_any_optimizer(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1))
    model.tied = model[0].weight
    peer = copy.deepcopy(model)
    optimizer = QuasiNewton(model.parameters(), samples=64, method="sgd")
    for one, other in ((model, peer), (model.state_dict(), peer.state_dict()), (model[2], peer[2])):
        assert saved_size(one) == saved_size(other)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    before = model[0].weight.detach().clone()
    model[2](model[0](torch.ones(1, 50))).sum().backward()
    once(optimizer, torch.tensor(1.0))
    assert (model[0].weight != before).any()
    assert (average.module[0].weight == before).all()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, tmp_path / "model")
    safetensors.load_model(peer, tmp_path / "model")
    assert (peer[0].weight == model[0].weight).all()


def test_an_optimizer_is_not_copied():
    optimizer, _ = prepared(perceptron())
    for copied in (copy.copy, copy.deepcopy, pickle.dumps, saved_size):
        fails(r"state_dict\(\)", lambda: copied(optimizer))  # noqa: B023


def garbage(state):
    """Yield what is no state of the optimizer that the state is of."""
    yield from (None, 5, "state", [], {}, {**state, "core": None}, {**state, "digest": 5}, {**state, "state": []})
    yield torch.optim.Adam(perceptron().parameters()).state_dict()
    for key in state:
        yield {k: v for k, v in state.items() if k != key}
    for path, tensor in state["core"].items():
        for other in (tensor.double() if tensor.dtype != torch.float64 else tensor.float(), tensor[None], None, "x"):
            yield {**state, "core": {**state["core"], path: other}}
        if tensor.is_floating_point():
            yield {**state, "core": {**state["core"], path: tensor * float("nan")}}
        yield {**state, "core": {p: t for p, t in state["core"].items() if p != path}}
    yield {**state, "core": {**state["core"], "more": torch.ones(1)}}
    for key in state["origin"]:
        yield {**state, "origin": {**state["origin"], key: 7}}
    group = state["param_groups"][0]
    for groups in ([], [group, group], [None], [5], [{}], [{**group, "params": [0]}], [{**group, "params": 5}]):
        yield {**state, "param_groups": groups}
    for change in ({"lr": "x"}, {"lr": float("nan")}, {"betas": 1}):
        yield {**state, "param_groups": [{**group, **change}]}


@pytest.mark.parametrize("method", ["kronecker", "fisher", "deflated", "adam"])
def test_what_is_no_state_is_told_and_changes_nothing(method):
    """Nor does half of one change anything."""
    pair = [prepared(perceptron(), method=method) for _ in range(2)]
    for _ in range(3):
        for optimizer, closure in pair:
            optimizer.step(closure)
    optimizer, closure = pair[0]
    for bad in garbage(optimizer.state_dict()):
        fails(".", lambda: optimizer.load_state_dict(bad))  # noqa: B023
    assert [optimizer.step(closure) for _ in range(5)] == [pair[1][0].step(pair[1][1]) for _ in range(5)]
