"""Compile each module once for all processes of all runs, also where Python is told not to.

A container often sets ``PYTHONDONTWRITEBYTECODE``. Then each of the processes that a run starts
compiles what it imports, and each worker of xdist all test files: that took a quarter of the
processor time of a run. Importing this module keeps their bytecode in pytest's cache folder, and
leaves no ``__pycache__`` folders.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".pytest_cache/bytecode"

if sys.dont_write_bytecode and sys.pycache_prefix is None:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(FOLDER)
    # For the workers of xdist and for the programs that tests start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
