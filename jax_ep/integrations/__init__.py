"""Other libraries' names and layouts for what ``jax_ep`` computes.

Nothing is imported here: each module is for one library, which it knows but does not import. Only
``maxtext`` does, and the functions ``install`` of the others, as they put something into it.
"""
