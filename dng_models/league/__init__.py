"""The league: rules of dng_math that keep something out, each swept, against the exact truth.

What the figures draw and the benchmarks tabulate; neither may import the other.
"""
