"""Consumers in processes of their own, and the audit after what was done to them.

- `hands.worker` is the program that such a process runs: a consumer of the queue ``mail``;
- `hands.team` starts it, tells it what to do with which message, and audits what came of it.

Both stand on the kit of tests/chaos.
"""
