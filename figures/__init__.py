"""The figures of the paper, and what goes beyond them, from exact mixtures."""
