"""Data-parallel quasi-Newton training over MPI.

Importing the package loads neither NumPy nor MPI, so that the entry point can set the number of threads first.
"""

__version__ = "0.1.0"
