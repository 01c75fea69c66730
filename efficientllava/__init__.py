"""efficientllava: prune large vision-language models, recover their skill, and prove it."""

__version__ = "0.1.0"
