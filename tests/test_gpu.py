"""On a GPU, with CuPy: the same numbers as NumPy's. Skipped where there is none."""

import numpy as np
import pytest
from problems import CUPY, VARIANTS, Quadratic, Together, make_optimizer

from qnewton_mpi import load, train
from qnewton_mpi.arrays import to_host
from qnewton_mpi.core.exchange import EXCHANGES
from qnewton_mpi.core.kernels import combination, inner
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import build
from qnewton_mpi.data import datasets
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.models.convnet import DENSE_WIDTHS, Convnet
from qnewton_mpi.models.layers import ACTIVATIONS
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.predictions import predict
from qnewton_mpi.results.run import Run
from qnewton_mpi.training.replicas import ReplicaLoss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CUPY is None, reason="no GPU, or no CuPy")]


@pytest.fixture(scope="module")
def communicator():
    return Communicator()


def test_kernels():
    random = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        x, y = random.standard_normal((2, 1000)).astype(dtype)
        on_gpu = [CUPY.asarray(a) for a in (x, y)]
        tolerance = 10 * np.finfo(dtype).eps
        result = combination(0.3, on_gpu[0], -1.7, on_gpu[1])
        assert result.dtype == dtype
        np.testing.assert_allclose(result.get(), 0.3 * x - 1.7 * y, rtol=tolerance, atol=tolerance)
        assert combination(1.0, on_gpu[0], 2.0, on_gpu[1], out=on_gpu[0]) is on_gpu[0]
        np.testing.assert_allclose(on_gpu[0].get(), x + 2 * y, rtol=tolerance, atol=tolerance)
        assert float(inner(*(CUPY.asarray(a) for a in (x, y)))) == pytest.approx(float(x.astype("f8") @ y), rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [Quadratic, Together])
def test_methods(communicator, kind, variant):
    points = []
    for xp in (np, CUPY):
        problem = kind(12, 6, xp=xp)
        optimizer = make_optimizer(variant, problem, communicator, 6)
        for _ in range(5):
            optimizer.step(problem)
        assert isinstance(optimizer.parameters, xp.ndarray)
        points.append(to_host(optimizer.parameters))
    np.testing.assert_allclose(*points, rtol=1e-10)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", list(DENSE_WIDTHS))
def test_gradients_of_the_convnet(shape, activation, replicas):
    random = np.random.default_rng(0)
    images = random.standard_normal((replicas, 40, *shape))
    labels = random.integers(0, 10, (replicas, 40))
    results = []
    for xp in (np, CUPY):
        network = Convnet(shape, activation, xp, dtype=np.float64)
        w = network.initial_parameters(0)
        results.append(network.losses_and_gradients(w, xp.asarray(images), xp.asarray(labels)))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(to_host(theirs), ours, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("variant", ["kronecker", "fisher", "deflated", "multisecant"])
def test_steps_of_the_convnet(communicator, variant, exchange):
    method, options = VARIANTS[variant]
    kind, points = OPTIMIZERS[method], []
    for xp in (np, CUPY):
        dataset = datasets.load(datasets.EMBEDDED, None, xp, dtype=np.float64)
        network = Convnet(dataset.input_shape, "tanh", xp, dtype=np.float64)
        loss = ReplicaLoss(network, dataset.train, BatchOrder(len(dataset.train), 32, 8, seed=0))
        optimizer = kind(
            build(kind.settings_type, options),
            network.initial_parameters(0),
            EXCHANGES[exchange](communicator, 8, network.size),
            4,
            shapes=network.parameter_shapes,
        )
        for step in range(4):
            loss.step = step
            optimizer.step(loss)
        points.append(to_host(optimizer.parameters))
    np.testing.assert_allclose(*points, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_that_of_the_cpu(qnewton, tmp_path, ranks):
    """In float32, over few steps: rounding differs."""
    losses = []
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.h5"
        done = qnewton(ranks, "train", "--steps", 20, "--device", device, "--output", path, "--progress", "off")
        assert done.returncode == 0, done.stderr
        losses.append(Run(path).steps["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-2)


def test_a_run_goes_on_from_its_checkpoint(qnewton, tmp_path):
    common = ["--steps", 12, "--device", "cuda", "--progress", "off", "--checkpoint-every", 4]
    folder, whole, first = tmp_path / "checkpoints", tmp_path / "whole.h5", tmp_path / "first.h5"
    assert qnewton(1, "train", *common, "--output", whole, "--checkpoint", tmp_path / "other").returncode == 0
    options = [*common, "--output", first, "--checkpoint", folder]
    assert qnewton(1, "train", *options, "--time-limit", 1e-3).returncode == 75
    assert qnewton(1, "train", *options, "--resume").returncode == 0
    np.testing.assert_allclose(Run(first).steps["loss"], Run(whole).steps["loss"], rtol=1e-3)


@pytest.mark.parametrize("method", ["kronecker", "fisher", "sgd"])
def test_the_pytorch_adapter(method):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch without CUDA")
    from qnewton_mpi.torch import QuasiNewton

    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double().to(device)
        optimizer = QuasiNewton(model.parameters(), samples=16, replicas_per_rank=4, method=method)

        inputs = x.to(device)

        def closure(model=model, optimizer=optimizer, inputs=inputs):
            mine = optimizer.share(inputs)
            loss = ((model(mine) - mine[:, :1] * mine[:, 1:2]) ** 2).mean()
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        points.append(torch.cat([p.detach().reshape(-1).cpu() for p in model.parameters()]).numpy())
    np.testing.assert_allclose(*points, rtol=1e-8)


NETWORKS = [{"model": "mlp", "hidden": "12,8"}, {"model": "resnet", "blocks": "1,1"}, {"model": "own_networks:Net"}]


@pytest.mark.parametrize("options", NETWORKS)
def test_networks_beside_the_convnet(tmp_path, options):
    """Trained and gone on with on the GPU bit for bit; the first step is the CPU's, but for what is drawn at random."""
    pytest.importorskip("torch")
    common = {"replicas": 4, "batch": 64, "evaluate_every": 100, "progress": "off", "augment": "crop,flip", **options}
    common |= {"label_smoothing": 0.1, "validation": 0.1, "device": "cuda"}
    train(**common, steps=6, output=tmp_path / "whole.h5")
    for steps in (3, 6):
        saved = {"output": tmp_path / "run.h5", "checkpoint": tmp_path / "saved", "resume": True}
        train(**common, **saved, steps=steps)
    whole, run = (Run(tmp_path / name, "best_") for name in ("whole.h5", "run.h5"))
    np.testing.assert_array_equal(run.steps["loss"], whole.steps["loss"])
    assert predict(load(tmp_path / "run.h5")).nll == pytest.approx(run.last("test_nll"), rel=1e-3)
    if "own" not in options["model"]:
        train(**common | {"device": "cpu"}, steps=1, output=tmp_path / "cpu.h5")
        assert Run(tmp_path / "cpu.h5").steps["loss"][0] == pytest.approx(run.steps["loss"][0], rel=1e-3)
