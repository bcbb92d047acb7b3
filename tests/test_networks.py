"""Networks beside the convnet: perceptrons, PyTorch's, one's own; trained, resumed, read back, refused."""

import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from qnewton_mpi import cli, load, predictions, train
from qnewton_mpi.config import configured
from qnewton_mpi.data import datasets
from qnewton_mpi.errors import InterruptedRunError, UserError
from qnewton_mpi.hessian.spectrum import layer_spans
from qnewton_mpi.models.choice import build
from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.models.mlp import Mlp
from qnewton_mpi.models.reference import torch_layers
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.results.rows import rows, title
from qnewton_mpi.results.run import Run
from qnewton_mpi.spectrum import iterate_of, spectrum_of
from qnewton_mpi.training import loop

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SHORT = {"replicas": 4, "batch": 32, "steps": 4, "evaluate_every": 100, "progress": "off"}
MLP = {"model": "mlp", "hidden": "12,8"}
RESNET = {"model": "resnet", "blocks": "1,1", "width": 4}
OWN = {"model": "own_networks:Net"}
ALL = [MLP, RESNET, OWN]
SHAPE = (1, 28, 28)


def batch(replicas, count, dtype=np.float64):
    random = np.random.default_rng(0)
    images = random.standard_normal((replicas, count, *SHAPE)).astype(dtype)
    return images, random.integers(0, 10, (replicas, count)).astype(np.uint8)


def own(name, dtype=np.float64, **more):
    about = {"kind": "own", "factory": f"own_networks:{name}", "input_shape": SHAPE, "classes": 10, "seed": 3}
    return build(about, dtype=dtype, **more)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count", [3, 70])
@pytest.mark.parametrize(
    "make", [lambda **more: Mlp(SHAPE, (12, 8), "relu", 10, **more), lambda **more: Convnet(SHAPE, "tanh", **more)]
)
def test_gradients_are_pytorchs(make, count, smoothing):
    network = make(dtype=np.float64, smoothing=smoothing)
    w, (images, labels) = network.initial_parameters(0), batch(2, count)
    losses, gradients = network.losses_and_gradients(w, images, labels)
    np.testing.assert_allclose(network.losses(w, images, labels), losses, rtol=1e-12)
    peer = torch_layers(network, w)
    for r in range(2):
        logits, targets = peer(torch.tensor(images[r])), torch.tensor(labels[r]).long()
        expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        found = torch.cat([g.reshape(-1) for g in torch.autograd.grad(expected, list(peer.parameters()))])
        assert losses[r] == pytest.approx(expected.item(), rel=1e-12)
        np.testing.assert_allclose(gradients[r], found, rtol=1e-9, atol=1e-13)


def test_a_module_is_the_network_of_its_layers():
    ours, theirs = (kind(np.float64) for kind in (lambda d: Mlp(SHAPE, (12, 8), "tanh", 10, dtype=d), peer_of))
    w, (images, labels) = theirs.initial_parameters(3), batch(3, 5)
    points = w + 0.01 * np.random.default_rng(1).standard_normal((3, len(w)))
    for parameters in (w, points):
        for found, wanted in zip(
            *(n.losses_and_gradients(parameters, images, labels) for n in (theirs, ours)), strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(theirs.losses(w, images, labels), ours.losses(w, images, labels), rtol=1e-12)
    np.testing.assert_allclose(theirs.log_probabilities(w, images[0]), ours.log_probabilities(w, images[0]), rtol=1e-10)
    assert theirs.parameter_shapes == ours.parameter_shapes
    assert [a.shape for a in theirs.named(w).values()] == [a.shape for a in ours.named(w).values()]
    q = np.random.default_rng(2).standard_normal(len(w))
    single = Mlp(SHAPE, (12, 8), "tanh", 10, dtype=np.complex128)
    np.testing.assert_allclose(
        theirs.hessian_times(w, q, images[0], labels[0]),
        single.hessian_times(w, q, images[0], labels[0]),
        rtol=1e-8,
        atol=1e-12,
    )


def peer_of(dtype):
    return own("perceptron", dtype)


def test_what_is_drawn_at_random_follows_from_the_seeds():
    network, (images, labels) = own("Net"), batch(2, 6)
    images[1], labels[1] = images[0], labels[0]
    w = network.initial_parameters(3)
    state = torch.get_rng_state()
    losses, gradients = network.losses_and_gradients(w, images, labels, [5, 6])
    assert losses[0] != losses[1]
    np.testing.assert_array_equal(network.losses(w, images, labels, [5, 6]), losses)
    np.testing.assert_array_equal(network.losses(w, images, labels, [6, 5]), losses[::-1])
    again = network.losses_and_gradients(w, images, labels, [5, 6])[1]
    np.testing.assert_array_equal(again, gradients)
    assert torch.equal(torch.get_rng_state(), state)


def test_statistics_are_what_pytorch_makes_of_them():
    network, (images, labels) = own("Net"), batch(2, 6)
    assert list(network.named(np.arange(network.size + 9)))[-3:] == [
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    np.testing.assert_array_equal(network.statistics, [0] * 4 + [1] * 4 + [0])
    network.losses_and_gradients(network.initial_parameters(3), images, labels, [5, 6])
    module = network.torch_layers(np.append(network.initial_parameters(3), network.statistics))["network"].train()
    assert not module.mask.isfinite().any()
    for r in range(2):
        other = network.torch_layers(np.append(network.initial_parameters(3), network.statistics))["network"].train()
        other(torch.tensor(images[r]))
        np.testing.assert_allclose(network.seen[r, :4], other.norm.running_mean, rtol=1e-12)
        np.testing.assert_allclose(network.seen[r, 4:8], other.norm.running_var, rtol=1e-12)
        assert network.seen[r, 8] == 1


@pytest.mark.parametrize("options", ALL)
def test_goes_on_bit_for_bit(options, tmp_path):
    """Stopped after its first checkpoint and gone on with, it is the run that was left alone."""
    longer = SHORT | {"steps": 6}
    train(**longer, **options, output=tmp_path / "whole.h5")
    stopped = {
        **longer,
        **options,
        "output": tmp_path / "run.h5",
        "checkpoint": tmp_path / "saved",
        "checkpoint_every": 2,
    }
    with pytest.raises(InterruptedRunError):
        loop.train(
            configured(None, stopped, 1), Communicator(), halted=lambda: any((tmp_path / "saved").glob("step-*"))
        )
    assert 0 < len(Run(tmp_path / "run.h5").steps["step"]) < 6
    train(**stopped, resume=True)
    whole, run = (Run(tmp_path / name, "") for name in ("whole.h5", "run.h5"))
    np.testing.assert_array_equal(run.steps["loss"], whole.steps["loss"])
    np.testing.assert_array_equal(run.last("ema_train_nll"), whole.last("ema_train_nll"))
    for name, array in whole.parameters.items():
        np.testing.assert_array_equal(run.parameters[name], array)
    for which in ("last", "ema"):
        saved, written = (load(tmp_path / name, which) for name in ("saved", "run.h5"))
        for name, array in written.parameters.items():
            np.testing.assert_array_equal(saved.parameters[name], array)


@pytest.mark.parametrize("options", ALL)
def test_the_same_run_on_two_ranks(options, qnewton, tmp_path):
    shutil.copy(HERE / "own_networks.py", tmp_path)
    words = [word for name, value in (SHORT | options).items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--method", "momentum", "--lr", "0.05"]
    for ranks in (1, 2):
        finished = qnewton(ranks, "train", *words, "--output", f"{ranks}.h5", cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
    one, two = (Run(tmp_path / f"{ranks}.h5", "") for ranks in (1, 2))
    np.testing.assert_allclose(two.steps["loss"], one.steps["loss"], rtol=1e-5)  # float32
    for name, array in one.parameters.items():
        np.testing.assert_allclose(two.parameters[name], array, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", ALL)
def test_a_model_is_as_right_as_its_run_was(options, tmp_path, monkeypatch):
    train(**SHORT, **options, output=tmp_path / "run.h5")
    for which, prefix in (("last", ""), ("ema", "ema_")):
        model = load(tmp_path / "run.h5", which)
        found = predictions.predict(model)
        assert found.nll == pytest.approx(model.history[f"{prefix}test_nll"][-1], rel=1e-5)
        images = datasets.load(datasets.EMBEDDED).test.images[:20]
        np.testing.assert_allclose(model.torch()(torch.tensor(images)).detach(), model(images), rtol=1e-4, atol=1e-5)
    with h5py.File(tmp_path / "run.h5") as file:
        if options is OWN:
            assert np.abs(file["parameters/norm.running_mean"][()]).max() > 0
            assert file["parameters/norm.num_batches_tracked"][()] == SHORT["steps"]
    if options is MLP:  # needs NumPy alone
        monkeypatch.setitem(sys.modules, "torch", None)
        load(tmp_path / "run.h5")


def test_spectra(tmp_path):
    pairs = {}
    for name, options in {"ours": MLP, "theirs": {"model": "own_networks:perceptron"}}.items():
        train(**SHORT, **options, output=tmp_path / f"{name}.h5")
        iterate = iterate_of(tmp_path / f"{name}.h5")
        found = spectrum_of(iterate, Communicator(), 2, 64, by_layer=name == "ours")
        pairs[name] = found.pairs.values
    assert list(layer_spans(Mlp(SHAPE, (12, 8), "tanh", 10))) == ["layer 1, 12×784", "layer 2, 8×12", "layer 3, 10×8"]
    assert all(np.isfinite(values).all() for values in pairs.values())
    train(**SHORT, model="own_networks:cubes", output=tmp_path / "run.h5")
    with pytest.raises(UserError, match="own_networks:cubes: has no second derivatives in PyTorch"):
        spectrum_of(iterate_of(tmp_path / "run.h5"), Communicator(), 1, 8)


def test_tables_and_pictures_say_the_network(tmp_path):
    for name, options in {"a": MLP, "b": MLP | {"hidden": "20"}, "c": {}}.items():
        train(**SHORT | {"steps": 1}, **options, output=tmp_path / f"{name}.h5")
    runs = [Run(tmp_path / f"{name}.h5") for name in "abc"]
    assert title(runs[:1]) == "mlp 12,8 (tanh), fashion-mnist-sample, batch 32"
    assert title(runs[:2]) == "mlp, fashion-mnist-sample, batch 32"
    assert title(runs[2:]) == "convnet (tanh), fashion-mnist-sample, batch 32"
    assert [name.split(", ", 1)[1] for name in rows(runs)] == ["mlp 12,8 (tanh)", "mlp 20 (tanh)", "convnet (tanh)"]


def test_a_study_of_networks(qnewton, tmp_path):
    shutil.copy(HERE / "own_networks.py", tmp_path)
    common = 'seeds = [0]\n[common]\nsteps = 2\nbatch = 32\nreplicas = 2\nmethod = "sgd"\nlr = 0.1\n'
    rows_of_it = '[[row]]\nname = "mlp"\nmodel = "mlp"\nhidden = ["8", "12,8"]\n'
    (tmp_path / "s.toml").write_text(f'{common}{rows_of_it}[[row]]\nname = "own"\nmodel = "own_networks:Net"\n')
    for times in (3, 0):  # what is there is not done again
        finished = qnewton(2, "compare", "s.toml", "--output", "s.h5", cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr.count("final: train NLL") == times
    with (tmp_path / "s.toml").open("a") as file:
        file.write('hidden = "8"\n')
    finished = qnewton(2, "compare", "s.toml", "--output", "s.h5", cwd=tmp_path)
    assert finished.returncode == 2
    assert "s.toml, line 15: row 'own': --hidden is an option of --model mlp, not of own_net" in finished.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--model own_networks:number", "own_networks:number: makes int, and must make a torch.nn.Module"),
        ("--model own_networks:deep", "own_networks:deep: needs an argument depth: give it a default"),
        ("--model own_networks:gone", "own_networks.py has no function or class gone"),
        ("--model own_networks:thousand", "makes (2, 1000) of 2 images of 1×28×28, and must make logits of 10 classes"),
        ("--model own_networks:elsewhere", "does not take images of 1×28×28: RuntimeError: mat1 and mat2"),
        ("--model own_networks:made", "own_networks:made: fails when it is called: TypeError"),
        ("--model leaves:Net", "importing leaves fails (SystemExit: 0)"),
        ("--model own_networks:constant", "has no parameters that require a gradient"),
        ("--model own_networks:lazy", "has no shape yet: have the factory call the module once"),
        ("--model nothing_here:Net", "there is no module nothing_here, here or installed"),
        ("--model own_networks.py:Net", "there is no module own_networks.py, here or installed: leave out .py"),
        ("--model broken:Net", "importing broken fails (SyntaxError"),
        ("--model lenet", "model = lenet: must be convnet, mlp, resnet, or MODULE:FACTORY"),
        ("--model own", "model = own: must be convnet"),
        ("--hidden 12", "--hidden is an option of --model mlp, not of convnet"),
        ("--model mlp --blocks 1", "--blocks is an option of --model resnet, not of mlp"),
        ("--model own_networks:Net --activation tanh", "--activation is an option of --model convnet, mlp, resnet"),
        ("--model mlp --hidden 12,0", "hidden = 12,0: must be whole numbers with commas between them"),
    ],
)
def test_what_will_not_do_is_told_in_a_line(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def Net(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    code = cli.run(["train", *words.split(), "--output", "run.h5", "--progress", "off", "--steps", "1"])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert told in error
    assert not (tmp_path / "run.h5").exists()


@pytest.mark.parametrize("options", [RESNET, OWN])
def test_without_torch(options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith(("qnewton_mpi.models", "qnewton_mpi.adapter"))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=rf"--model {options['model']} needs PyTorch: pip install"):
        train(**SHORT, **options, output=tmp_path / "run.h5")


def test_a_module_that_has_changed_since(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # both files are as long, and of the same second
    text = "from torch.nn import *\ndef make():\n    return Sequential(Flatten(), Linear(784, {}), Linear({}, 10))\n"
    Path("changing.py").write_text(text.format(7, 7))
    train(**SHORT | {"steps": 1}, model="changing:make", output="run.h5")
    Path("changing.py").write_text(text.format(9, 9))
    sys.modules.pop("changing")
    with pytest.raises(UserError, match=r"changing:make: 1.weight is another than in the run: the module has changed"):
        load("run.h5")
    Path("changing.py").unlink()
    sys.modules.pop("changing")
    with pytest.raises(UserError, match="there is no module changing"):
        load("run.h5")


TURNED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.{} = nn.Linear(784, 784)
        self.{} = nn.Linear(784, 784)
        self.out = nn.Linear(784, 10)

    def forward(self, images):
        return self.out(self.a(self.b(images.flatten(1)).tanh()))
"""


def test_parameters_of_the_same_shapes_in_another_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # both files are as long, and of the same second
    options = {**SHORT, "steps": 1, "model": "turned:Net", "output": "run.h5", "method": "sgd", "lr": 0.1}
    Path("turned.py").write_text(TURNED.format("a", "b"))
    train(**options, checkpoint="saved")
    Path("turned.py").write_text(TURNED.format("b", "a"))
    sys.modules.pop("turned")
    for path in ("run.h5", "saved"):
        with pytest.raises(UserError, match=r"turned:Net: a.weight is another than in the run"):
            load(path)
        with pytest.raises(UserError, match=r"turned:Net: a.weight is another than in the run"):
            train(**options | {"output": "other.h5"}, init_from=path)
    with pytest.raises(UserError, match=r"--resume: saved.* is of another run: a.weight was another"):
        train(**options | {"steps": 2}, checkpoint="saved", resume=True)
    sys.modules.pop("turned")
