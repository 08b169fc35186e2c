"""Faults on demand, and the audit after them: what the chaos and the consumer tests are made of.

A conftest makes it importable, in every folder that uses it::

    sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))  # tests/chaos/kit

- `kit.servers`: a server of one's own to crash, its databases, and ``terminate_backends``;
- `kit.proxy`: a TCP proxy in front of it, which loses replies, cuts and swallows;
- `kit.bouncer`: PgBouncer in front of it; `kit.replica`: a standby behind it;
- `kit.scripts`: Python processes that say how far they are, and are killed, stopped, continued;
- `kit.books`: tables that record what was done, and the audit of them;
- `kit.working`: producer and consumer loops over ``QueueService``, for a process or a thread.

Nothing in here sleeps to let something happen: it waits for the word, the row or the state.
"""
