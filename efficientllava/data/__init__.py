"""Records, prompts, label masks, batches."""
