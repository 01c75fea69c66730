"""What a run would make and need, before it is started."""
