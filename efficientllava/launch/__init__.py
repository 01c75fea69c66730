"""The jobs of a sweep and the processes of a run: how they start, what is known of them, how they end."""
