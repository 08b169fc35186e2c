"""Durations arrive as they are, however the connection has the server write intervals."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pgqrs_sa import AsyncQueueService, Message, Queue, QueueService, Worker
from pgqrs_sa._core.scope import Context, Scope
from pgqrs_sa.cli.queries import activity
from pgqrs_sa.doctor import Thresholds, diagnose
from pgqrs_sa.models import READY_MADE

STYLES = ("postgres", "postgres_verbose", "sql_standard", "iso_8601")
LONG = timedelta(days=40, hours=3, minutes=2, seconds=1)


@pytest.fixture
def aged(session: Session, service: QueueService) -> None:
    """A queue and a worker of which everything has an age."""
    service.enqueue("mail", 1)
    service.enqueue("mail", 2, max_read_ct=1)
    service.workers.register("w")
    session.flush()
    ago = sa.func.statement_timestamp() - sa.literal(LONG, sa.Interval)
    spent = sa.update(Message).where(Message.max_read_ct == 1).values(read_ct=1)
    for change in (
        sa.update(Message).values(vt=ago),
        spent,
        sa.update(Worker).values(heartbeat_at=ago),
        sa.update(Queue).values(paused_at=ago),
    ):
        session.execute(change, execution_options={"synchronize_session": False})
    session.commit()


def about_long(found: timedelta | None) -> bool:
    return found is not None and LONG <= found < LONG + timedelta(minutes=1)


@pytest.mark.parametrize("style", STYLES)
def test_durations_do_not_depend_on_the_interval_style(migrated: Any, aged: None, style: str):
    options = {"options": f"-c intervalstyle={style}"}
    engine = sa.create_engine(migrated.url, connect_args=options)
    with Session(engine) as session:
        assert session.scalar(sa.text("SHOW intervalstyle")) == style
        service = QueueService(session)
        assert about_long(service.messages.metrics("mail").oldest_ready_age)
        assert about_long(service.messages.all_metrics()[0].oldest_ready_age)
        assert about_long(service.workers.health()[0].silent_for)
        context = Context.of(READY_MADE, None, None, allow_autocommit=True)
        seen = activity(Scope(session, context), timedelta(seconds=2))
        assert about_long(seen[0].oldest_ready_age)
        findings = diagnose(session, context, thresholds=Thresholds(dead_rows=-1))
        told = {finding.check: finding.problem for finding in findings}
        assert {"exhausted", "backlog", "workers", "vacuum"} <= set(told)
        assert all("40 days, 3:02:0" in told[case] for case in ("exhausted", "backlog", "workers"))
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("style", STYLES)
async def test_durations_do_not_depend_on_the_interval_style_awaited(
    migrated: Any, aged: None, style: str, driver: str
):
    options: dict[str, Any] = {"options": f"-c intervalstyle={style}"}
    if driver == "asyncpg":
        options = {"server_settings": {"intervalstyle": style}}
    engine = create_async_engine(migrated.async_url(driver), connect_args=options)
    async with AsyncSession(engine) as session:
        assert await session.scalar(sa.text("SHOW intervalstyle")) == style
        service = AsyncQueueService(session)
        assert about_long((await service.messages.metrics("mail")).oldest_ready_age)
        assert about_long((await service.messages.all_metrics())[0].oldest_ready_age)
        assert about_long((await service.workers.health())[0].silent_for)
    await engine.dispose()
