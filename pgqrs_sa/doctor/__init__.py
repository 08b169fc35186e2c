"""The doctor: checks of a running installation, each with the command that fixes what it finds."""

__all__: list[str] = []
