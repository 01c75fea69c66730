"""The reload gate: an exported folder is loaded in a fresh process and must give the logits that were seen in memory.

The process that loads a uniform checkpoint never imports this package: it runs the text of `CHECK` with ``python -I``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.pruned import is_per_layer

CHECK = """
import sys
folder, probe, dtype, device, package = sys.argv[1:]
if package:
    sys.path.insert(0, package)
    import efficientllava
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
inputs = load_file(probe)
expected = inputs.pop("logits")
model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
wrong = {name: sorted(map(str, keys))[:3] for name, keys in info.items() if keys}
if wrong:
    sys.exit(f"tensors do not fit: {wrong}")
if not package and "efficientllava" in sys.modules:
    sys.exit("a uniform checkpoint must load without efficientllava")
with torch.no_grad():
    logits = model.to(device).eval()(**{k: v.to(device) for k, v in inputs.items()}).logits.cpu()
difference = (logits.float() - expected.float()).abs().max().item()
bound = 0.0 if device == "cpu" else 1e-2 * expected.float().abs().max().item()
if not difference <= bound:
    sys.exit(f"logits differ by {difference} (allowed {bound})")
"""


@torch.no_grad()
def reload_gate(folder: Path, model: Any, inputs: Mapping[str, Tensor]) -> None:
    """Compare an exported folder with the model in memory.

    Args:
        folder: The exported folder.
        model: The model in memory, its weights rounded to the storage type.
        inputs: Keyword tensors of ``model.forward``: a prompt with an image.

    Raises:
        RuntimeError: The reloaded model differs; the message says how.
    """
    device = next(model.parameters()).device
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    package = str(Path(__file__).resolve().parents[2]) if is_per_layer(model.config.get_text_config()) else ""
    threads = torch.get_num_threads()
    # The number of threads decides the order of sums; one on both sides makes the comparison exact.
    torch.set_num_threads(1)
    try:
        logits = model(**{name: value.to(device) for name, value in inputs.items()}).logits
    finally:
        torch.set_num_threads(threads)
    model.to("cpu")  # the fresh process may need the memory of the device
    with tempfile.TemporaryDirectory(prefix="efficientllava-") as scratch:
        probe = str(Path(scratch) / "probe.safetensors")
        save_file({name: value.cpu().contiguous() for name, value in {**inputs, "logits": logits}.items()}, probe)
        command = [sys.executable, "-I", "-c", CHECK, str(folder), probe, dtype, device.type, package]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    model.to(device)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{folder}: the reloaded checkpoint differs from the model in memory: {reason}")
