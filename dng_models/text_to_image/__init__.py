"""The paper's text-to-image experiment: ``python -m dng_models.text_to_image --help``."""
