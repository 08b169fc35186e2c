"""The benchmark: ours, its baseline and its peers, interleaved, on one server.

``python -m benchmarks --help``. A scenario says what is done, a contender does it, `measure` lets
them take turns, and the report says how they compare. It is no part of the package.
"""
