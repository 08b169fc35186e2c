"""A commit that fails, before or after the server has done it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from pgqrs_sa import AsyncQueueService, Message, QueueService
from pgqrs_sa.testing import all_enqueued, raise_on_commit

COMMITTED = pytest.mark.parametrize("committed", [False, True])


@pytest.fixture
def own_engine(host_engine: sa.Engine) -> Iterator[sa.Engine]:
    """For what is committed indeed; it is removed again."""
    yield host_engine
    with Session(host_engine) as session, session.begin():
        session.execute(sa.delete(Message))


def left(engine: sa.Engine) -> int:
    with Session(engine) as session:
        return QueueService(session).messages.count()


@COMMITTED
def test_a_commit_to_the_server_fails_once(own_engine, committed):
    with raise_on_commit(factory := sessionmaker(own_engine), committed=committed):
        with (
            pytest.raises(OperationalError, match="the connection was lost"),
            factory() as session,
            session.begin(),
        ):
            QueueService(session).enqueue("mail", 1)
        assert left(own_engine) == committed

        with factory() as session, session.begin():
            QueueService(session).enqueue("mail", 2)

    assert left(own_engine) == committed + 1


@COMMITTED
def test_a_commit_within_the_transaction_of_a_test_fails_as_well(session, committed):
    with raise_on_commit(session, committed=committed):
        QueueService(session).enqueue("mail", 1)
        with pytest.raises(OperationalError, match="RELEASE SAVEPOINT"):
            session.commit()
        session.rollback()

    assert len(all_enqueued(session)) == committed
    QueueService(session).enqueue("mail", 2)
    session.commit()
    session.rollback()
    assert len(all_enqueued(session)) == committed + 1


def test_a_savepoint_of_the_application_is_released_as_ever(session):
    with raise_on_commit(session):
        with session.begin_nested():
            QueueService(session).enqueue("mail", 1)
        with pytest.raises(OperationalError):
            session.commit()
        session.rollback()


def test_a_block_without_a_commit_is_a_mistake(session):
    with (
        pytest.raises(AssertionError, match="nothing was committed in the block"),
        raise_on_commit(session),
    ):
        pass
    # The failure of the block itself is not hidden by it.
    with pytest.raises(ZeroDivisionError), raise_on_commit(session):
        _ = 1 / 0


@COMMITTED
async def test_a_commit_of_an_async_session_fails(async_session: AsyncSession, committed):
    with raise_on_commit(async_session, committed=committed):
        await AsyncQueueService(async_session).enqueue("mail", 1)
        with pytest.raises(OperationalError, match="the connection was lost"):
            await async_session.commit()
        await async_session.rollback()

    assert len(await all_enqueued(async_session)) == committed
