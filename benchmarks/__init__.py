"""Benchmarks of the toolkit's speed, one module for each: ``python -m benchmarks --list``."""
