"""The built-in networks: local losses and gradients in NumPy or CuPy."""
