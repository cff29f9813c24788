"""How fast the toolkit is: one file a question, ``python -m benchmarks --list``."""
