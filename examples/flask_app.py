"""Flask-SQLAlchemy: the queue in ``db.session``, and a command that does the queued work.

``QueueService(db.session())`` enqueues in the transaction that writes the order. ``flask work``
leases what is due, one message at a time, and settles each in the transaction of its handler::

    pip install 'pgqrs-sa[psycopg]' 'flask-sqlalchemy>=3.1'
    export PGQRS_DSN=postgresql://localhost/flask_shop FLASK_APP=examples/flask_app.py
    flask init-db
    flask run
    curl localhost:5000/orders --json '{"customer": "ada@example.org", "total_cents": 4200}'
    flask work
"""

from __future__ import annotations

import os
import re
from datetime import datetime

import click
from flask import Blueprint, Flask, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import DateTime, Text, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgqrs_sa import Delivery, InvalidArgument, QueueService, metadata

QUEUE = "receipts"


class Base(DeclarativeBase):
    """The registry and MetaData of the application."""


db = SQLAlchemy(model_class=Base)
shop = Blueprint("shop", __name__, cli_group=None)


class Order(db.Model):  # type: ignore[name-defined, misc]  # made at run time
    """An order, and when its receipt was sent."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(Text)
    total_cents: Mapped[int]
    receipt_sent_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


def create_app() -> Flask:
    """Build the application; ``flask`` looks for this name."""
    app = Flask(__name__)
    url = re.sub("^postgres(ql)?:", "postgresql+psycopg:", os.environ["PGQRS_DSN"])
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db.init_app(app)
    app.register_blueprint(shop)
    return app


@shop.app_errorhandler(InvalidArgument)
def invalid(error: InvalidArgument) -> tuple[dict[str, str], int]:
    """Answer with the error of a delay: it is written for people."""
    return {"error": str(error)}, 422


@shop.post("/orders")
def create_order() -> tuple[dict[str, int], int]:
    """Write an order and enqueue its receipt; an exception leaves neither."""
    data = request.get_json()
    with db.session.begin():
        order = Order(customer=data["customer"], total_cents=data["total_cents"])
        db.session.add(order)
        db.session.flush()  # gives the order its id
        receipt = QueueService(db.session()).enqueue(
            QUEUE, {"order": order.id}, delay=data.get("receipt_delay", 0)
        )
        return {"order": order.id, "message": receipt.id}, 201


@shop.cli.command("init-db")
def init_db() -> None:
    """Make the tables and the queue. With Flask-Migrate, op.pgqrs_upgrade() makes ours instead."""
    metadata.create_all(db.engine)
    db.create_all()
    with db.session.begin():
        QueueService(db.session()).queues.create(QUEUE)
    db.engine.dispose()


@shop.cli.command("work")
def work() -> None:
    """Send the receipts that are due, then stop."""
    while True:
        with db.session.begin():  # commits the lease before the work begins
            deliveries = QueueService(db.session()).dequeue(QUEUE)
        if not deliveries:
            break
        settle(deliveries[0])
    db.engine.dispose()


def settle(delivery: Delivery) -> None:
    """Handle a message and archive it in one transaction, or note what went wrong.

    ``archive`` raises LeaseLost when somebody else has the message by now: the handler's rows are
    rolled back then, and ``try_fail`` leaves the message to its new holder.
    """
    try:
        with db.session.begin():
            send_receipt(delivery.payload["order"])
            QueueService(db.session()).archive(delivery)
    except Exception as error:  # noqa: BLE001 - one bad message must not stop the others
        with db.session.begin():
            QueueService(db.session()).try_fail(delivery, error)
        click.echo(f"message {delivery.id}: {error}", err=True)


def send_receipt(order_id: int) -> None:
    """Send a receipt: a mail in real life, which may go out twice if the commit then fails."""
    order = db.session.get_one(Order, order_id)
    click.echo(f"receipt for order {order.id} goes to {order.customer}")
    order.receipt_sent_at = func.now()
