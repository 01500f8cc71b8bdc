"""One core for every tier: torch reads the variable when it is first imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
