"""Dynamic Negative Guidance on trained networks: samplers, measurements and experiments."""
