"""Model families: where their parts live, tiny trained ones, per-layer configurations, the shared forward pass."""
