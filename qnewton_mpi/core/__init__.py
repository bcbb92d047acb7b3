"""What the project exists for: secants, exchanges, spread policies and optimizers."""
