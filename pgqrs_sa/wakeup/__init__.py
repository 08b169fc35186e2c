"""The receiving side of NOTIFY. The sending side, and wake-ups in a process, are `_core.wakeup`."""

__all__: list[str] = []
