"""The nodes of the configuration that say how a model is pruned, searched for and recovered; see `schema`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING

from ..runtime import is_hub_id
from . import COUNT, DTYPE, NATURAL, POSITIVE, SHARE, Rule, When, setting

TAYLOR = ("param_first", "param_second", "param_mix", "vectorize")
# What an importance sees, by its name; `efficientllava.pruning.importance` has the functions.
IMPORTANCES = {
    "obs": "inputs",
    **dict.fromkeys(TAYLOR, "gradients"),
    "activation": "inputs",
    "wanda": "inputs",
    "flap": "records",
    "flap_wifn": "records",
    "norm": "records",
    "magnitude": "weights",
    "random": "weights",
}
LOOKING = tuple(name for name, sees in IMPORTANCES.items() if sees in ("inputs", "records"))  # at activations
MASKED = {"unstructured": 0.95, "2:4": 0.5}  # largest share of zeros, by granularity of a search
# Types of files for llama.cpp that the gguf package writes, and those that only llama.cpp's own program makes.
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
# Weights of a row that share a scale there: names of prune.round_to.
BLOCKS = {**dict.fromkeys(GGUF_TYPES[3:], 32), **dict.fromkeys(K_QUANTS, 256)}

WIDTHWISE = When(lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise")
LAYERWISE = When(lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise")
CUTS = When(lambda c: not c.masks, "masks leave shapes alone; set search.granularity=structured")
LOGIT = When(lambda c: c.recover.weights.logit > 0, "set recover.weights.logit above 0")
HIDDEN = When(lambda c: c.recover.looks("hidden"), "set recover.weights.hidden above 0")
EVOLVES = When(lambda c: c.search.method != "random", "set search.method=evolution")
ROUNDS = When(lambda c: c.search.projector and c.search.rounds > 1, "set search.projector=on and search.rounds above 1")


@dataclass
class PruneConfig:
    """What is removed, by which score, and how the rest is refitted."""

    name: str = setting(MISSING, "name of the option, for folders and tables")
    method: str = setting(MISSING, "the paradigm", "none | layerwise | widthwise | auto")
    ratio: float | None = setting(
        0.3,
        "share of language-model parameters to remove",
        SHARE,
        When(
            lambda c: c.prune.ratio is None or not c.bypassed,
            "prune.share, prune.drop_layers or search.budget.target says what goes",
        ),
    )
    importance: str = setting("obs", "score of heads and channels", " | ".join(IMPORTANCES), WIDTHWISE)
    selection: str = setting(
        "shape",
        "shape: one shape for all layers; local: the same share of each; floor: one shape, rounded as in released "
        "code; global: ranked over all layers; two_stage: one width, then whole attentions off one by one",
        "shape | local | floor | global | two_stage",
        When(
            lambda c: c.prune.method == "widthwise" and c.prune.share is None,
            "it belongs to prune=widthwise without prune.share",
        ),
    )
    heads: str = setting(
        "group",
        "group: whole KV groups go; query: one query head of every KV group at a time",
        "group | query",
        WIDTHWISE,
    )
    prefix: str = setting(
        "dense",
        "scores look at what the dense model gives a layer, or the layers pruned before",
        "dense | pruned",
        When(
            lambda c: c.prune.method == "widthwise" and c.prune.importance in LOOKING,
            f"it belongs to prune=widthwise with prune.importance={'|'.join(LOOKING)}",
        ),
    )
    refit: bool = setting(False, "least-squares refit of o_proj and down_proj on the kept set", None, CUTS)
    refit_target: str = setting(
        "adaptive",
        "layer: the layer's own output; residual: the dense model's residual stream; adaptive: between the two, writer "
        "by writer, as is best on calibration records that the writer was not fitted to",
        "adaptive | layer | residual",
        CUTS,
        When(lambda c: c.prune.refit, "set prune.refit=true"),
    )
    damping: float | None = setting(
        None,
        "added to Gram matrices, as a share of each channel's own power; null: as validated",
        POSITIVE,
        When(
            lambda c: c.prune.refit or c.prune.solves,
            "set prune.refit=true or prune.importance=obs",
        ),
    )
    bias: bool = setting(
        False, "without refit: what the cut columns write on average goes into the writers' biases", None, WIDTHWISE
    )
    round_to: Any = setting(
        1,
        "kept MLP channels are a multiple of this, or fill the blocks of a type of files for llama.cpp",
        Rule(lambda value: type(value) is int and value >= 1, f"in [1, infinity), or one of {', '.join(BLOCKS)}"),
        When(
            lambda c: c.prune.method in ("widthwise", "auto") and not c.masks,
            "it belongs to prune=widthwise or prune=auto without masks",
        ),
        When(lambda c: c.prune.share is None, "prune.share has its own rounding: set prune.ratio"),
    )
    tokens: str = setting(
        "all",
        "which positions count",
        "all | image | text | answer",
        When(
            lambda c: c.prune.refit or c.prune.method != "widthwise" or c.prune.importance in LOOKING,
            "nothing looks at activations; set prune.refit=true or another prune.importance",
        ),
    )
    iterative: bool = setting(False, "score again after each removed block", None, LAYERWISE)
    block_influence: str = setting("mean", "over tokens; sum: as published", "mean | sum", LAYERWISE)
    final_norm: bool = setting(
        False, "compare the last block's output after the final norm (as published)", None, LAYERWISE
    )
    taylor_mean: str = setting(
        "sample",
        "sample: |w g| per record, averaged; batch: |w mean g| (as published)",
        "sample | batch",
        When(lambda c: c.prune.taylor, f"it needs prune.importance={'|'.join(TAYLOR)}"),
    )
    protect: list[int] = setting([], "layers that stay whole; negative from the end", None, WIDTHWISE)
    protect_attention: list[int] = setting([], "layers whose heads stay", None, WIDTHWISE)
    protect_mlp: list[int] = setting([], "layers whose channels stay", None, WIDTHWISE)
    protect_scaled: bool = setting(
        False,
        "the published ranges of 32 layers (heads 3-30, channels 4-29), scaled to the depth",
        None,
        WIDTHWISE,
    )
    share: float | None = setting(None, "nominal share per pruned layer, bypasses the ratio solver", SHARE, WIDTHWISE)
    drop_layers: int | None = setting(None, "number of blocks, bypasses the ratio solver", NATURAL, LAYERWISE)
    offload: Any = setting(
        False,
        "true: weights stay in host memory, one layer at a time computes on the GPU; disk: they stay in files, one "
        "layer at a time is in memory",
        Rule(lambda value: value in (False, True, "disk"), "one of false, true, disk"),
        When(
            lambda c: c.on_gpu or c.prune.offload == "disk",
            "without a GPU all weights are in host memory anyway, or in files with prune.offload=disk",
        ),
    )
    reinitialise: bool = setting(False, "control: keep the pruned shape and draw fresh weights", None, CUTS)

    @property
    def taylor(self) -> bool:
        """Whether gradients decide."""
        return self.method == "widthwise" and self.importance in TAYLOR

    @property
    def biased(self) -> bool:
        """Whether the cut model has biases that the model before may lack; none where nothing is cut."""
        return self.bias and self.method == "widthwise" and (self.ratio != 0 or self.share is not None)

    @property
    def solves(self) -> bool:
        """Whether Gram matrices decide: an importance or a refit of whole components."""
        return self.method == "auto" or (self.method == "widthwise" and (self.refit or self.importance == "obs"))

    @property
    def nominal(self) -> dict[str, float]:
        """``share`` or ``drop_layers``, where one of them was asked for in place of the ratio."""
        asked = {"share": self.share, "drop_layers": self.drop_layers}
        return {key: value for key, value in asked.items() if value is not None}


@dataclass
class LoraConfig:
    """Low-rank adapters on every decoder linear; merged at the end."""

    r: int = setting(16, "rank", COUNT)
    alpha: float = setting(32.0, "the adapters' scale is alpha / r", POSITIVE)
    dropout: float = setting(0.0, "share of inputs that is dropped in training", SHARE)


@dataclass
class WeightsConfig:
    """Weights of the summed recovery losses; a weight of 0 switches a loss off."""

    sft: float = setting(0.0, "cross-entropy on supervised tokens", NATURAL, looks=("logits",))
    logit: float = setting(0.0, "KL between student and teacher", NATURAL, looks=("logits", "teacher"))
    hidden: float = setting(0.0, "distance of hidden states", NATURAL, looks=("hidden", "teacher"))


@dataclass
class TeacherConfig:
    """The frozen teacher."""

    path: str | None = setting(None, "null: the original unpruned checkpoint from the provenance")
    revision: str | None = setting(
        None,
        "hub revision of path; null is the default branch",
        None,
        When(lambda c: is_hub_id(c.recover.teacher.path or ""), "it belongs to a hub id as recover.teacher.path"),
    )
    dtype: str = setting("auto", "as model.dtype; in a run that of the model", DTYPE, follows="model.dtype")
    source: str = setting(
        "live", "live: runs beside the student; cached: is asked once, its answers are kept on disk", "live | cached"
    )
    top_k: int = setting(
        64,
        "cached: tokens whose log-probabilities are kept, the rest as one; the vocabulary is exact",
        COUNT,
        When(
            lambda c: c.recover.teacher.source == "cached" and c.recover.looks("logits", "teacher"),
            "set recover.teacher.source=cached and recover.weights.logit above 0",
        ),
    )
    offload: bool = setting(
        False,
        "live, on a GPU: its decoder layers stay in host memory and visit the GPU one by one",
        None,
        When(
            lambda c: c.recover.teacher.source == "live" and c.on_gpu,
            "it belongs to recover.teacher.source=live on a GPU",
        ),
    )


@dataclass
class RecoverConfig:
    """How the pruned model gets its skill back."""

    name: str = setting(MISSING, "none: not at all; any other: for folders and tables", was="method")
    weights: WeightsConfig = setting(WeightsConfig)
    train: str = setting(
        "full", "what learns; lora: with the projector; full: decoder and projector", "projector | lora | full"
    )
    lr: float = setting(
        1e-3,
        "peak learning rate of the decoder",
        POSITIVE,
        When(
            lambda c: c.recover.train != "projector" or c.recover.projector_lr is None,
            "only the projector trains; set recover.projector_lr",
        ),
    )
    projector_lr: float | None = setting(None, "null: recover.lr", POSITIVE)
    steps: int | None = setting(None, "optimiser steps; null: from recover.epochs", COUNT)
    epochs: float | None = setting(None, "passes over the drawn subset; null: from recover.steps", POSITIVE)
    optimizer: str = setting("adamw", "", "adamw | sgd")
    weight_decay: float = setting(0.0, "of matrices", NATURAL)
    scheduler: str = setting("cosine", "of the learning rate, behind its rise", "cosine | linear | constant")
    warmup: float = setting(0.03, "share of the steps with rising learning rate", SHARE)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to it", POSITIVE)
    lora: LoraConfig = setting(
        LoraConfig, "", None, When(lambda c: c.recover.train == "lora", "set recover.train=lora")
    )
    kl: str = setting(
        "forward", "forward: KL(teacher || student); reverse: KL(student || teacher)", "forward | reverse", LOGIT
    )
    temperature: float = setting(2.0, "of both distributions", POSITIVE, LOGIT)
    hidden_metric: str = setting("l2", "l2: divided by the teacher's power", "l2 | cosine", HIDDEN)
    hidden_layers: Any = setting(
        "last",
        "original layers whose states are compared",
        Rule(
            lambda value: value in ("last", "all") or (type(value) in (list, tuple) and {*map(type, value)} == {int}),
            "last, all or a list of layer indices such as [3,7]",
        ),
        HIDDEN,
    )
    parity: str | None = setting(
        None, "vlmcompression: the study's unmasked, batch-summed losses", "null | vlmcompression"
    )
    teacher: TeacherConfig = setting(
        TeacherConfig,
        "",
        None,
        When(lambda c: c.recover.taught, "set recover.weights.logit or recover.weights.hidden above 0"),
    )
    gradient_checkpointing: bool = setting(False, "less memory, more time")
    chunk: int = setting(
        1024,
        "positions per head call of CE and KL, bounds memory",
        COUNT,
        When(lambda c: c.recover.looks("logits"), "no loss looks at logits"),
    )
    save_every: int = setting(100, "optimiser steps between resume points", COUNT)

    @property
    def taught(self) -> bool:
        """Whether a loss needs a teacher."""
        return self.looks("teacher")

    def looks(self, *at: str) -> bool:
        """Whether a loss that has a weight looks at all of these; see `setting`."""
        looking = {each.name: each.metadata["looks"] for each in fields(self.weights)}
        return any(getattr(self.weights, name) > 0 and {*at} <= {*looks} for name, looks in looking.items())


@dataclass
class SearchBudgetConfig:
    """What a searched policy has to remove; weight masks count the decoder's linear weights, whatever stands here."""

    resource: str = setting(
        "params",
        "flops: of the prefill; latency: measured, prefill and 32 tokens, batch 1",
        "params | flops | latency",
    )
    target: float | None = setting(None, "share to remove, (0, 1), or the speed-up, > 1; null: prune.ratio", POSITIVE)
    device: str = setting(
        "here",
        "where latency is measured; gguf: in llama.cpp, on one thread, in the first of deploy.types",
        "here | gguf",
        When(lambda c: c.search.budget.resource == "latency", "set search.budget.resource=latency"),
    )


@dataclass
class SearchConfig:
    """How a policy, a level for the attention and the MLP of every layer, is searched."""

    name: str = setting(MISSING, "name of the option, for folders and tables")
    method: str = setting(
        "evolution",
        "random: as many evaluations, without parents; knapsack: a few prices of levels, the budget met",
        "evolution | random | knapsack",
    )
    granularity: str = setting("structured", "shapes, or masks of weights", "structured | unstructured | 2:4")
    uniform: bool = setting(False, "structured, params: one shape for all layers, which stock transformers can load")
    budget: SearchBudgetConfig = setting(SearchBudgetConfig)
    risk: str = setting(
        "loss", "empirical risk: cross-entropy of the answers, KL to the dense model, or error", "loss | kl | error"
    )
    gap: str = setting(
        "none",
        "generalization gap; held_out: risk on samples that no level is fitted to",
        "fro | fro_logprod | dist | held_out | none",
    )
    gap_weight: float = setting(
        0.3,
        "weight of the gap beside the risk, both standardised",
        NATURAL,
        When(lambda c: c.search.term is not None, "set search.gap to fro, fro_logprod or dist"),
    )
    rounds: int = setting(4, "the projector evolves after each round", COUNT)
    generations: int = setting(5, "per round", COUNT)
    population: int = setting(50, "candidates per generation", "[2, infinity)")
    parents: int = setting(10, "best policies so far, which the next generation comes from", COUNT)
    mutants: int = setting(
        25, "of a generation; random policies fill it where mutants and crossovers leave room", NATURAL, EVOLVES
    )
    crossovers: int = setting(25, "of a generation", NATURAL, EVOLVES)
    mutation: float = setting(0.2, "probability that a mutant draws a gene anew", "(0, 1]", EVOLVES)
    exchange: float = setting(0.5, "share of the mutants that exchange levels between genes instead", "[0, 1]", EVOLVES)
    finalists: int = setting(
        4,
        "best policies that are tried as cut; the one with the lowest answer loss stays",
        COUNT,
        When(CUTS.holds, "masks are not refitted; set search.granularity=structured"),
    )
    stages: list[float] = setting(
        [1.0],
        "shares of the samples that candidates are judged on, one after the other",
        Rule(
            lambda shares: bool(shares) and shares == sorted({*shares, 1.0}) and shares[0] > 0,
            "rising shares of the samples that end with 1, such as [0.25,1.0]",
        ),
    )
    projector: bool = setting(
        True,
        "evolve the projector after each round",
        None,
        When(
            lambda c: not c.search.projector or c.search.rounds > 1,
            "it evolves between rounds; set search.rounds above 1",
        ),
    )
    projector_lr: float = setting(2e-5, "learning rate of that", POSITIVE, ROUNDS)
    projector_pull: float = setting(0.5, "weight of the divergence from the dense model", NATURAL, ROUNDS)
    projector_anchor: float = setting(
        0.1, "weight of the relative distance from the projector at the start", NATURAL, ROUNDS
    )

    @property
    def term(self) -> str | None:
        """The gap term of the objective; None where it has none."""
        return None if self.gap in ("none", "held_out") else self.gap

    @property
    def most(self) -> float:
        """Largest share that it can remove."""
        return MASKED.get(self.granularity, 1.0)
