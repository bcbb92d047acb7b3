"""What a run leaves: parameters by name, normalisation and origin in its file, and the model that `load` makes."""

import csv
import io
import json
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest

from qnewton_mpi import cli, load, origin, predictions, train, trained
from qnewton_mpi.data import datasets
from qnewton_mpi.errors import MissingPackageError, UserError
from qnewton_mpi.files.images import write_image
from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.models.description import Description
from qnewton_mpi.results.provenance import provenance
from qnewton_mpi.training.saved import Saved, read

pytestmark = pytest.mark.slow

OPTIONS = {
    "method": "sgd",
    "lr": 0.05,
    "replicas": 2,
    "batch": 32,
    "steps": 8,
    "evaluate_every": 100,
    "progress": "off",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the file of a run, run.h5, and its checkpoints, saved."""
    path = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "4711")
        patch.setenv("SOME_TOKEN", "a secret of the environment")
        train(**OPTIONS, output=path / "run.h5", checkpoint=path / "saved")
    return path


@pytest.fixture(scope="module")
def pictures():
    return datasets.load(datasets.EMBEDDED).test.images[:50]


def changed(folder, path, change):
    """Write a run's file with something changed."""

    def fill(file):
        with h5py.File(folder / "run.h5") as source:
            for name in source:
                source.copy(name, file)
            file.attrs.update(source.attrs)
        change(file)

    write_image(path, "run", fill)
    return path


@pytest.mark.parametrize(("which", "prefix"), [("last", ""), ("ema", "ema_"), ("tail", "tail_")])
def test_a_model_is_as_right_as_its_run_was(folder, which, prefix):
    model = load(folder / "run.h5", which)
    found = predictions.predict(model)
    assert found.part == "test"
    assert found.nll == pytest.approx(model.history[f"{prefix}test_nll"][-1], rel=1e-5)
    assert found.accuracy == pytest.approx(model.history[f"{prefix}test_accuracy"][-1], abs=6e-4)  # of one image
    assert predictions.predict(model, part="train").nll == pytest.approx(
        model.history[f"{prefix}train_nll"][-1], rel=1e-5
    )
    nlls = [model.history[f"{name}test_nll"][-1] for name in ("", "ema_", "tail_")]
    assert np.ptp(nlls) > 1e-3  # so that one cannot be taken for another


def test_a_checkpoint_is_the_same_model(folder):
    for which in ("last", "ema"):
        pairs = zip(*(load(folder / name, which).parameters.items() for name in ("run.h5", "saved")), strict=True)
        for (name, one), (other_name, other) in pairs:
            assert name == other_name
            np.testing.assert_array_equal(one, other)
    assert load(folder / "saved").description == load(folder / "run.h5").description
    with pytest.raises(UserError, match="mean of the last quarter is in the run's file"):
        load(folder / "saved", "tail")
    with pytest.raises(UserError, match="which = 'first': must be one of last, ema, tail, best"):
        load(folder / "run.h5", "first")


def test_parameters_are_in_the_file_by_name_and_shape(folder):
    shapes = dict(zip(("conv1.weight", "conv1.bias"), [(8, 1, 5, 5), (8,)], strict=True))
    with h5py.File(folder / "run.h5") as file:
        found = {name: array.shape for name, array in file["parameters"].items()}
        network = json.loads(file.attrs["network"])
    assert list(found.items())[:2] == list(shapes.items())
    model = load(folder / "run.h5")
    assert found == {name: array.shape for name, array in model.parameters.items()}
    assert network["network"]["kind"] == "convnet"
    assert (network["classes"][0], model.classes[-1]) == ("T-shirt/top", "Ankle boot")
    train_images = datasets.load(datasets.EMBEDDED).train.images
    assert network["mean"] == pytest.approx([train_images.mean()], rel=1e-6)
    assert network["deviation"] == pytest.approx([train_images.std()], rel=1e-6)


def test_images_as_files_have_them(folder, pictures):
    model = load(folder / "run.h5")
    wanted = model(pictures)
    np.testing.assert_allclose(np.exp(wanted).sum(axis=1), 1, rtol=1e-5)
    grey = pictures[:, 0]
    for images in (grey, grey[..., None], grey.astype(float), pictures.astype(np.int64)):
        np.testing.assert_allclose(model(images), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model.predict(grey), wanted.argmax(axis=1))
    assert model(grey[:0]).shape == (0, 10)


def test_images_that_will_not_do(folder, pictures):
    model = load(folder / "run.h5")
    for images in (pictures[0, 0], pictures[:, :, :27], np.array("image"), pictures.astype(str)):
        with pytest.raises(UserError, match=r"must be numbers, \(n, 1, 28, 28\) or .* or \(n, 28, 28\)"):
            model(images)
    for images in (pictures / 255, (pictures - 73.0) / 90, pictures * 2.0):
        with pytest.raises(UserError, match=r"trained on 0 … 255: give them as their files have them"):
            model(images)


@pytest.fixture
def coloured(tmp_path):
    """A model of images of three channels that differ."""
    network = Convnet((3, 32, 32), "relu", classes=4)
    about = Description(network.description, (10.0, 100.0, 200.0), (5.0, 50.0, 20.0), "uint8", tuple("abcd"))
    return trained.Model(Saved(tmp_path, {"": network.initial_parameters(0)}, {}, about.text()))


def test_channels_first_or_last(coloured):
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), np.uint8)
    np.testing.assert_array_equal(coloured(images.transpose(0, 2, 3, 1)), coloured(images))
    about, network = coloured.description, coloured._network
    mean, deviation = (np.array(constants)[:, None, None] for constants in (about.mean, about.deviation))
    wanted = network.log_probabilities(network.initial_parameters(0), ((images - mean) / deviation).astype("f4"))
    np.testing.assert_allclose(coloured(images), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"must be numbers, \(n, 3, 32, 32\) or \(n, 32, 32, 3\)$"):
        coloured(images[:, 0])


def test_many_images_are_taken_in_pieces(coloured, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), np.uint8)
    wanted, counts, compute = coloured(images), [], coloured._network.log_probabilities

    def counted(parameters, pixels):
        counts.append(len(pixels))
        return compute(parameters, pixels)

    monkeypatch.setattr(coloured._network, "log_probabilities", counted)
    monkeypatch.setattr(trained, "AT_A_TIME", 3)
    np.testing.assert_allclose(coloured(images), wanted, rtol=1e-5)
    assert counts == [3, 3, 1]


def test_as_a_torch_module(folder, coloured, pictures):
    torch = pytest.importorskip("torch")
    colours = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), np.uint8)
    for model, images in ((load(folder / "run.h5"), pictures), (coloured, colours)):
        module = pickle.loads(pickle.dumps(model.torch()))
        np.testing.assert_allclose(module(torch.tensor(images)).detach(), model(images), rtol=1e-4, atol=1e-4)
        assert [name for name, _ in module.named_parameters()] == list(model.parameters)
        assert [name for name, _ in module.named_buffers()] == ["normalisation.mean", "normalisation.deviation"]
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(model))(images), model(images))


def test_without_torch(coloured, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "qnewton_mpi.models.reference", raising=False)
    with pytest.raises(MissingPackageError, match=r"a model as a module needs PyTorch: pip install .*\[torch\]"):
        coloured.torch()


def flat_alone(file):
    """Make a file what earlier versions wrote."""
    values = np.concatenate([array[()].ravel() for array in file["parameters"].values()])
    del file["parameters"], file.attrs["network"]
    file["parameters"] = values


def replaced(old, new):
    return lambda file: file.attrs.__setitem__("network", file.attrs["network"].replace(old, new))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flat_alone, "is of an earlier version, and says nothing of the normalisation: train again"),
        (replaced('"convnet"', '"resnet"'), "is of a network that this version does not know"),
        (replaced('"activation"', '"activations"'), "is of a network that this version does not know"),
        (replaced("{", ""), "is of a network that this version does not know"),
        (replaced("[42, 32]", "[42, 33]"), "has 15,924 parameters, and its network takes 15,9"),
        (lambda file: file["parameters/conv1.bias"].__setitem__(0, np.nan), "are not finite: the run diverged"),
    ],
)
def test_files_that_cannot_be_used(folder, tmp_path, change, told):
    path = changed(folder, tmp_path / "run.h5", change)
    with pytest.raises(UserError, match=told):
        load(path)


def test_parameters_of_earlier_files_are_still_read(folder, tmp_path):
    path = changed(folder, tmp_path / "run.h5", flat_alone)
    np.testing.assert_array_equal(read(path).flat, read(folder / "run.h5").flat)


def test_averages_come_with_the_end(folder, tmp_path):
    path = changed(folder, tmp_path / "run.h5", lambda file: file.__delitem__("ema_parameters"))
    with pytest.raises(UserError, match="has no ema parameters: they come with the end of a run"):
        load(path, "ema")


def test_the_origin_is_in_the_file(folder, monkeypatch):
    options = load(folder / "run.h5").options
    assert options["slurm_job"] == "4711"
    assert options["date"].endswith("+00:00")
    assert options.get("git_commit") == origin.commit()
    assert b"a secret" not in (folder / "run.h5").read_bytes()
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert provenance()["slurm_job"] is None


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    monkeypatch.setattr(origin, "ROOT", tmp_path)
    monkeypatch.setattr(origin, "_source", dict)
    commit = origin.commit.__wrapped__
    assert commit() is None
    git("init")
    assert commit() is None  # nothing is committed
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "one")
    found = commit()
    assert len(found) == 40
    (tmp_path / "file").write_text("two")
    assert commit() == f"{found}-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit() is None
    monkeypatch.setattr(origin, "ROOT", tmp_path / "nowhere")
    monkeypatch.setattr(origin, "_source", lambda: {"url": "https://a/b", "vcs_info": {"commit_id": "abc"}})
    assert commit() == "abc"


def said_by(capsys, *arguments):
    code = cli.run([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_predict_writes_a_table(folder, tmp_path, capsys):
    path = tmp_path / "predictions.csv"
    code, said = said_by(capsys, "predict", folder / "run.h5", "--output", path)
    assert code == 0, said
    assert "test: 2,000 samples, NLL" in said
    rows = list(csv.reader(io.StringIO(path.read_text())))
    model, test = load(folder / "run.h5"), datasets.load(datasets.EMBEDDED).test
    assert rows[0] == ["sample", "label", "predicted", *(f"log p({name})" for name in model.classes)]
    values = np.array([row[3:] for row in rows[1:]], float)
    np.testing.assert_allclose(values, model(test.images), rtol=1e-5)
    assert [row[:3] for row in rows[1:]] == [
        [str(k), model.classes[label], model.classes[best]]
        for k, (label, best) in enumerate(zip(test.labels, model.predict(test.images), strict=True))
    ]
    assert "exists" in said_by(capsys, "predict", folder / "run.h5", "--output", path)[1]
    assert said_by(capsys, "predict", folder / "run.h5", "--output", path, "--overwrite")[0] == 0
    path.write_text("precious")
    assert "is not a table" in said_by(capsys, "predict", folder / "run.h5", "--output", path, "--overwrite")[1]


def test_predict_writes_hdf5(folder, tmp_path, capsys):
    path = tmp_path / "predictions.h5"
    for _ in range(2):
        command = ("predict", folder / "saved", "--which", "ema", "--part", "test", "--output", path, "--overwrite")
        assert said_by(capsys, *command)[0] == 0
    test = datasets.load(datasets.EMBEDDED).test
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["labels"], test.labels)
        np.testing.assert_array_equal(file["predicted"], np.argmax(file["log_probabilities"], axis=1))
        np.testing.assert_array_equal(file["log_probabilities"], load(folder / "saved", "ema")(test.images))
        assert file["classes"][0] == b"T-shirt/top"


def test_evaluate_draws_what_is_confused(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    code, said = said_by(capsys, "evaluate", folder / "run.h5", "--output", tmp_path / "confusion.png")
    found = predictions.predict(load(folder / "run.h5"))
    assert (code, said.splitlines()[0]) == (0, predictions.text(found))
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert found.confusion.sum(axis=1).tolist() == np.bincount(found.labels).tolist()
    assert np.trace(found.confusion) == round(found.accuracy * 2000)


def test_what_cannot_be_evaluated(folder, tmp_path, capsys):
    other = changed(folder, tmp_path / "run.h5", lambda file: file.attrs.__setitem__("data_digest", "another"))
    for arguments, told in (
        ((other,), "are not the data that the run had"),
        ((folder / "run.h5", "--part", "none"), "has no none part: there are train, test"),
        ((folder / "missing.h5",), "missing.h5: no such file"),
        ((folder / "run.h5", "--which", "first"), "must be one of last, ema, tail, best"),
        ((folder / "run.h5", "--which", "best"), "has no best parameters: no part was held out (--validation)"),
    ):
        code, said = said_by(capsys, "evaluate", *arguments)
        assert (code, said.count("\n")) == (2, 1)
        assert told in said
    assert said_by(capsys, "evaluate", other, "--data", datasets.EMBEDDED)[0] == 0


def test_classes_go_by_their_names(coloured, tmp_path):
    """Another data set may have fewer classes, so that its labels count otherwise."""
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), np.uint8)
    labels = np.array([coloured.classes[k] for k in coloured.predict(images)])
    assert 1 < len(set(labels)) < len(coloured.classes)
    np.savez(tmp_path / "leaves.npz", images=images, labels=labels)
    assert predictions.predict(coloured, str(tmp_path / "leaves.npz")).accuracy == 1
    labels[0] = "z"
    np.savez(tmp_path / "leaves.npz", images=images, labels=labels)
    with pytest.raises(UserError, match=r"leaves: has a class z, which .* does not know"):
        predictions.predict(coloured, str(tmp_path / "leaves.npz"))
