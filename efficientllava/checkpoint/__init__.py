"""Checkpoints: folders and hub ids, what lies in them, and whether they come back."""
