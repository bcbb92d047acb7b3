"""What a step costs beside the gradients: `qnewton-mpi bench`."""
