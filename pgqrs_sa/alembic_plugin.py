"""The entry point through which Alembic finds pgqrs_sa; see `pgqrs_sa.migrations`.

Alembic loads it while it is itself being imported: a failure here breaks ``import alembic`` for
the whole environment, whether or not anything there uses the queue. So nothing of Alembic is
imported at module level, the two operations are registered by a module import that may be only
half done by then, and the comparison, which needs everything else, is imported when a host that
lists the plugin first autogenerates.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations.ops import UpgradeOps
    from alembic.runtime.plugins import Plugin
    from alembic.util import PriorityDispatchResult

__all__ = ["setup"]


def setup(plugin: Plugin) -> None:
    """Register the operations, and the comparison for hosts that list ``pgqrs_sa``."""
    from alembic.util import DispatchPriority  # noqa: PLC0415

    from .migrations import ops as _  # noqa: F401, PLC0415

    plugin.add_autogenerate_comparator(
        _compare, "autogenerate", "pgqrs_sa", qualifier="postgresql", priority=DispatchPriority.LAST
    )


def _compare(context: AutogenContext, upgrade_ops: UpgradeOps) -> PriorityDispatchResult:
    from .migrations import autogen  # noqa: PLC0415

    return autogen.compare(context, upgrade_ops)


class _OneOfItself(ModuleType):
    """Alembic 1.18.0 to 1.20.0 iterates over what an entry point loads; later it is the module."""

    def __iter__(self) -> Iterator[ModuleType]:
        yield self


sys.modules[__name__].__class__ = _OneOfItself
