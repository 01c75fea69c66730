"""``hydra/launcher=gpu_pool``: every job of a sweep is one process on leased GPUs or cores."""
