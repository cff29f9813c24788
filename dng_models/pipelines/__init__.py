"""Guidance inside the pipelines and schedulers of diffusers."""
