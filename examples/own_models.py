"""The host's own classes: the queue on its MetaData, in its schema, with a column of its own.

For a host that needs a tenant on each message, or foreign keys to it and relationships both ways::

    pip install 'pgqrs-sa[psycopg]'
    export PGQRS_DSN=postgresql://localhost/invoicing
    python examples/own_models.py
"""

from __future__ import annotations

import os
import re

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

import pgqrs_sa
from pgqrs_sa import QueueService


class Base(DeclarativeBase):
    """The registry and MetaData of the application."""


class QueueBase(DeclarativeBase):
    """Another registry on the same MetaData: the application may have a Message class too."""

    metadata = Base.metadata
    __pgqrs_schema__ = "jobs"


class Queue(pgqrs_sa.QueueMixin, QueueBase):
    """A queue."""


class ArchivedMessage(pgqrs_sa.ArchivedMessageMixin, QueueBase):
    """A settled message. Put what must be kept after that into payload or headers."""


class Worker(pgqrs_sa.WorkerMixin, QueueBase):
    """A process that works on queues."""


class Message(pgqrs_sa.MessageMixin, QueueBase):
    """A live message, and its tenant."""

    tenant_id: Mapped[int | None] = mapped_column(index=True)
    # Name a class of another registry by a function: a string is looked for in this registry.
    invoice: Mapped[Invoice | None] = relationship(lambda: Invoice, back_populates="message")


class Invoice(Base):
    """A business row that refers to the message that will send it, while that is live."""

    __tablename__ = "invoices"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(sa.Text)
    message_id: Mapped[int | None] = mapped_column(
        sa.ForeignKey("jobs.pgqrs_messages.id", ondelete="SET NULL"), index=True
    )
    message: Mapped[Message | None] = relationship(Message, back_populates="invoice")


MODELS = pgqrs_sa.Models(Queue, Message, ArchivedMessage, Worker)


def create_tables(engine: sa.Engine) -> None:
    """Make all tables."""
    # An application lets Alembic do it, see pgqrs_sa.migrations: autogenerate then writes
    # op.pgqrs_upgrade(..., schema="jobs") for the queue, and the column and the rest as usual.
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("jobs", if_not_exists=True))
        Base.metadata.create_all(connection)


def enqueue(session: Session) -> None:
    """Enqueue by adding rows: the flush checks them as `QueueService.enqueue` would."""
    QueueService(session, models=MODELS).queues.create("invoices")
    for tenant, customer, delay in [(7, "ada", 0), (7, "bob", 3600), (8, "cyd", 0)]:
        payload = {"customer": customer}
        message = Message(queue_name="invoices", payload=payload, tenant_id=tenant, delay=delay)
        session.add(Invoice(customer=customer, message=message))
    session.commit()


def report(session: Session) -> None:
    """Ask about states in SQL, where they follow the database's clock."""
    state = Message.state
    counts = sa.select(state, sa.func.count()).group_by(state).order_by(state)
    print("states:", *session.execute(counts))
    due = sa.select(Invoice.customer).join(Invoice.message).where(Message.ready)
    print("due:", *session.scalars(due.order_by(Invoice.id)))
    later = sa.select(Message).where(Message.scheduled, ~Message.leased).order_by(Message.vt)
    for message in session.scalars(later):
        print("later:", message.invoice and message.invoice.customer, message.state)


def work(session: Session, tenant: int) -> None:
    """Lease and archive what is due for one tenant."""
    service = QueueService(session, models=MODELS)
    deliveries = service.dequeue("invoices", limit=10, where=Message.tenant_id == tenant)
    session.commit()  # the leases, before the work begins
    for delivery in deliveries:
        print(f"tenant {tenant}: the invoice for {delivery.payload['customer']} goes out")
        service.archive(delivery)
        session.commit()


if __name__ == "__main__":
    url = re.sub("^postgres(ql)?:", "postgresql+psycopg:", os.environ["PGQRS_DSN"])
    engine = sa.create_engine(url)
    create_tables(engine)
    with Session(engine) as session:
        enqueue(session)
        report(session)
        work(session, tenant=7)
        report(session)
    engine.dispose()
