"""Programs for those who work on this package; they are not installed with it."""
