"""Say what to install, before anything here is imported that fails without it."""

from __future__ import annotations

from .. import extras

__all__: list[str] = []

extras.require("pgqrs_sa.pgqrs")
