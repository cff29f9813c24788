"""The figures of the paper, and further ones, most of them from exact mixtures."""
