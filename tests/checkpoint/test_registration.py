"""Per-layer checkpoints load after ``import efficientllava``, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

REGISTERED = "from transformers.models.auto import configuration_auto, modeling_auto; "
REGISTERED += "configuration_auto.CONFIG_MAPPING['pruned_llama']"


@pytest.mark.parametrize(
    "first",
    [
        "import efficientllava",
        "import transformers; import efficientllava",
        "from transformers import AutoModel; import efficientllava",
        "import efficientllava.models.pruned",
        "import efficientllava.data.collator",
    ],
)
def test_the_order_of_imports_does_not_matter(first):
    done = subprocess.run([sys.executable, "-c", f"{first}; {REGISTERED}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
