"""Build script: only what must be computed stands here, the metadata is in pyproject.toml."""

from setuptools import setup

# The native extension (csrc/) is added here. Import torch.utils.cpp_extension only where it is
# built, so that a build without torch gives the pure-Python package.
setup(ext_modules=[])
