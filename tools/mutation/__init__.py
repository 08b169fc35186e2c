"""Change one thing in a module, and see a test fail: ``python -m tools.mutation``."""
