"""What `qnewton_mpi.torch` is made of (extra `torch`)."""
