"""What the package is measured by; not part of the wheel."""
