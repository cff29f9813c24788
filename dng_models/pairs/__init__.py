"""Guided sampling with a pair of networks: the base one and an unwanted one."""
