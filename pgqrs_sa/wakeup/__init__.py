"""The receiving side of NOTIFY. The sending side, and wake-ups in a process, are `_core.wakeup`.

| module | |
|---|---|
| `listener` | the thread that listens, and reconnects |
| `drivers` | the connection that listens, for psycopg and asyncpg |
"""

__all__: list[str] = []
