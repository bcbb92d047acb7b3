"""Training runs: the loop, its progress, and the file it leaves."""
