"""The operations of the services, as functions of a `Session`: only they execute statements.

The first parameters are always the session and a `Context`. Nothing here commits, rolls back or
catches an error of the database: the transaction is the caller's. `AsyncQueueService` runs these
same functions through ``AsyncSession.run_sync``.
"""
