"""Runs read back: which of them belong together, tables, figures."""
