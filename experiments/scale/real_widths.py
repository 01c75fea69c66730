"""Two decoder layers of every family at their real widths: published layout to smaller checkpoint, on one core.

    python -m experiments.scale.real_widths <folder>

Weights are random; vision tower, projector and vocabulary have their full size. Each family goes through ``run.py``:
convert, score, refit, cut, save, and the comparison of the logits with those of a fresh process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaProcessor

from efficientllava.checkpoint.folder import stock_config
from efficientllava.checkpoint.processors import vicuna_template
from efficientllava.estimate.forecast import meta_model
from efficientllava.stages.options import composed
from experiments.tiny_models.tiny import tiny_llava
from tests.models.originals import BUNNY, INTERNVL, bunny_tokenizer, internvl_tokenizer

ROOT, LAYERS, SIDE = Path(__file__).resolve().parents[2], 2, 448
# Stock names to published ones, replaced in this order.
BUNNY_NAMES = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1": "model.mm_projector.0",
    "model.multi_modal_projector.linear_2": "model.mm_projector.2",
    "model.language_model.": "model.",
}
INTERNVL_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head": "language_model.lm_head",
    "model.multi_modal_projector.layer_norm": "mlp1.0",
    "model.multi_modal_projector.linear_1": "mlp1.1",
    "model.multi_modal_projector.linear_2": "mlp1.3",
    "model.vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "model.vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "model.vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    "model.vision_tower.encoder.layer.": "vision_model.encoder.layers.",
    "lambda_": "ls",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.projection_layer": "attn.proj",
}


def config_of(option: str) -> Any:
    """The stock configuration of a family, with few decoder layers."""
    config = stock_config(composed(f"model={option}", "dry_run=true").model)
    config.text_config.num_hidden_layers = LAYERS
    return config


def weights_of(config: Any) -> dict[str, torch.Tensor]:
    """Random weights under their stock names, in the stored type."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in meta_model(config).state_dict().items():
        if tensor.ndim > 1:
            drawn = torch.rand(tensor.shape, generator=generator, dtype=config.dtype)
            weights[name] = drawn.sub_(0.5).mul_(0.07)  # a standard deviation of 0.02
        else:
            weights[name] = torch.full(tensor.shape, float("bias" not in name), dtype=config.dtype)
    return weights


def published(weights: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Weights under their published names, with queries, keys and values of the tower in one tensor."""
    for name in [name for name in weights if "vision_tower" in name and ".attention.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    renamed = {}
    for name, tensor in weights.items():
        for stock, original in names.items():
            name = name.replace(stock, original)
        renamed[name] = tensor
    return renamed


def write_llava(folder: Path, config: Any) -> None:
    """The published layout is that of stock transformers."""
    tokenizer = tiny_llava()[1].tokenizer
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.load_state_dict(weights_of(config), assign=True)
    model.to(config.dtype).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, **options, chat_template=vicuna_template()).save_pretrained(folder)


def write_bunny(folder: Path, config: Any) -> None:
    """Bunny's layout."""
    text = config.text_config
    sizes = {key: getattr(text, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), text.num_attention_heads)
    end = bunny_tokenizer(folder) - 1
    tower = {"mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_hidden_size": config.vision_config.hidden_size}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    (folder / "config.json").write_text(json.dumps({**BUNNY, **sizes, **heads, **tower, **tokens}))
    save_file(published(weights_of(config), BUNNY_NAMES), folder / "model.safetensors", {"format": "pt"})


def write_internvl(folder: Path, config: Any) -> None:
    """Mini-InternVL's layout."""
    internvl_tokenizer(folder)
    text, vision = config.text_config, config.vision_config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    rope = {"type": "su", **{key: text.rope_parameters[key] for key in ("short_factor", "long_factor")}}
    more = ("vocab_size", "num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings")
    changes = {
        "llm_config": {key: getattr(text, key) for key in (*keys, *more)} | {"rope_scaling": rope},
        "vision_config": {key: getattr(vision, key) for key in keys} | {"image_size": SIDE, "patch_size": 14},
    }
    raw = {**INTERNVL, "force_image_size": SIDE, **{part: {**INTERNVL[part], **changes[part]} for part in changes}}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(published(weights_of(config), INTERNVL_NAMES), folder / "model.safetensors", {"format": "pt"})


def write_data(folder: Path) -> None:
    """A few records with noise for images."""
    draw, said = (
        np.random.default_rng(0),
        [{"from": "human", "value": "<image>\nwhere?"}, {"from": "gpt", "value": "here"}],
    )
    for number in range(4):
        noise = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    rows = [{"id": str(n), "image": f"{n % 4}.png", "conversations": said} for n in range(40)]
    (folder / "records.json").write_text(json.dumps(rows))


def measure(option: str, folder: Path) -> str:
    """Run one family; return its row."""
    options = ["prune=widthwise", "prune.share=0.3", "prune.importance=activation", "calibration.samples=2"]
    options += [
        "recover=none",
        "evaluate.efficiency=false",
        "trainer=cpu",
        "logger=none",
        "callbacks=none",
        "threads=1",
    ]
    places = [f"model.path={folder / option}", f"data.path={folder}/records.json", f"data.image_root={folder}"]
    command = [sys.executable, str(ROOT / "run.py"), f"model={option}", "data=conversations", *places, *options]
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, f"paths.output_dir={folder}/out-{option}", f"hydra.run.dir={folder}/run-{option}"], env=environment
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{option}: the run failed")
    results = json.loads((folder / f"run-{option}" / "results.json").read_text())
    before, after = (results["stages"][stage] for stage in ("base", "pruned"))
    shown = f"{before['parameters'] / 1e9:.2f} | {after['parameters'] / 1e9:.2f}"
    return f"| `{option}` | {shown} | {used.ru_utime + used.ru_stime:.0f} | {used.ru_maxrss / 1e6:.1f} |"


def main(folder: Path) -> None:
    """Measure all families."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    writers = {"llava_1_5_7b": write_llava, "bunny_3b": write_bunny, "mini_internvl_4b": write_internvl}
    rows = []
    for option, write in writers.items():
        (folder / option).mkdir()
        write(folder / option, config_of(option))
        began = time.perf_counter()
        rows.append(measure(option, folder))
        print(rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    head = (
        f"| {LAYERS} layers of | parameters, B | pruned, B | CPU seconds | peak memory, GB |\n|---|---:|---:|---:|---:|"
    )
    print(head, *rows, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
