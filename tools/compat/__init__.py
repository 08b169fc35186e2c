"""The tests, with each version of PostgreSQL and of the packages: ``python -m tools.compat``."""
