"""Score, select, refit, cut."""
