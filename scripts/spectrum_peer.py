"""Compare the leading eigenvalues of a run's Hessian, and the time they take, with curvlinops and SciPy's eigsh.

Usage: python scripts/spectrum_peer.py RUN.h5 SAMPLES     (pip install curvlinops-for-pytorch scipy; one thread)
"""

import argparse
import time
from pathlib import Path

from qnewton_mpi.parallel.environment import prepare

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", metavar="RUN.h5")
parser.add_argument("samples", type=int)
arguments = parser.parse_args()  # before what may be missing is imported

prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from curvlinops import HessianLinearOperator  # noqa: E402
from scipy.sparse.linalg import eigsh  # noqa: E402

from qnewton_mpi.data import datasets  # noqa: E402
from qnewton_mpi.models.convnet import Convnet  # noqa: E402
from qnewton_mpi.models.reference import torch_layers  # noqa: E402
from qnewton_mpi.parallel.communicator import Communicator  # noqa: E402
from qnewton_mpi.spectrum import iterate_of, spectrum_of  # noqa: E402

COUNT, TOLERANCE = 5, 1e-4


def main(path, samples):
    """Print both, and how they differ."""
    torch.set_num_threads(1)
    iterate = iterate_of(Path(path))
    started = time.perf_counter()
    pairs = spectrum_of(iterate, Communicator(), COUNT, samples).pairs
    ours = time.perf_counter() - started

    dataset = datasets.load(iterate.data, None, dtype=np.float64)
    network = Convnet(dataset.input_shape, iterate.network["activation"], dtype=np.float64)
    model = torch_layers(network, iterate.weights)
    images, labels = dataset.train.batch(slice(0, samples))
    data = [(torch.tensor(images), torch.tensor(labels).long())]
    hessian = HessianLinearOperator(model, torch.nn.CrossEntropyLoss(), list(model.parameters()), data)
    started = time.perf_counter()
    values = eigsh(hessian.to_scipy(), COUNT, tol=TOLERANCE, return_eigenvectors=False)
    theirs = time.perf_counter() - started
    values = values[np.argsort(-np.abs(values))]
    print(f"here        {pairs.values}  {ours:.1f} s, {pairs.products} products")
    print(f"curvlinops  {values}  {theirs:.1f} s")
    print(f"relative difference, largest: {np.abs(values / pairs.values - 1).max():.1e}")


if __name__ == "__main__":
    main(arguments.run, arguments.samples)
