"""The business table of a small shop that keeps its queue in its own database.

An order refers to the message that sends its receipt. Foreign keys to a message are SET NULL and
indexed: a settled message leaves the table, and the database then looks for who referred to it.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from pgqrs_sa import Message


class Base(DeclarativeBase):
    """The shop's registry and MetaData."""


class Order(Base):
    """An order, the live message that will send its receipt, and how many were sent: one."""

    __tablename__ = "shop_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(Text)
    total_cents: Mapped[int]
    receipts_sent: Mapped[int] = mapped_column(server_default=text("0"))
    receipt_id: Mapped[int | None] = mapped_column(
        BigInteger,
        ForeignKey(Message.id, name="shop_orders_receipt_id_fkey", ondelete="SET NULL"),
        index=True,
    )
    receipt: Mapped[Message | None] = relationship(Message)
