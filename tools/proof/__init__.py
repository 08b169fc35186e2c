"""Run the long suites, and write the page about them: ``python -m tools.proof``."""
