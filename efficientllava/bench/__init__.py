"""Ratios of time and memory of this project against simpler ways of the same: ``python -m efficientllava.bench``."""
