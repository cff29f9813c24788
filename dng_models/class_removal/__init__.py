"""The paper's class removal with networks: ``python -m dng_models.class_removal --help``."""
