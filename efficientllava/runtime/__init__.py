"""The lowest floor: what everything else stands on, and what knows nothing of models."""
