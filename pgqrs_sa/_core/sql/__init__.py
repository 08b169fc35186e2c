"""All SQL of the package, as pure builders: tables in, a SQLAlchemy statement out.

Nothing here executes. Each builder is a function of `Tables` and of the statement's shape, and is
cached on both, so that a statement is built once per process and every call after that passes
only its bind parameters (measured: building it on each call halves the rate of enqueues).

Three rules hold throughout. The clock is ``statement_timestamp()``: ``now()`` stands still for the
length of a transaction, and ``clock_timestamp()`` cannot use an index. Rows that are to be settled
together are locked in the order of their ids first, so that two batches cannot deadlock. And
statements are about tables; `pgqrs_sa._core` flushes the session before them, and brings the
objects that it has loaded up to date after them.
"""
