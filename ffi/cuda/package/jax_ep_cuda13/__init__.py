"""The library for GPUs, where jax_ep looks for it. There is nothing else in here."""
