"""A shim for tools that ask for setup.py; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
