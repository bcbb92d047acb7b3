"""The spectrum of the Hessian of a run's loss, by the names that programs import."""

from __future__ import annotations

from qnewton_mpi.hessian.iterate import Iterate, iterate_of
from qnewton_mpi.hessian.product import HessianProduct
from qnewton_mpi.hessian.spectrum import Spectrum, spectrum_of

__all__ = ["HessianProduct", "Iterate", "Spectrum", "iterate_of", "spectrum_of"]
