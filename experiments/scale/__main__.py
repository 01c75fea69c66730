"""Memory of pruning LLaVA-1.5-7B by the closed form, and what was measured on a CPU of it and of its like.

    python -m experiments.scale              # the closed form, from shapes alone
    python -m experiments.scale --measure    # one decoder layer of that size
    python -m experiments.scale <folder>     # two layers of every family, from the published layout to a smaller one

The weights of what is measured are random; vision tower, projector and vocabulary of a family have their full size. It
goes through ``run.py``: convert, score, refit, cut, save, and the comparison of the logits with a fresh process's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaProcessor

from efficientllava.checkpoint.folder import stock_config
from efficientllava.checkpoint.processors import vicuna_template
from efficientllava.estimate import forecast, meta_model
from efficientllava.models.anatomy import layers_of
from efficientllava.pruning.memory import CalibrationSize, micro_batch, pruning_memory
from efficientllava.pruning.obs import OBS_ROUNDS, eliminate
from efficientllava.pruning.plan import LayerPlan, PruningPlan, plan_ratio
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.statistics import layer_statistics
from efficientllava.pruning.stream import Calibration, CalibrationStream
from efficientllava.settings.schema import PruneConfig
from efficientllava.stages.request import composed
from experiments.speed import rows as bench
from experiments.tiny_models.tiny import tiny_llava
from tests.models.originals import BUNNY, INTERNVL, bunny_tokenizer, internvl_tokenizer

LAYERWISE = PruneConfig("layerwise", "layerwise", 0.3)
WIDTHWISE = PruneConfig("widthwise", "widthwise", 0.3, refit=True)
PAPER = PruneConfig("widthwise_paper", "widthwise", 0.3, "param_first", "local", taylor_mean="batch")
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


def llava_7b() -> Any:
    """LLaVA-1.5-7B on the meta device, of the sizes in ``conf/model``."""
    return forecast(composed("model=llava_1_5_7b", "dry_run=true")).base


def closed_form() -> None:
    """Print peaks of all methods."""
    model = llava_7b()
    print("| records x tokens, micro-batch | method | one GPU, GB | x weights | offload: card, GB | host, GB |")
    print("|---|---|---:|---:|---:|---:|")
    rows = {}
    for records, tokens, batch in ((64, 700, 2), (64, 2048, 2), (64, 2048, 8)):
        for config in (LAYERWISE, WIDTHWISE, PAPER):
            size = CalibrationSize(records, tokens, micro_batch(config, batch))
            memory = pruning_memory(model, config, size)
            small = pruning_memory(model, replace(config, offload=True), size)
            shown = f"{memory.peak / 1e9:.1f} | {memory.ratio:.2f} | {small.peak / 1e9:.1f} | {small.host / 1e9:.1f}"
            rows[f"| {records} x {tokens}, {size.batch_size} | `{config.name}` | {shown} |"] = None
    print(*rows, sep="\n")


def one_layer(device: str = "cpu") -> Any:
    """A random LLaVA with one decoder layer of the 7B model's size, bf16."""
    with torch.device("meta"):
        model = bench.middle_sized().bfloat16()
    if device == "meta":
        return model
    model, generator = model.to_empty(device="cpu"), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        drawn = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data = drawn.mul_(0.04).sub_(0.02) if parameter.ndim > 1 else torch.ones_like(parameter)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def report(
    what: str, config: PruneConfig, phase: str, function: Callable[[Any], Any], prepare: Any = one_layer
) -> None:
    """Print what a call holds above what was prepared, next to the bound of its phase."""
    spent = 0.0

    def timed(argument: Any) -> None:
        nonlocal spent
        began = time.process_time()
        function(argument)
        spent = time.process_time() - began

    peak = bench.peak_memory(prepare, timed)
    memory = pruning_memory(one_layer("meta"), config, CalibrationSize.of(bench.random_batches()), stored=False)
    bound = memory.phases[phase] - memory.model
    print(f"| {what} | {peak / 1e6:.0f} | {bound / 1e6:.0f} | {spent:.0f} |", flush=True)


def measure_layer() -> None:
    """Measure statistics, an OBS round, refit with cut, and Taylor scores of one layer."""
    torch.set_num_threads(1)
    bench.LAYERS, bench.HIDDEN, bench.CHANNELS, bench.HEADS, bench.VOCABULARY = 1, 4096, 11008, 32, 512
    bench.BATCHES, bench.LENGTH = 2, 128
    generator = torch.Generator().manual_seed(0)
    kept = LayerPlan(0, tuple(range(22)), tuple(sorted(torch.randperm(11008, generator=generator)[:7680].tolist())))
    ratio = plan_ratio(one_layer("meta"), [kept])
    plan = PruningPlan("widthwise", (kept,), 1, 1, None, ratio, ())

    def statistics(model: Any) -> None:
        stream = CalibrationStream(model, Calibration(bench.random_batches()))
        layer_statistics(stream, layers_of(model)[0], 0, stream.start())

    def gram() -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(512, 11008, generator=generator)
        return torch.rand(4096, 11008, generator=generator).bfloat16(), inputs.T @ inputs

    def round_of_obs(given: tuple[torch.Tensor, torch.Tensor]) -> None:
        list(eliminate(*given, 1, 0.01, [11008 - 11008 // OBS_ROUNDS]))

    print("| one layer, 4096 x 11008, 256 tokens | measured, MB | bound, MB | CPU seconds |\n|---|---:|---:|---:|")
    report("statistics", WIDTHWISE, "statistics", statistics)
    batches = Calibration(bench.random_batches())
    report("refit and cut", WIDTHWISE, "refit and cut", lambda model: apply_plan(model, plan, batches, WIDTHWISE))
    report("Taylor scores", PAPER, "scores", lambda model: make_plan(model, batches, PAPER))
    report(f"OBS, one of {OBS_ROUNDS} rounds, beside its Gram matrix", WIDTHWISE, "scores", round_of_obs, gram)


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


def measure_family(option: str, folder: Path) -> str:
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


def measure_families(folder: Path) -> None:
    """Measure all families."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    writers = {"llava_1_5_7b": write_llava, "bunny_3b": write_bunny, "mini_internvl_4b": write_internvl}
    rows = []
    for option, write in writers.items():
        (folder / option).mkdir()
        write(folder / option, config_of(option))
        began = time.perf_counter()
        rows.append(measure_family(option, folder))
        print(rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    head = (
        f"| {LAYERS} layers of | parameters, B | pruned, B | CPU seconds | peak memory, GB |\n|---|---:|---:|---:|---:|"
    )
    print(head, *rows, sep="\n")


def main(arguments: list[str]) -> None:
    """What the command line asks for."""
    if arguments == ["--measure"]:
        measure_layer()
    elif arguments:
        measure_families(Path(arguments[0]))
    else:
        closed_form()


if __name__ == "__main__":
    main(sys.argv[1:])
