"""Readers, where files are looked for, and which replica sees which sample."""

import dataclasses
import gzip
import hashlib
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnewton_mpi.data import datasets, published, readers
from qnewton_mpi.data.order import BatchOrder
from qnewton_mpi.errors import UserError


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder, count=6, labels=None):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 28, 28))
    labels = np.arange(count) % 10 if labels is None else np.asarray(labels)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return images, labels


def write_cifar(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    records = random.integers(0, 256, (count, readers.CIFAR_RECORD)).astype(np.uint8)
    records[:, 0] %= 10
    for name in published.CIFAR_FILES:
        (folder / name).write_bytes(records.tobytes())
    return records


@pytest.fixture(autouse=True)
def no_named_folder(monkeypatch, tmp_path):
    """Neither the variable nor this machine's system folder and cache may decide a test."""
    monkeypatch.delenv(published.VARIABLE, raising=False)
    monkeypatch.setattr(published, "SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setattr(published, "_cache", lambda: tmp_path / "cache")


def test_data_sets_have_the_same_digest_where_they_are_the_same(tmp_path):
    write_mnist(tmp_path / "a")
    write_mnist(tmp_path / "b")
    write_mnist(tmp_path / "other", labels=[0, 1, 2, 3, 4, 6])
    write_mnist(tmp_path / "longer", 7)
    digests = [datasets.load("mnist", str(tmp_path / name)).digest for name in ("a", "b", "other", "longer")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), packed=st.booleans(), seed=st.integers(0, 9))
def test_idx_round_trip(tmp_path_factory, shape, packed, seed):
    array = np.random.default_rng(seed).integers(0, 256, shape)
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    np.testing.assert_array_equal(readers.read_idx(path, len(shape)), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "magic number"),
        (b"\0\0\x08\x01" + b"\0\0\0\x02ab", "magic number"),
        (b"\0\0\x09\x03" + bytes(12), "magic number"),
        (b"\0\0\x08\x03" + bytes(5), "truncated"),
        (idx(np.zeros((2, 3, 3)))[:-1], "truncated"),
        (idx(np.zeros((2, 3, 3))) + b"x", "more bytes than its header promises"),
        (gzip.compress(idx(np.zeros((2, 3, 3))) + b"x"), "more bytes than its header promises"),
        (gzip.compress(idx(np.zeros((2, 3, 3)))) + b"junk", "cannot be read"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "fewer bytes than its header promises"),  # the product overflows 64 bits
        (b"\0\0\x08\x03" + b"\x80\0\0\0" * 2 + b"\0\0\0\x04", "fewer bytes"),  # and is 0 modulo 2**64
        (gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12), "fewer bytes than its header promises"),
        (gzip.compress(idx(np.zeros((2, 3, 3))))[:-9], "cannot be read"),
        (b"\x1f\x8b" + b"no gzip", "cannot be read"),
    ],
)
def test_bad_idx_files(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        readers.read_idx(path, 3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (lambda path: readers.read_idx(path, 3), struct.pack(">4B3I", 0, 0, 8, 3, 64, 28, 28), "more bytes"),
        (readers.read_cifar, b"", "more than the 10,000 records"),
    ],
)
def test_no_more_is_unpacked_than_a_file_may_hold(tmp_path, read, content, message):
    """A gigabyte of zeros in a megabyte: the memory of what is promised is all that is taken."""
    path = tmp_path / "file.gz"
    pieces = zlib.compressobj(1, wbits=31)
    zeros = bytes(1 << 24)
    path.write_bytes(b"".join([pieces.compress(content), *(pieces.compress(zeros) for _ in range(64)), pieces.flush()]))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("lay", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path), lambda path: None])
def test_what_is_no_file_is_not_waited_for(tmp_path, lay):
    lay(tmp_path / "file")
    for path in (tmp_path / "file", tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match=r"cannot be read|no such file|no regular file") as caught:
            readers.read_cifar(path)
        assert "\n" not in str(caught.value)


def test_images_that_the_network_cannot_take(tmp_path):
    def load(train, test):
        for name, images in (("train", train), ("t10k", test)):
            (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        return datasets.load("mnist", str(tmp_path))

    write_mnist(tmp_path, count=2)
    fine = np.arange(2 * 28 * 28).reshape(2, 28, 28)
    assert len(load(fine, fine).train) == 2
    for wrong in (fine[:, :, 1:], fine[:, :0], fine[:0, :0, :0]):
        with pytest.raises(UserError, match=r"train-images-idx3-ubyte: has images of \d+×\d+ pixels.*28×28"):
            load(wrong, fine)
        with pytest.raises(UserError, match="t10k-images-idx3-ubyte: has images of"):
            load(fine, wrong)
    with pytest.raises(UserError, match="0 images but 2 labels"):
        load(fine[:0], fine)
    with pytest.raises(UserError, match="all pixels of channel 0 of the training images are equal"):
        load(np.full_like(fine, 7), fine)


def test_mnist_from_a_folder(tmp_path):
    images, labels = write_mnist(tmp_path / "mnist")
    for folder in (tmp_path, tmp_path / "mnist"):
        data = datasets.load("mnist", str(folder))
        np.testing.assert_array_equal(data.train.images[:, 0], images)
        np.testing.assert_array_equal(data.test.labels, labels)
        assert data.input_shape == (1, 28, 28)
    pixels, _ = data.train.batch(slice(None))
    assert pixels.dtype == np.float32
    assert pixels.mean() == pytest.approx(0, abs=1e-5)
    assert pixels.std() == pytest.approx(1, rel=1e-5)


def test_cifar_from_a_folder(tmp_path):
    records = write_cifar(tmp_path / "cifar-10-batches-bin")
    data = datasets.load("cifar10", str(tmp_path))
    assert data.input_shape == (3, 32, 32)
    assert len(data.train) == 5 * len(records)
    np.testing.assert_array_equal(data.train.images[0].ravel(), records[0, 1:])
    np.testing.assert_array_equal(data.test.labels, records[:, 0])
    pixels, _ = data.train.batch(slice(None))
    np.testing.assert_allclose(pixels.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(pixels.std(axis=(0, 2, 3)), 1, rtol=1e-5)


def test_order_of_places(tmp_path, monkeypatch):
    write_mnist(tmp_path / "cache" / "mnist", count=3)
    assert len(datasets.load("mnist", None).train) == 3
    write_mnist(tmp_path / "system" / "mnist", count=4)
    assert len(datasets.load("mnist", None).train) == 4
    write_mnist(tmp_path / "variable", count=5)
    monkeypatch.setenv(published.VARIABLE, str(tmp_path / "variable"))
    assert len(datasets.load("mnist", None).train) == 5
    write_mnist(tmp_path / "named", count=6)
    assert len(datasets.load("mnist", str(tmp_path / "named")).train) == 6


def test_bad_sets(tmp_path):
    with pytest.raises(UserError, match="--data-dir"):
        datasets.load("mnist", str(tmp_path))
    write_mnist(tmp_path, labels=[0, 1, 2, 3, 4, 10])
    with pytest.raises(UserError, match="label 10 of sample 5"):
        datasets.load("mnist", str(tmp_path))
    write_mnist(tmp_path, labels=[0, 1])
    with pytest.raises(UserError, match="6 images but 2 labels"):
        datasets.load("mnist", str(tmp_path))
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"data_batch_3\.bin: 100 bytes"):
        datasets.load("cifar10", str(tmp_path))


def test_download_checks_the_hash(tmp_path, monkeypatch):
    """The published folder stands in for the network: pooch caches and checks its files as it would those."""
    pooch = pytest.importorskip("pooch")
    write_mnist(tmp_path / "published")
    files = sorted((tmp_path / "published").iterdir())
    source = published.SOURCES["mnist"]
    hashes = {f.as_uri(): hashlib.md5(f.read_bytes()).hexdigest() for f in files}
    monkeypatch.setattr(pooch.core, "choose_downloader", lambda url, progressbar=False: copy_file)
    monkeypatch.setitem(published.SOURCES, "mnist", dataclasses.replace(source, downloads=hashes))
    assert published.may_download("mnist", None)
    published.download("mnist")
    assert not published.may_download("mnist", None)
    assert len(datasets.load("mnist", None).train) == 6

    for path in (tmp_path / "cache" / "mnist").iterdir():
        path.unlink()
    wrong = dict.fromkeys(hashes, "0" * 32)
    monkeypatch.setitem(published.SOURCES, "mnist", dataclasses.replace(source, downloads=wrong))
    with pytest.raises(UserError, match=r"the download to .* failed \(MD5 hash"):
        published.download("mnist")
    assert published.locate("mnist", None) is None


def copy_file(url, output, _):
    Path(output).write_bytes(Path(url.removeprefix("file://")).read_bytes())


def test_named_folders_are_never_downloaded_to(tmp_path):
    assert not published.may_download("mnist", str(tmp_path))
    assert not published.may_download(published.EMBEDDED, None)


def test_embedded_sample():
    data = datasets.load(published.EMBEDDED, None)
    assert (len(data.train), len(data.test)) == (10_000, 2_000)
    assert data.input_shape == (1, 28, 28)
    assert set(np.bincount(data.train.labels, minlength=10)) <= set(range(900, 1100))


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="the system has no Fashion-MNIST")
def test_embedded_sample_is_of_the_published_images(monkeypatch):
    monkeypatch.setattr(published, "SYSTEM_FOLDER", Path("/usr/share/datasets"))
    full, sample = datasets.load("fashion-mnist", None), datasets.load(published.EMBEDDED, None)
    assert (len(full.train), len(full.test)) == (60_000, 10_000)
    np.testing.assert_array_equal(full.train.images[:10_000], sample.train.images)
    np.testing.assert_array_equal(full.test.labels[:2_000], sample.test.labels)


REAL = os.environ.get("QNEWTON_TEST_DATA", "")


@pytest.mark.skipif(not Path(REAL, "mnist").is_dir(), reason="QNEWTON_TEST_DATA names no folder with mnist")
def test_real_mnist():
    data = datasets.load("mnist", REAL)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.train.images.mean() / 255 == pytest.approx(0.1307, abs=1e-4)


@given(samples=st.integers(8, 200), shares=st.integers(1, 4), replicas=st.sampled_from([1, 2, 4, 8]))
def test_batches_depend_on_the_seed_alone(samples, shares, replicas):
    batch = min(8 * shares, samples // 8 * 8)
    whole = BatchOrder(samples, batch, 1, seed=5)
    parts = BatchOrder(samples, batch, replicas, seed=5)
    seen = []
    for step in range(2 * whole.steps_per_epoch):
        expected = whole.indices(step, 0)
        np.testing.assert_array_equal(np.concatenate([parts.indices(step, i) for i in range(replicas)]), expected)
        seen.append(expected)
    epoch = np.concatenate(seen[: whole.steps_per_epoch])
    assert len(set(epoch)) == len(epoch) == samples // batch * batch


def test_epochs_and_seeds_shuffle_anew():
    order = BatchOrder(100, 100, 1, seed=0)
    first, second = order.indices(0, 0), order.indices(1, 0)
    assert sorted(first) == sorted(second)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, BatchOrder(100, 100, 1, seed=1).indices(0, 0))
    np.testing.assert_array_equal(first, order.indices(0, 0))
