"""The recipe by which Spack builds the program on a site's MPI library, from a checkout or a repository.

spack repo add recipes/spack_repo/qnewton
spack develop --path "$PWD" py-qnewton-mpi@main      # in an environment, for this checkout
spack install py-qnewton-mpi@main +plot ^mpich       # or ^openmpi, or what packages.yaml has
"""

from spack.package import depends_on, license, variant, version  # noqa: A004
from spack_repo.builtin.build_systems.python import PythonPackage


class PyQnewtonMpi(PythonPackage):
    """Data-parallel quasi-Newton training over MPI: replicas, secants, one small eigenproblem."""

    license("MIT", checked_by="qnewton_mpi")
    version("main")  # by `spack develop`; a release adds url and checksum

    variant("plot", default=True, description="figures, by matplotlib")
    variant("tensorboard", default=False, description="events for TensorBoard, by tensorboardX")
    variant("torch", default=False, description="the optimizers for PyTorch models")

    depends_on("python@3.11:", type=("build", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("mpi", type=("build", "run"))
    depends_on("py-numpy@2.1:", type=("build", "run"))
    depends_on("py-mpi4py@4.0:", type=("build", "run"))
    depends_on("py-h5py@3.10:", type=("build", "run"))
    depends_on("py-array-api-compat@1.10:", type=("build", "run"))
    depends_on("py-pooch@1.8:", type=("build", "run"))
    depends_on("py-threadpoolctl@3.2:", type=("build", "run"))
    depends_on("py-tqdm@4.66:", type=("build", "run"))
    depends_on("py-matplotlib@3.8:", when="+plot", type=("build", "run"))
    depends_on("py-tensorboardx@2.6.2:", when="+tensorboard", type=("build", "run"))
    depends_on("py-torch@2.4:", when="+torch", type=("build", "run"))
