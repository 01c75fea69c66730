"""Evaluation: tasks, scorers, measured efficiency."""
