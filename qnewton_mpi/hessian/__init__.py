"""The Hessian of the loss of a run: products with it, its spectrum."""
