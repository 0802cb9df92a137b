"""Random exchanges against the oracle, for as long as one likes: ``python -m tests.fuzz``."""
