"""The paper's class-removal experiment: ``python -m dng_models.class_removal --help``."""
