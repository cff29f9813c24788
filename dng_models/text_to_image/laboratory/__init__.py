"""A small world of pictures with known truth, as a text-to-image experiment."""
