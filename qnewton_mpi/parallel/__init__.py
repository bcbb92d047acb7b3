"""Ranks, devices and what must be set before either is loaded."""
