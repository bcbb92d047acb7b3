"""Own data: arrays in .npz and HDF5 files, pictures in class folders, and what is held out of them."""

import fcntl
import os
import re
import shutil
import sys

import h5py
import numpy as np
import pytest

from qnewton_mpi.cli import run as command
from qnewton_mpi.config import resolve, run_config
from qnewton_mpi.data import datasets, parts, published
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.predictions import predict
from qnewton_mpi.results.rows import table
from qnewton_mpi.results.run import Run
from qnewton_mpi.spectrum import iterate_of, spectrum_of
from qnewton_mpi.studies.compare import compare
from qnewton_mpi.studies.plan import read_study
from qnewton_mpi.trained import load
from qnewton_mpi.training.loop import train

pytestmark = pytest.mark.slow

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (12, 8, 6, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
DISTINCT = {"x_train": IMAGES, "y_train": LABELS}


def save(path, contents, layout=None):
    if path.suffix == ".npz":
        np.savez(path, **contents, **({} if layout is None else {"layout": layout}))
    else:
        with h5py.File(path, "w") as file:
            for name, array in contents.items():
                file.create_dataset(name, data=array, compression="gzip" if np.ndim(array) > 1 else None)
            if layout is not None:
                file.attrs["layout"] = layout
    return str(path)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test", "x_val", "y_val"),
        ("train_images", "train_labels", "test_images", "test_labels", "val_images", "val_labels"),
        ("train/images", "train/labels", "test/images", "test/labels", "validation/images", "validation/labels"),
    ],
)
def test_names_of_arrays(tmp_path, suffix, names):
    values = [IMAGES, LABELS, IMAGES[:6], LABELS[:6], IMAGES[3:9], LABELS[3:9]]
    data = datasets.load(save(tmp_path / f"own{suffix}", dict(zip(names, values, strict=True))))
    for split, images, labels in zip((data.train, data.test, data.validation), values[::2], values[1::2], strict=True):
        np.testing.assert_array_equal(split.images, images.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(split.labels, labels)
        assert split.images.dtype == np.uint8
    assert (data.name, data.classes, data.input_shape) == ("own", ("0", "1", "2"), (3, 8, 6))
    assert data.digest == datasets.load(save(tmp_path / "same.npz", dict(zip(names, values, strict=True)))).digest
    pixels, _ = data.train.batch(slice(None))
    np.testing.assert_allclose(pixels.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(pixels.std(axis=(0, 2, 3)), 1, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_which_axis_holds_the_channels(tmp_path, suffix):
    def images_of(images, layout=None):
        path = save(tmp_path / f"own{suffix}", {"images": images, "labels": LABELS}, layout)
        return datasets.read(path, None, None)[0]["train"][0]

    last, many = IMAGES.transpose(0, 3, 1, 2), RANDOM.integers(0, 9, (12, 5, 8, 6), dtype=np.uint8)
    np.testing.assert_array_equal(images_of(IMAGES), last)
    np.testing.assert_array_equal(images_of(last), last)
    np.testing.assert_array_equal(images_of(IMAGES[..., 0]), last[:, :1])
    np.testing.assert_array_equal(images_of(many, "NCHW"), many)
    np.testing.assert_array_equal(images_of(many, "NHWC"), many.transpose(0, 3, 1, 2))
    for ambiguous in (many, IMAGES[:, :3]):
        with pytest.raises(UserError, match=r"which axis holds the channels\? .* NHWC or NCHW"):
            images_of(ambiguous)
    with pytest.raises(UserError, match="layout is CHW"):
        images_of(many, "CHW")


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array([5, -2, 10]), ("-2", "5", "10")),
        (np.array([[7], [1], [3]], np.uint8), ("1", "3", "7")),
        (np.array(["owl", "cat", "dog"]), ("cat", "dog", "owl")),
        (np.array([b"owl", b"cat", b"\xc3\xa9"]), ("cat", "owl", "é")),
        (np.array([True, False, True]), ("0", "1")),
    ],
)
def test_labels_are_any_integers_or_text(tmp_path, suffix, labels, classes):
    stored = labels.astype(h5py.string_dtype()) if suffix == ".h5" and labels.dtype.kind == "U" else labels
    path = save(tmp_path / f"own{suffix}", {"images": IMAGES, "labels": np.concatenate([stored] * 4)})
    data = datasets.load(path, validation=0)
    assert data.classes == classes
    names = np.char.decode(labels, "utf-8") if labels.dtype.kind == "S" else labels
    names = names.astype(int).astype(str) if names.dtype.kind in "biu" else names
    assert [data.classes[index] for index in data.train.labels] == [*names.ravel()] * 4


def test_more_classes_than_bytes_count(tmp_path):
    labels = np.arange(600) % 300
    data = datasets.load(
        save(tmp_path / "own.npz", {"x_train": RANDOM.random((600, 2, 2)), "y_train": labels}), validation=0
    )
    np.testing.assert_array_equal(data.train.labels, labels)
    assert data.train.images.dtype == np.float32
    assert len(data.classes) == 300


UNEQUAL = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:, :5], "y_test": LABELS}


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"x": IMAGES, "y": LABELS}, "has no x_train and y_train, nor other names .*, but x, y"),
        ({"x_train": IMAGES}, "has x_train, but no y_train"),
        ({**DISTINCT, "images": IMAGES, "labels": LABELS}, "has x_train and images, both the train part"),
        ({"x_test": IMAGES, "y_test": LABELS}, "has no images to train on, but a part to test with"),
        ({**DISTINCT, "y_train": LABELS[:5]}, "the train part has 12 images and 5 labels"),
        ({"x_train": IMAGES[:0], "y_train": LABELS[:0]}, "the train part has 0 images"),
        (UNEQUAL, "images of the test part are 3×5×6 .*, of the train part 3×8×6"),
        ({**DISTINCT, "y_train": np.eye(12)}, r"y_train is \(12, 12\) of float64: labels are .*argmax"),
        ({**DISTINCT, "y_train": LABELS / 2}, r"y_train is \(12,\) of float64: labels are one whole number"),
        ({**DISTINCT, "x_train": IMAGES[0]}, "the train part has 8 images and 12 labels"),
        ({**DISTINCT, "x_train": IMAGES.reshape(12, -1)}, r"x_train is \(12, 144\) of uint8: images are numbers"),
        ({**DISTINCT, "x_train": np.where(IMAGES, np.inf, 0)}, "x_train has values that are not finite"),
        ({**DISTINCT, "x_train": IMAGES * 1e300}, "x_train has values that are not finite, or too large"),
        ({**DISTINCT, "x_train": IMAGES * [1, 0, 1]}, "all pixels of channel 1 of the training images are equal"),
        ({**DISTINCT, "y_train": 0 * LABELS}, "all images are of one class, 0"),
        ({**DISTINCT, "x_test": IMAGES, "y_test": LABELS + 1}, "test part are of class 3, and none to train on"),
        ({**DISTINCT, "x_test": IMAGES, "y_test": LABELS.astype("S")}, "numbers in one part and text in another"),
        ({**DISTINCT, "y_train": LABELS.astype("u8") + 2**63}, "y_train has a label of more than 63 bits"),
    ],
)
def test_arrays_that_are_no_data_set(tmp_path, suffix, contents, message):
    path = save(tmp_path / f"own{suffix}", contents)
    with pytest.raises(UserError, match=message) as caught:
        datasets.load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(path)


def test_nothing_is_unpickled_and_no_other_file_is_read(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, x_train=IMAGES, y_train=np.array([*"abcabcabcabc"], object))
    with pytest.raises(UserError, match="y_train holds Python objects, which are not unpickled"):
        datasets.load(str(path))
    save(tmp_path / "other.h5", DISTINCT)
    for lay, message in (
        (lambda file: file.__setitem__("x_train", h5py.ExternalLink("other.h5", "x_train")), "x_train is a link"),
        (
            lambda file: file.create_dataset("x_train", (12, 8, 8), "u1", external=[("raw", 0, 768)]),
            "not an array in this",
        ),
        (lambda file: file.create_dataset("x_train", (1 << 40, 8, 8), "u1", chunks=(1, 8, 8)), "is not all there"),
        (lambda file: file.create_group("x_train"), "x_train is not an array"),
    ):
        with h5py.File(tmp_path / "own.h5", "w") as file:
            lay(file)
            file["y_train"] = LABELS
        with pytest.raises(UserError, match=message):
            datasets.load(str(tmp_path / "own.h5"))


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_damaged_files_of_arrays(tmp_path, suffix):
    path = tmp_path / f"own{suffix}"
    save(path, DISTINCT)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:4]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"own\.\w+: (is no sound|cannot be read)") as caught:
            datasets.load(str(path))
        assert "\n" not in str(caught.value)


def test_what_compresses_well_is_not_taken_for_missing(tmp_path):
    images = np.zeros((512, 64, 64), np.uint8)
    images[:, 0, 0] = 1
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file.create_dataset("images", data=images, chunks=(512, 64, 64), compression=9, shuffle=True)
        assert images.nbytes > 500 * file["images"].id.get_storage_size()
        file["labels"] = np.arange(512) % 2
    assert len(datasets.read(str(tmp_path / "own.h5"), None, None)[0]["train"][0]) == 512


def test_a_lock_on_the_file_does_not_count(tmp_path):
    path = save(tmp_path / "own.h5", DISTINCT)
    with open(path, "r+b") as file:  # noqa: PTH123
        fcntl.flock(file, fcntl.LOCK_EX)
        assert len(datasets.load(path, validation=0).train) == 12


def picture(path, pixels, **options):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(np.asarray(pixels)).save(path, **options)


def photos(folder, parts_of=("",), count=4, shape=(8, 6, 3)):
    """Lay pictures of three classes, each brightest in one channel; return all of them as arrays."""
    random = np.random.default_rng(1)
    for part in parts_of:
        for k, name in enumerate(("cat", "dog", "owl")):
            for i in range(count):
                pixels = random.integers(0, 100, shape, dtype=np.uint8)
                pixels[:, :, k % shape[2]] += 100
                picture(folder / part / name / f"{i}.png", pixels if shape[2] == 3 else pixels[..., 0])
    return str(folder)


def test_pictures_in_class_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = photos(tmp_path / "photos", ("train", "val", "Test"))
    (tmp_path / "photos" / "README").write_text("of a folder, no picture of a class")
    for name in ("cat/.DS_Store", "cat/Thumbs.db", "cat/.cache/a.png", ".cache/a.png"):
        hidden = tmp_path / "photos" / "train" / name
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_text("no picture")
    (tmp_path / "photos" / "train" / "owl" / "more").mkdir()
    picture(tmp_path / "photos" / "train" / "owl" / "more" / "9.png", np.full((8, 6, 3), 7, np.uint8))
    data = datasets.load(folder)
    assert (data.name, data.classes, data.input_shape) == ("photos", ("cat", "dog", "owl"), (3, 8, 6))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 13, "validation": 12, "test": 12}
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 5
    first = np.asarray(image.open(tmp_path / "photos" / "train" / "cat" / "0.png"))
    np.testing.assert_array_equal(data.train.images[0], first.transpose(2, 0, 1))
    assert data.train.images[-1].max() == 7


def test_a_class_may_be_called_train(tmp_path):
    folder = photos(tmp_path)
    (tmp_path / "cat").rename(tmp_path / "train")
    assert datasets.load(folder).classes == ("dog", "owl", "train")


@pytest.mark.parametrize(("colours", "channels"), [(4, 1), (8, 3)])
def test_pictures_are_converted_to_what_most_of_them_are(tmp_path, colours, channels):
    image = pytest.importorskip("PIL.Image")
    folder = photos(tmp_path, count=4)
    files = sorted(tmp_path.glob("*/*.png"))
    for k, path in enumerate(files):
        with image.open(path) as opened:
            mode = "L" if k >= colours else ("RGB", "P", "RGBA", "CMYK")[k % 4]
            opened.convert(mode).save(path, format="TIFF")
    images = datasets.read(folder, None, None)[0]["train"][0]
    assert images.shape[1] == channels
    for path, pixels in zip(files, images, strict=True):
        with image.open(path) as opened:
            expected = np.asarray(opened.convert("RGB" if channels == 3 else "L"))
            if channels == 1 and opened.mode != "L":
                expected = np.asarray(opened.convert("RGB").convert("L"))
        np.testing.assert_array_equal(pixels, np.moveaxis(np.atleast_3d(expected), 2, 0))


def test_pictures_of_different_sizes(tmp_path):
    folder = photos(tmp_path)
    picture(tmp_path / "dog" / "big.png", np.zeros((9, 7, 3), np.uint8))
    with pytest.raises(UserError, match=r"cat/0.png has 8×6 pixels and \S*dog/big.png 9×7: .*--image-size 8x6"):
        datasets.load(folder)
    assert datasets.load(folder, image_size="4x5").input_shape == (3, 4, 5)
    with pytest.raises(UserError, match="--image-size is for pictures in a folder"):
        datasets.load(datasets.EMBEDDED, image_size="4x5")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda cat: (cat / "labels.csv").write_text("1,2"), r"cat/labels.csv: is no picture that Pillow knows"),
        (lambda cat: (cat / "0.png").write_bytes((cat / "0.png").read_bytes()[:60]), r"cat/0.png: cannot be read"),
        (lambda cat: (cat / "0.png").write_bytes(b""), r"cat/0.png: is no picture"),
        (lambda cat: os.mkfifo(cat / "pipe"), r"cat/pipe: cannot be read \(is no regular file"),
        (lambda cat: picture(cat / "0.png", np.zeros((8, 6), np.uint16)), r"cat/0.png: has pixels of more than 8 bits"),
        (lambda cat: [path.unlink() for path in cat.iterdir()], r"cat: has no pictures"),
        (lambda cat: [shutil.rmtree(cat.parent / name) for name in ("dog", "owl")], "all images are of one class, cat"),
        (lambda cat: [shutil.rmtree(path) for path in cat.parent.iterdir()], "has no class folders"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, spoil, message):
    folder = photos(tmp_path / "photos")
    spoil(tmp_path / "photos" / "cat")
    with pytest.raises(UserError, match=message) as caught:
        datasets.load(folder)
    assert "\n" not in str(caught.value)


def test_a_picture_that_unpacks_to_more_than_memory_is_not_unpacked(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    folder = photos(tmp_path)
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(UserError, match=r"cat/0.png: cannot be read as a picture \(Image size \(48 pixels\) exceeds"):
        datasets.load(folder, image_size="4x4")


def test_without_pillow(tmp_path, monkeypatch):
    folder = photos(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="pictures need Pillow: pip install"):
        datasets.load(folder)


def test_what_is_neither_a_name_nor_a_path(tmp_path):
    for data in ("mnst", str(tmp_path / "none.npz"), "a" * 5000):
        with pytest.raises(UserError, match=r"data = .*: there is no file or folder of this name, .*cifar10"):
            resolve(run_config({"data": data}), 1)
    with pytest.raises(UserError, match="--data-dir is for data sets by name"):
        datasets.load(save(tmp_path / "own.npz", DISTINCT), str(tmp_path))


def test_a_part_is_held_out_of_each_class(tmp_path):
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    images = np.arange(100, dtype=np.uint8)[:, None, None] * np.ones((8, 8), np.uint8)
    path = save(tmp_path / "own.npz", {"images": images, "labels": labels})
    data = datasets.load(path, validation=0.2)
    rest, held = (split.images[:, 0, 0, 0] for split in (data.train, data.validation))
    assert sorted([*rest, *held]) == list(range(100))
    assert np.bincount(data.validation.labels).tolist() == [10, 6, 4]
    np.testing.assert_array_equal(data.train.labels, labels[rest])
    np.testing.assert_array_equal(datasets.load(path, validation=0.2).validation.images, data.validation.images)
    assert len(datasets.load(path).validation) == 10  # nothing else to judge by
    assert datasets.load(path, validation=0).splits.keys() == {"train"}
    assert datasets.load(path).digest == data.digest
    with pytest.raises(UserError, match=r"0.001 of 100 images is none: use a larger --validation"):
        datasets.load(path, validation=0.001)
    few = save(tmp_path / "few.npz", {"images": images[:4], "labels": np.array([0, 0, 0, 1])})
    with pytest.raises(UserError, match=r"of the validation part are of class 1, and none to train on"):
        datasets.load(few, validation=0.7)
    own = save(tmp_path / "val.npz", {**DISTINCT, "x_val": IMAGES, "y_val": LABELS})
    with pytest.raises(UserError, match="has a validation part of its own"):
        datasets.load(own, validation=0.1)


def own_images(path, seed=0, held=None):
    """Write 60 images 16×17 of three classes; `held`, those that a run holds out, are noise of a seed."""
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = random.integers(0, 99, (60, 16, 17, 3), dtype=np.uint8)
    images[np.arange(60), :, :, labels] += 99
    if held is not None:
        images[held] = np.random.default_rng(seed).integers(0, 256, (len(held), 16, 17, 3))
    return save(path, {"images": images, "labels": labels + 1})


def run_of(tmp_path, data, name="run.h5", **options):
    options = {"data": data, "batch": 16, "steps": 2, "replicas": 4, "output": str(tmp_path / name), **options}
    options = {"method": "sgd", "lr": 0.1} | options
    return train(resolve(run_config({"progress": "off", **options}), 1), Communicator())


def test_what_is_held_out_is_evaluated_and_never_trained_on(tmp_path):
    data = own_images(tmp_path / "own.npz")
    _, (held, _) = parts.hold_out((np.arange(60), np.arange(60) % 3), 0.2, "")
    run = Run(run_of(tmp_path, data, validation=0.2), iterate="")
    assert run.held_out == ("validation",)
    assert (run.attributes["train_samples"], run.attributes["validation_samples"]) == (48, 12)
    assert np.isnan(run.last("test_nll"))
    assert run.last("tail_validation_nll") > 0
    predictions = predict(load(tmp_path / "run.h5"))
    assert (predictions.part, len(predictions.labels)) == ("validation", 12)
    assert predictions.nll == pytest.approx(run.last("validation_nll"), rel=1e-4)
    assert predictions.accuracy == run.last("validation_accuracy")
    told = table([run]).splitlines()[0]
    assert "validation NLL  accuracy" in told
    assert "test" not in told

    own_images(tmp_path / "own.npz", 5, held)
    other = Run(run_of(tmp_path, data, "other.h5", validation=0.2), iterate="")
    assert other.last("validation_nll") != run.last("validation_nll")
    for name, values in run.parameters.items():
        np.testing.assert_array_equal(other.parameters[name], values)


def test_parts_side_by_side_in_a_table(tmp_path):
    first = Run(run_of(tmp_path, own_images(tmp_path / "own.npz")))
    images, labels = RANDOM.integers(0, 256, (16, 16, 16), dtype=np.uint8), np.arange(16) % 2
    judged = save(tmp_path / "judged.npz", {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels})
    second = Run(run_of(tmp_path, judged, "second.h5", lr=0.5))
    lines = table([first, second]).splitlines()
    assert re.findall(r"\w+ (?:NLL|accuracy)", lines[0]) == [
        *("train NLL", "validation NLL", "validation accuracy", "test NLL", "test accuracy")
    ]
    assert [line.split()[-8:-2].count("–") for line in lines[2:]] == [2, 2]


def test_going_on_takes_the_same_data_wherever_they_are(tmp_path):
    data = own_images(tmp_path / "own.npz")
    saved = {"checkpoint": str(tmp_path / "c"), "checkpoint_every": 1}
    run_of(tmp_path, data, **saved)
    with pytest.raises(UserError, match=r"validation was None and is 0\.2"):
        run_of(tmp_path, data, **saved, resume=True, validation=0.2)
    moved = str(tmp_path / "moved.npz")
    os.rename(data, moved)  # noqa: PTH104
    run_of(tmp_path, moved, **saved, resume=True)
    own_images(tmp_path / "moved.npz", 1, [0])
    with pytest.raises(UserError, match="the data set differs"):
        run_of(tmp_path, moved, **saved, resume=True)


def test_images_too_small_for_the_network(tmp_path):
    with pytest.raises(UserError, match="images of 8×6 pixels are too small for the network: it takes 16×16 at least"):
        run_of(tmp_path, save(tmp_path / "own.npz", DISTINCT), batch=4)


def test_spectrum_of_own_data(tmp_path):
    data = own_images(tmp_path / "own.npz")
    iterate = iterate_of(run_of(tmp_path, data, validation=0.2, steps=1))
    pairs = spectrum_of(iterate, Communicator(), count=1).pairs
    rest = datasets.load(data, validation=0.2).train
    only = save(
        tmp_path / "only.npz",
        {"images": rest.images, "labels": rest.labels + 1},
    )
    again = iterate_of(run_of(tmp_path, only, "only.h5", validation=0, steps=1))
    np.testing.assert_array_equal(again.weights, iterate.weights)
    np.testing.assert_allclose(spectrum_of(again, Communicator(), count=1).pairs.values, pairs.values, rtol=1e-9)
    own_images(tmp_path / "own.npz", 1, [0])
    with pytest.raises(UserError, match="own is not what the run was trained on"):
        spectrum_of(iterate, Communicator(), count=1)


def test_predictions_of_what_is_no_data_set_to_train_on(tmp_path):
    """One class, no training part, pictures of another size than the network's."""
    folder = photos(tmp_path / "photos", count=8, shape=(20, 20, 3))
    model = load(run_of(tmp_path, folder, batch=4, image_size="16x17"))
    picture(tmp_path / "new" / "owl" / "1.png", np.zeros((30, 30, 3), np.uint8))
    predictions = predict(model, str(tmp_path / "new"))
    assert (predictions.part, predictions.labels.tolist(), predictions.classes) == ("train", [2], ("cat", "dog", "owl"))
    images = {"x_test": np.zeros((2, 16, 17, 3), np.uint8), "y_test": np.array(["dog", "dog"])}
    assert predict(model, save(tmp_path / "new.npz", images)).part == "test"


def test_a_study_is_not_tuned_by_a_part_that_is_not_there(tmp_path):
    data = own_images(tmp_path / "own.npz")
    study = tmp_path / "s.toml"
    study.write_text(
        f'tune_by = "test_nll"\nseeds = [0]\n[common]\ndata = "{data}"\nsteps = 1\nbatch = 16\n'
        '[[row]]\nname = "a"\nmethod = "sgd"\nlr = [0.1, 0.2]\n'
    )
    with pytest.raises(UserError, match="tune_by = test_nll: own has no test part"):
        compare(read_study(str(study)), tmp_path / "s.h5", 1, Communicator())
    study.write_text(study.read_text().replace("test_nll", "validation_nll"))
    compare(read_study(str(study)), tmp_path / "s.h5", 1, Communicator())


def test_data_on_the_command_line(tmp_path, capsys, monkeypatch):
    data = own_images(tmp_path / "own.npz")
    assert command(["data", "info", data]) == 0
    told = capsys.readouterr().out
    assert "60 images of 16×17 pixels, 3 channel(s), " in told
    assert "3, of the train images: 1 20, 2 20, 3 20" in told
    assert datasets.load(data).digest in told
    assert f"qnewton-mpi train --data {data}" in told
    for arguments, message in (
        (["info", "mnst"], "data = mnst: there is no file or folder"),
        (["info", data, "--image-size", "huge"], "image_size = huge: must be HEIGHTxWIDTH"),
        (["fetch", "moon"], "moon: is no published data set: these are mnist"),
    ):
        assert command(["data", *arguments]) == 2
        assert message in capsys.readouterr().err

    def download(url, known, name, path, processor):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()

    pooch = pytest.importorskip("pooch")
    monkeypatch.setattr(pooch, "retrieve", download)
    assert command(["data", "fetch", "mnist", "--data-dir", str(tmp_path / "sets")]) == 0
    told = capsys.readouterr().out
    assert f"mnist: 4 files in {tmp_path / 'sets' / 'mnist'}\n" in told
    assert f"train --data mnist --data-dir {tmp_path / 'sets'}" in told
    monkeypatch.setattr(pooch, "retrieve", lambda *_, **__: pytest.fail("fetched again"))
    assert command(["data", "fetch", "mnist", "--data-dir", str(tmp_path / "sets")]) == 0
    assert command(["data", "fetch", published.EMBEDDED]) == 0
