"""Other libraries' names and layouts for what ``jax_ep`` computes.

Nothing is imported here: each module is for one library, which it knows but does not import. Only
``maxtext`` does, as it puts something into MaxText.
"""
