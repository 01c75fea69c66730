"""Ratios of time and memory of this project against simpler ways of the same: ``python -m experiments.speed``."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would write lines between those of the table
