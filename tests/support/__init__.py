"""What the tests are made of: importable as ``support`` (pytest has ``tests`` on its path).

- `support.waiting`: wait until something is true, instead of sleeping;
- `support.cases`: the rows of a table as subtests of one test;
- `support.programs`: Python programs as processes, without the second that their imports take;
- `support.servers`: a server of one's own to crash, its databases, and ``terminate_backends``;
- `support.proxy`: a TCP proxy in front of it, which loses replies, cuts and swallows;
- `support.bouncer`: PgBouncer in front of it; `support.replica`: a standby behind it;
- `support.scripts`: Python processes that say how far they are, and are killed, stopped, continued;
- `support.processes`: consumers in processes, and the audit after what was done to them;
  `support.consumer_program` is what each runs;
- `support.consumers`: the same handlers in threads and in tasks; `support.handlers`
  has some for tests without a database;
- `support.direct`: what does not go through PgBouncer; `support.properties`: how many examples;
- `support.ledger`: tables that record what was done, and the audit of them;
- `support.loops`: producer and consumer loops over ``QueueService``, for a process or a thread;
- `support.operations`, `support.actors`: operations, and the actors that do them despite faults;
- `support.model_state`: what the queue promises, as a model in Python;
- `support.every_row`: a row of every kind; `support.random_worker`: a worker that acts at random;
- `support.endurance`, `support.latency`: programs (``PYTHONPATH=tests python -m support.latency``).

Nothing in here sleeps to let something happen: it waits for the word, the row or the state.
"""
