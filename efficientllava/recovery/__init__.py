"""Recovery finetuning: supervised, logit and hidden-state distillation."""
