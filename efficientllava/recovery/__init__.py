"""Recovery: train a pruned model against data, against its unpruned teacher, or both."""
