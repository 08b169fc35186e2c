"""How many examples a property is tried with.

``HYPOTHESIS_PROFILE`` chooses: ``dev`` (the default) tries few, ``ci`` and ``thorough`` try many.
A property that guards a promise states the fewest that it needs with ``at_least``.
"""

from __future__ import annotations

import os

from hypothesis import settings

__all__ = ["at_least", "load_profile"]

EXAMPLES = {"dev": 25, "ci": 200, "thorough": 200}


def load_profile() -> None:
    for name, examples in EXAMPLES.items():
        settings.register_profile(name, max_examples=examples, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def at_least(examples: int) -> settings:
    """Try as many examples as the profile says, but no fewer than these."""
    return settings(max_examples=max(examples, settings.default.max_examples))
