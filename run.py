"""Prune, recover and evaluate a vision-language model: ``python run.py [group=option] [key=value]``."""

import sys

from efficientllava.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
