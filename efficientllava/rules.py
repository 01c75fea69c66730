"""What each key may be, and when it has an effect: two tables that `efficientllava.checks` applies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .hub import is_hub_id
from .schema import BLOCKS, GGUF_TYPES, IMPORTANCES, JUDGED, TAYLOR, RunConfig

# Data whose images are published apart from their records -> what data.image_root must hold.
IMAGE_FOLDERS = {
    "llava_665k": "coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K, vg/VG_100K_2",
    "bunny_695k": "the unpacked images of finetune/ in BoyaWu10/Bunny-v1_0-data",
    "internvl_sft": "ai2d, chartqa, coco, docvqa, dvqa, geoqa+, gqa, llava, ocr_vqa, sam, share_textvqa, synthdog-en, "
    "textvqa, vg, web-celebrity, web-landmark, wikiart (playground/data in InternVL)",
}

Rule = tuple[Callable[[Any], bool], str]


def _one_of(*options: Any) -> Rule:
    shown = ", ".join("null" if option is None else str(option) for option in options)
    return (lambda value: value in options), f"one of {shown}"


def _number(low: float, high: float | None, *, open_low: bool = False, open_high: bool = True) -> Rule:
    def inside(value: Any) -> bool:
        if not isinstance(value, int | float):
            return False
        above = value > low if open_low else value >= low
        return above and (value < math.inf if high is None else value < high if open_high else value <= high)

    left = "(" if open_low else "["
    right = "infinity)" if high is None else f"{high:g}{')' if open_high else ']'}"
    return inside, f"in {left}{low:g}, {right}"


POSITIVE = _number(0, None, open_low=True)
AT_LEAST_1 = _number(1, None)
SHARE = _number(0, 1)
DTYPE = _one_of("auto", "float32", "float16", "bfloat16")

# key -> (predicate, what is allowed); null passes where the schema allows it
RULES: dict[str, Rule] = {
    "data_frac": _number(0, 1, open_low=True, open_high=False),
    "seed": _number(0, 2**32),
    "threads": AT_LEAST_1,
    "trainer.accelerator": _one_of("auto", "cpu", "gpu", "cuda"),
    "trainer.precision": _one_of("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true"),
    "keep": _one_of("all", "recovered", "none"),
    "logger.mode": _one_of(None, "online", "offline", "disabled"),
    "model.dtype": DTYPE,
    "model.train": _one_of("lora", "full"),
    "model.protocol": _one_of(None, "vicuna_v1"),
    "model.system": (lambda text: bool(text.strip()), "a sentence"),
    "calibration.samples": AT_LEAST_1,
    "calibration.report": _number(0, None),
    "calibration.batch_size": AT_LEAST_1,
    "calibration.generate": _number(0, None),
    "calibration.generate_length": _number(2, None),
    "calibration.generate_share": _number(0, 1, open_low=True),
    "data.name": _one_of("digits_vqa", "conversations", *IMAGE_FOLDERS),
    "data.images": AT_LEAST_1,
    "data.test_questions": AT_LEAST_1,
    "data.max_length": AT_LEAST_1,
    "data.max_bad_fraction": SHARE,
    "data.batch_size": AT_LEAST_1,
    "data.global_batch_size": AT_LEAST_1,
    "data.num_workers": _number(0, None),
    "prune.method": _one_of("none", "layerwise", "widthwise", "auto"),
    "prune.ratio": SHARE,
    "prune.importance": _one_of(*IMPORTANCES),
    "prune.selection": _one_of("shape", "local", "floor", "global"),
    "prune.heads": _one_of("group", "query"),
    "prune.prefix": _one_of("dense", "pruned"),
    "prune.refit_target": _one_of("adaptive", "layer", "residual"),
    "prune.damping": POSITIVE,
    "prune.round_to": (
        lambda value: type(value) is int and value >= 1,
        f"in [1, infinity), or one of {', '.join(BLOCKS)}",
    ),
    "prune.tokens": _one_of("all", "image", "text", "answer"),
    "prune.block_influence": _one_of("mean", "sum"),
    "prune.taylor_mean": _one_of("sample", "batch"),
    "prune.share": SHARE,
    "prune.drop_layers": _number(0, None),
    "search.method": _one_of("evolution", "random", "knapsack"),
    "search.granularity": _one_of("structured", "unstructured", "2:4"),
    "search.budget.resource": _one_of("params", "flops", "latency"),
    "search.budget.target": POSITIVE,
    "search.risk": _one_of("loss", "kl", "error"),
    "search.gap": _one_of("fro", "fro_logprod", "dist", "held_out", "none"),
    "search.gap_weight": _number(0, None),
    "search.rounds": AT_LEAST_1,
    "search.generations": AT_LEAST_1,
    "search.population": _number(2, None),
    "search.parents": AT_LEAST_1,
    "search.mutants": _number(0, None),
    "search.crossovers": _number(0, None),
    "search.mutation": _number(0, 1, open_low=True, open_high=False),
    "search.exchange": _number(0, 1, open_high=False),
    "search.finalists": AT_LEAST_1,
    "search.projector_lr": POSITIVE,
    "search.projector_pull": _number(0, None),
    "search.projector_anchor": _number(0, None),
    "recover.name": _one_of("none", "projector", "sft", "kd_logit", "kd_hidden", "kd_both"),
    "recover.weights.sft": _number(0, None),
    "recover.weights.logit": _number(0, None),
    "recover.weights.hidden": _number(0, None),
    "recover.train": _one_of("projector", "lora", "full"),
    "recover.lr": POSITIVE,
    "recover.projector_lr": POSITIVE,
    "recover.steps": AT_LEAST_1,
    "recover.epochs": POSITIVE,
    "recover.optimizer": _one_of("adamw", "sgd"),
    "recover.weight_decay": _number(0, None),
    "recover.scheduler": _one_of("cosine", "linear", "constant"),
    "recover.warmup": SHARE,
    "recover.max_grad_norm": POSITIVE,
    "recover.lora.r": AT_LEAST_1,
    "recover.lora.alpha": POSITIVE,
    "recover.lora.dropout": SHARE,
    "recover.kl": _one_of("forward", "reverse"),
    "recover.temperature": POSITIVE,
    "recover.hidden_metric": _one_of("l2", "cosine"),
    "recover.parity": _one_of(None, "vlmcompression"),
    "recover.teacher.dtype": DTYPE,
    "recover.teacher.source": _one_of("live", "cached"),
    "recover.teacher.top_k": AT_LEAST_1,
    "recover.chunk": AT_LEAST_1,
    "recover.save_every": AT_LEAST_1,
    "evaluate.protocol": _one_of("llava", "lmms_eval"),
    "evaluate.limit": AT_LEAST_1,
    "evaluate.batch_size": AT_LEAST_1,
    "evaluate.num_workers": _number(0, None),
    "evaluate.max_new_tokens": AT_LEAST_1,
    "evaluate.repeats": AT_LEAST_1,
    "evaluate.new_tokens": _number(2, None),
    "evaluate.speed_batches": (
        (lambda sizes: len({*sizes}) == len(sizes) and min(sizes, default=1) >= 1),
        "distinct, >= 1",
    ),
    "evaluate.quantization": _one_of("none", "int8", "int4"),
    "deploy.name": _one_of("none", "gguf"),
    "deploy.types": (
        (lambda types: bool(types) and len({*types}) == len(types) and {*types} <= {*GGUF_TYPES}),
        f"distinct, of {', '.join(GGUF_TYPES)} (K-quants are made of the f16 file by llama.cpp's own program: "
        "llama-quantize <f16 file> <file> Q4_K_M)",
    ),
    "deploy.repeats": AT_LEAST_1,
    "evaluate.judge.runs": AT_LEAST_1,
    "evaluate.judge.attempts": AT_LEAST_1,
    "evaluate.judge.concurrency": AT_LEAST_1,
    "evaluate.judge.timeout": POSITIVE,
    "evaluate.judge.retries": _number(0, None),
}

# Arguments of Lightning's Trainer that are the user's; the others belong to the stages.
TRAINER = {
    *("_target_", "accelerator", "devices", "num_nodes", "strategy", "plugins", "precision", "deterministic"),
    *("benchmark", "log_every_n_steps", "enable_model_summary", "enable_progress_bar", "num_sanity_val_steps"),
}
LOOKING = ("obs", "activation", "wanda", "flap")  # importances that look at activations
OF_FILES = ("path", "group_by_modality_length")


def _reads_benchmarks(config: RunConfig) -> bool:
    return any(task != "digits_vqa" for task in config.evaluate.tasks)


# key -> the key of the same range whose value it takes where it is not typed
FOLLOWS = {"recover.teacher.dtype": "model.dtype"}

# (typed key or prefix, whether it has an effect, what would give it one)
EFFECTS: tuple[tuple[str, Callable[[RunConfig], bool], str], ...] = (
    (
        "logger.weights",
        lambda c: c.keep != "none" and (c.prune.method != "none" or c.recover.name != "none"),
        "no checkpoint stays; prune or recover, and set keep=all or keep=recovered",
    ),
    ("keep", lambda c: not c.pretrain, "it belongs to runs that prune or recover"),
    ("data_frac", lambda c: c.recover.name != "none" or bool(c.pretrain), "choose a recovery with recover="),
    ("model.revision", lambda c: is_hub_id(c.model.path), "it belongs to a hub id as model.path"),
    (
        "data.images",
        lambda c: c.data.name == "digits_vqa" and c.recover.name != "none",
        "it is the size of the recovery pool of data=digits_vqa",
    ),
    ("data.test_questions", lambda c: c.data.name == "digits_vqa", "it belongs to data=digits_vqa"),
    (
        "data.image_root",
        lambda c: c.data.name != "digits_vqa",
        "choose data=conversations (the images of calibration.path start from calibration.image_root)",
    ),
    *((f"data.{key}", lambda c: c.data.name != "digits_vqa", "choose data=conversations") for key in OF_FILES),
    ("data.group_by_modality_length", lambda c: c.recover.name != "none", "choose a recovery with recover="),
    *(
        (f"data.{key}", lambda c: c.recover.name != "none" or bool(c.pretrain), "choose a recovery with recover=")
        for key in ("batch_size", "global_batch_size", "num_workers")
    ),
    ("data.max_bad_fraction", lambda c: c.data.name != "digits_vqa", "choose data=conversations"),
    (
        "data.max_length",
        lambda c: c.prune.method != "none" or c.recover.name != "none",
        "choose a paradigm with prune= or a recovery with recover=",
    ),
    ("calibration", lambda c: c.prune.method != "none", "choose a paradigm with prune="),
    ("calibration.image_root", lambda c: c.calibration.path is not None, "set calibration.path"),
    (
        "calibration.batch_size",
        lambda c: c.prune.method != "widthwise" or c.prune.importance not in TAYLOR,
        "Taylor scores take one record at a time",
    ),
    (
        "calibration.generate",
        lambda c: c.prune.solves,
        "only a refit and its scores use written text; set prune.refit=true or prune.importance=obs",
    ),
    *(
        (f"calibration.generate_{key}", lambda c: c.calibration.generate != 0, "set calibration.generate above 0")
        for key in ("length", "share")
    ),
    ("prune.", lambda c: c.prune.method != "none", "choose a paradigm with prune="),
    (
        "prune.ratio",
        lambda c: c.prune.ratio is None or not bypassed(c),
        "prune.share, prune.drop_layers or search.budget.target says what goes",
    ),
    ("prune.importance", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    (
        "prune.selection",
        lambda c: c.prune.method == "widthwise" and c.prune.share is None,
        "it belongs to prune=widthwise without prune.share",
    ),
    (
        "prune.round_to",
        lambda c: c.prune.method in ("widthwise", "auto") and _cuts(c),
        "it belongs to prune=widthwise or prune=auto without masks",
    ),
    *(
        (f"prune.{key}", lambda c: _cuts(c), "masks leave shapes alone; set search.granularity=structured")
        for key in ("refit", "refit_target", "reinitialise")
    ),
    ("prune.share", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    ("prune.protect", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    (
        "prune.taylor_mean",
        lambda c: c.prune.method == "widthwise" and c.prune.importance in TAYLOR,
        f"it needs prune.importance={'|'.join(TAYLOR)}",
    ),
    (
        "prune.tokens",
        lambda c: c.prune.refit or c.prune.method != "widthwise" or c.prune.importance in LOOKING,
        "nothing looks at activations; set prune.refit=true or another prune.importance",
    ),
    (
        "prune.damping",
        lambda c: (
            c.prune.refit or c.prune.method == "auto" or (c.prune.method == "widthwise" and c.prune.importance == "obs")
        ),
        "set prune.refit=true or prune.importance=obs",
    ),
    ("prune.refit_target", lambda c: c.prune.refit, "set prune.refit=true"),
    ("prune.heads", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    ("prune.bias", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    (
        "prune.prefix",
        lambda c: c.prune.method == "widthwise" and c.prune.importance in LOOKING,
        f"it belongs to prune=widthwise with prune.importance={'|'.join(LOOKING)}",
    ),
    ("prune.offload", lambda config: _on_gpu(config), "without a GPU all weights are in host memory anyway"),
    ("search", lambda c: c.prune.method == "auto", "set prune=auto"),
    *(
        (f"search.{key}", lambda c: c.search.method != "random", "set search.method=evolution")
        for key in ("mutants", "crossovers", "mutation", "exchange")
    ),
    (
        "search.projector",
        lambda c: not c.search.projector or c.search.rounds > 1,
        "it evolves between rounds; set search.rounds above 1",
    ),
    *(
        (
            f"search.projector_{key}",
            lambda c: c.search.projector and c.search.rounds > 1,
            "set search.projector=on and search.rounds above 1",
        )
        for key in ("lr", "pull", "anchor")
    ),
    (
        "search.finalists",
        lambda c: _cuts(c),
        "masks are not refitted; set search.granularity=structured",
    ),
    (
        "search.gap_weight",
        lambda c: c.search.gap not in ("none", "held_out"),
        "set search.gap to fro, fro_logprod or dist",
    ),
    ("prune.drop_layers", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("prune.iterative", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("prune.block_influence", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("prune.final_norm", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("recover.", lambda c: c.recover.name != "none", "choose a recovery with recover="),
    (
        "recover.lr",
        lambda c: c.recover.train != "projector" or c.recover.projector_lr is None,
        "only the projector trains; set recover.projector_lr",
    ),
    ("recover.chunk", lambda c: c.recover.weights.sft + c.recover.weights.logit > 0, "no loss looks at logits"),
    ("recover.lora", lambda c: c.recover.train == "lora", "set recover.train=lora"),
    ("recover.kl", lambda c: c.recover.weights.logit > 0, "set recover.weights.logit above 0"),
    ("recover.temperature", lambda c: c.recover.weights.logit > 0, "set recover.weights.logit above 0"),
    ("recover.hidden_metric", lambda c: c.recover.weights.hidden > 0, "set recover.weights.hidden above 0"),
    ("recover.hidden_layers", lambda c: c.recover.weights.hidden > 0, "set recover.weights.hidden above 0"),
    (
        "recover.teacher",
        lambda c: c.recover.weights.logit + c.recover.weights.hidden > 0,
        "set recover.weights.logit or recover.weights.hidden above 0",
    ),
    ("deploy.", lambda c: c.deploy.name != "none", "set deploy=gguf"),
    ("deploy.repeats", lambda c: c.deploy.measure, "set deploy.measure=true"),
    ("evaluate.repeats", lambda c: c.evaluate.efficiency, "set evaluate.efficiency=true"),
    ("evaluate.new_tokens", lambda c: c.evaluate.efficiency, "set evaluate.efficiency=true"),
    ("evaluate.speed_batches", lambda c: c.evaluate.efficiency, "set evaluate.efficiency=true"),
    (
        "evaluate.quantization",
        lambda c: bool(c.evaluate.efficiency or c.evaluate.tasks or c.evaluate.lmms_eval.tasks),
        "set evaluate.efficiency=true or choose a benchmark with evaluate=",
    ),
    (
        "evaluate.judge",
        lambda c: not {*JUDGED}.isdisjoint(c.evaluate.tasks),
        f"it belongs to evaluate.tasks={'|'.join(JUDGED)}",
    ),
    (
        "evaluate.lmms_eval.include_path",
        lambda c: bool(c.evaluate.lmms_eval.tasks),
        "it belongs to evaluate.lmms_eval.tasks",
    ),
    ("evaluate.judge.key_env", lambda c: c.evaluate.judge.base_url is not None, "set evaluate.judge.base_url"),
    ("evaluate.judge.concurrency", lambda c: c.evaluate.judge.base_url is not None, "set evaluate.judge.base_url"),
    ("evaluate.judge.timeout", lambda c: c.evaluate.judge.base_url is not None, "set evaluate.judge.base_url"),
    ("evaluate.judge.retries", lambda c: c.evaluate.judge.base_url is not None, "set evaluate.judge.base_url"),
    (
        "recover.teacher.revision",
        lambda c: is_hub_id(c.recover.teacher.path or ""),
        "it belongs to a hub id as recover.teacher.path",
    ),
    (
        "recover.teacher.top_k",
        lambda c: c.recover.teacher.source == "cached" and c.recover.weights.logit > 0,
        "set recover.teacher.source=cached and recover.weights.logit above 0",
    ),
    (
        "recover.teacher.offload",
        lambda c: c.recover.teacher.source == "live" and _on_gpu(c),
        "it belongs to recover.teacher.source=live on a GPU",
    ),
    ("evaluate.root", _reads_benchmarks, "choose a published benchmark with evaluate="),
    (
        "evaluate.namespace",
        lambda c: _reads_benchmarks(c) and c.evaluate.root is None,
        "it belongs to published benchmarks without evaluate.root",
    ),
    ("evaluate.protocol", _reads_benchmarks, "choose a published benchmark with evaluate="),
    (
        "evaluate.limit",
        lambda c: bool(c.evaluate.tasks or c.evaluate.lmms_eval.tasks),
        "choose a benchmark with evaluate=",
    ),
    (
        "evaluate.batch_size",
        lambda c: bool(c.evaluate.tasks or c.evaluate.lmms_eval.tasks),
        "choose a benchmark with evaluate=",
    ),
    ("evaluate.num_workers", lambda c: bool(c.evaluate.tasks), "choose a benchmark with evaluate="),
    ("evaluate.max_new_tokens", lambda c: bool(c.evaluate.tasks), "choose a benchmark with evaluate="),
)


def bypassed(config: RunConfig) -> bool:
    """Whether something takes the place of ``prune.ratio``."""
    return bool(config.prune.nominal) or (config.prune.method == "auto" and config.search.budget.target is not None)


def _cuts(config: RunConfig) -> bool:
    return config.prune.method != "auto" or config.search.granularity == "structured"


def _on_gpu(config: RunConfig) -> bool:
    from .processes import on_gpu  # late: it imports torch

    return on_gpu(config.trainer, planned=config.dry_run)
