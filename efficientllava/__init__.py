"""efficientllava: prune large vision-language models, recover their skill, and prove it.

Importing the package makes checkpoints with per-layer sizes loadable by ``AutoModelForImageTextToText``. The
registration waits until transformers' auto classes are imported, so that ``import efficientllava`` stays cheap.
"""

from __future__ import annotations

from ._registration import register_when_transformers_loads

__version__ = "0.1.0"

register_when_transformers_loads()
