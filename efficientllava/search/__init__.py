"""Search of a pruning policy: a level for the attention and the MLP of every layer."""
