"""Batch scripts for SLURM, which `qnewton-mpi slurm FOLDER` writes; slurm/ of a checkout has them too."""
