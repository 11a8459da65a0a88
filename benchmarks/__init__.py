"""Benchmarks of diffopt beside other solvers and layers: ``make bench``. See README.md in this folder."""
