"""Dataclass schemas of our own configuration nodes. Importing this file is cheap, so that ``--help`` is fast.

Every field's comment states its meaning, unit and range; `efficientllava.settings.checks.check` enforces the ranges.
Nodes that belong to other libraries (trainer, logger, callbacks) stay plain dictionaries with a ``_target_``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

TAYLOR = ("param_first", "param_second", "param_mix", "vectorize")
JUDGED = ("llava_bench", "mathvista", "mmvet")  # benchmarks with a judge
MASKED = {"unstructured": 0.95, "2:4": 0.5}  # largest share of zeros, by granularity of a search
# Types of files for llama.cpp that the gguf package writes, and those that only llama.cpp's own program makes.
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
# Weights of a row that share a scale there: names of prune.round_to.
BLOCKS = {**dict.fromkeys(GGUF_TYPES[3:], 32), **dict.fromkeys(K_QUANTS, 256)}
IMPORTANCES = ("obs", *TAYLOR, "activation", "wanda", "flap", "magnitude", "random")


@dataclass
class ModelConfig:
    """Which checkpoint a run starts from."""

    name: str = MISSING  # short name for folders and tables
    path: str = MISSING  # folder, hub id, or "builtin:<name>" for a checkpoint shipped with this package
    revision: str | None = None  # hub revision; None is the default branch
    dtype: str = "auto"  # auto | float32 | float16 | bfloat16; auto: float32 on CPU, as stored elsewhere
    train: str = "full"  # what recoveries that train the decoder train by default: lora | full
    architecture: Any = None  # fields of the config.json of a hub id, as far as they decide sizes; None: it is fetched
    protocol: str | None = None  # vicuna_v1: LLaVA-1.5's own preprocessing and prompt; None: as the folder says
    system: str | None = None  # system sentence of every prompt; None: that of the chat template


@dataclass
class CalibrationConfig:
    """Samples that importance and refit statistics come from."""

    samples: int = 64  # number of records, >= 1
    path: str | None = None  # the user's own records (LLaVA-style JSON); None: the data's calibration split
    image_root: str | None = None  # folder that relative image paths of `path` start from
    report: int = 8  # records of `path` that no choice sees, to report losses on, where data have no minival; >= 0
    batch_size: int = 8  # records per forward pass, >= 1; Taylor scores take one at a time
    # sequences that the dense model writes itself for the statistics, >= 0; None: 48 where no record shows an image
    generate: int | None = None
    generate_length: int = 128  # tokens of each, those of the chat template included, >= 2
    generate_share: float = 0.5  # share of the statistics that the written text decides, (0, 1)


@dataclass
class DataConfig:
    """Recovery, calibration and test records."""

    name: str = MISSING  # digits_vqa | conversations | llava_665k | bunny_695k | internvl_sft
    path: str | None = None  # LLaVA-style JSON or JSONL (conversations)
    image_root: str | None = None  # folder that relative image paths start from
    images: int = 4000  # size of the recovery pool (digits_vqa)
    test_questions: int = 2000  # size of the test split (digits_vqa)
    max_length: int | None = None  # tokens per record; None: the model's context
    group_by_modality_length: bool = False  # batches of one modality and of similar length, as in LLaVA (files)
    max_bad_fraction: float = 0.0  # share of corrupt records that is tolerated, [0, 1)
    batch_size: int = 16  # records per process and step, >= 1
    global_batch_size: int | None = None  # records per optimiser step over all processes; None: batch_size x processes
    num_workers: int = 0  # loader processes


@dataclass
class PruneConfig:
    """What is removed, by which score, and how the rest is refitted."""

    name: str = MISSING  # name of the option
    method: str = MISSING  # none | layerwise | widthwise | auto
    ratio: float | None = 0.3  # share of language-model parameters to remove, [0, 1)
    importance: str = "obs"  # widthwise: see schema.IMPORTANCES
    selection: str = "shape"  # widthwise: shape | local | floor | global
    heads: str = "group"  # widthwise: group: whole KV groups go | query: one query head of every KV group at a time
    prefix: str = "dense"  # widthwise: scores look at what the dense model gives a layer, or the layers pruned before
    refit: bool = False  # least-squares refit of o_proj and down_proj on the kept set
    # layer: the layer's own output; residual: the dense model's residual stream; adaptive: between the two, writer by
    # writer, as is best on calibration records that the writer was not fitted to
    refit_target: str = "adaptive"
    damping: float | None = (
        None  # added to Gram matrices, as a share of each channel's own power, > 0; None: as validated
    )
    bias: bool = False  # widthwise without refit: what the cut columns write on average goes into the writers' biases
    # kept MLP channels are a multiple of this, >= 1; or a type of files for llama.cpp, whose blocks they fill (BLOCKS)
    round_to: Any = 1
    tokens: str = "all"  # which positions count: all | image | text | answer
    iterative: bool = False  # layerwise: score again after each removed block
    block_influence: str = "mean"  # layerwise: mean over tokens, or sum (as published)
    final_norm: bool = False  # layerwise: compare the last block's output after the final norm (as published)
    taylor_mean: str = "sample"  # sample: |w g| per record, averaged; batch: |w mean g| (as published)
    protect: list[int] = field(default_factory=list)  # layers that widthwise leaves whole; negative from the end
    protect_attention: list[int] = field(default_factory=list)  # layers whose heads stay
    protect_mlp: list[int] = field(default_factory=list)  # layers whose channels stay
    protect_scaled: bool = False  # the published ranges of 32 layers (heads 3-30, channels 4-29), scaled to the depth
    share: float | None = None  # widthwise: nominal share per pruned layer, bypasses the ratio solver, [0, 1)
    drop_layers: int | None = None  # layerwise: number of blocks, bypasses the ratio solver
    offload: bool = False  # weights stay in host memory, one layer at a time computes on the GPU
    reinitialise: bool = False  # control: keep the pruned shape and draw fresh weights

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

    r: int = 16  # rank, >= 1
    alpha: float = 32.0  # scale is alpha / r
    dropout: float = 0.0  # [0, 1)


@dataclass
class WeightsConfig:
    """Weights of the summed recovery losses; a weight of 0 switches a loss off."""

    sft: float = 0.0  # cross-entropy on supervised tokens
    logit: float = 0.0  # KL between student and teacher
    hidden: float = 0.0  # distance of hidden states


@dataclass
class TeacherConfig:
    """The frozen teacher."""

    path: str | None = None  # None: the original unpruned checkpoint from the provenance
    revision: str | None = None  # hub revision of path; None is the default branch
    dtype: str = "auto"  # as model.dtype; in a run that of the model
    source: str = "live"  # live: runs beside the student | cached: is asked once, its answers are kept on disk
    top_k: int = 64  # cached: tokens whose log-probabilities are kept, the rest as one; >= 1, the vocabulary is exact
    offload: bool = False  # live, on a GPU: its decoder layers stay in host memory and visit the GPU one by one


@dataclass
class RecoverConfig:
    """How the pruned model gets its skill back."""

    name: str = MISSING  # none | projector | sft | kd_logit | kd_hidden | kd_both
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    train: str = "full"  # projector | lora (with the projector) | full (decoder and projector)
    lr: float = 1e-3  # peak learning rate of the decoder, > 0
    projector_lr: float | None = None  # None: lr
    steps: int | None = None  # optimiser steps; None: from epochs
    epochs: float | None = None  # passes over the drawn subset; None: from steps
    optimizer: str = "adamw"  # adamw | sgd
    weight_decay: float = 0.0
    scheduler: str = "cosine"  # cosine | linear | constant
    warmup: float = 0.03  # share of the steps with rising learning rate, [0, 1)
    max_grad_norm: float = 1.0
    lora: LoraConfig = field(default_factory=LoraConfig)
    kl: str = "forward"  # forward: KL(teacher || student); reverse: KL(student || teacher)
    temperature: float = 2.0  # > 0
    hidden_metric: str = "l2"  # l2 (divided by the teacher's power) | cosine
    hidden_layers: Any = "last"  # last | all | list of original layer indices
    parity: str | None = None  # vlmcompression: the study's unmasked, batch-summed losses
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    gradient_checkpointing: bool = False
    chunk: int = 1024  # positions per head call of CE and KL, bounds memory, >= 1
    save_every: int = 100  # optimiser steps between resume points, >= 1

    @property
    def taught(self) -> bool:
        """Whether a loss needs a teacher."""
        return self.weights.logit > 0 or self.weights.hidden > 0


@dataclass
class JudgeConfig:
    """Who grades the answers of the benchmarks in `JUDGED`."""

    base_url: str | None = None  # of an OpenAI-compatible endpoint, up to /v1; None: requests are exported, not sent
    model: str | None = None  # the judge's name at the endpoint
    key_env: str | None = "OPENAI_API_KEY"  # name of the environment variable with the key; None: there is no key
    prompts: str | None = None  # folder with the benchmarks' official prompt files; None: our wording
    runs: int | None = None  # evaluations of every answer, >= 1; None: as official
    attempts: int = 5  # requests until a reply can be read, >= 1
    concurrency: int = 8  # requests at a time, >= 1
    timeout: float = 120.0  # seconds for one request, > 0
    retries: int = 6  # repetitions of a request after a transient fault, >= 0
    body: dict[str, Any] = field(default_factory=dict)  # merged into every request; null removes what stands there


@dataclass
class LmmsConfig:
    """Tasks that lmms-eval runs, prompts and scores (extra ``[lmms]``)."""

    tasks: list[str] = field(default_factory=list)  # names of lmms-eval, such as mme; empty: none
    include_path: str | None = None  # folder with further tasks in lmms-eval's format


@dataclass
class EvaluateConfig:
    """What base, pruned and recovered models are measured on."""

    tasks: list[str] = field(default_factory=list)  # benchmark names; empty: none
    root: str | None = None  # file or folder with the benchmarks' rows; None: the Hugging Face hub
    namespace: str = "lmms-lab-encoder"  # account of the hub that keeps the benchmarks' copies
    protocol: str = "llava"  # llava: prompts and parsing of the papers' scripts | lmms_eval: of that leaderboard
    limit: int | None = None  # first N questions of each task
    batch_size: int = 128  # questions per generate call
    num_workers: int = 0  # processes that read and prepare images
    max_new_tokens: int | None = None  # longest answer in tokens; None: as the benchmark says
    efficiency: bool = True  # FLOPs and latency of one image-question
    repeats: int = 9  # latency repeats after warm-up; the median is reported
    new_tokens: int = 16  # tokens generated for the decode latency
    speed_batches: list[int] = field(default_factory=lambda: [1, 8])  # prompts at once for tokens per second, each >= 1
    quantization: str = "none"  # none | int8 | int4: every stage again, decoder linears quantized weight-only (torchao)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    lmms_eval: LmmsConfig = field(default_factory=LmmsConfig)


@dataclass
class SearchBudgetConfig:
    """What a searched policy has to remove; weight masks count the decoder's linear weights, whatever stands here."""

    resource: str = (
        "params"  # params | flops (of the prefill) | latency (measured here: prefill and 32 tokens, batch 1)
    )
    target: float | None = None  # share to remove, (0, 1), or the speed-up, > 1; None: prune.ratio


@dataclass
class SearchConfig:
    """How a policy, a level for the attention and the MLP of every layer, is searched."""

    name: str = MISSING  # quick | paper | thorough
    # evolution | random: as many evaluations, without parents | knapsack: a few prices of levels, the budget met
    method: str = "evolution"
    granularity: str = "structured"  # structured | unstructured | 2:4
    uniform: bool = False  # structured, params: one shape for all layers, which stock transformers can load
    budget: SearchBudgetConfig = field(default_factory=SearchBudgetConfig)
    risk: str = "loss"  # empirical risk: loss (cross-entropy of the answers) | kl (to the dense model) | error
    # generalization gap: none | fro | fro_logprod | dist | held_out: risk on samples that no level is fitted to
    gap: str = "none"
    gap_weight: float = 0.3  # weight of the gap beside the risk, both standardised, >= 0
    rounds: int = 4  # the projector evolves after each round, >= 1
    generations: int = 5  # per round, >= 1
    population: int = 50  # candidates per generation, >= 2
    parents: int = 10  # best policies so far, which the next generation comes from, >= 1
    mutants: int = 25  # of a generation, >= 0; random policies fill it where mutants and crossovers leave room
    crossovers: int = 25  # of a generation, >= 0
    mutation: float = 0.2  # probability that a mutant draws a gene anew, (0, 1]
    exchange: float = 0.5  # share of the mutants that exchange levels between genes instead, [0, 1]
    finalists: int = 4  # best policies that are tried as cut; the one with the lowest answer loss stays, >= 1
    stages: list[float] = field(default_factory=lambda: [1.0])  # shares of the samples, ascending to 1, (0, 1]
    projector: bool = True  # evolve the projector after each round
    projector_lr: float = 2e-5  # learning rate of that, > 0
    projector_pull: float = 0.5  # weight of the divergence from the dense model, >= 0
    projector_anchor: float = 0.1  # weight of the relative distance from the projector at the start, >= 0


@dataclass
class DeployConfig:
    """A checkpoint as files for llama.cpp (extra ``[gguf]``)."""

    name: str = "none"  # none | gguf
    types: list[str] = field(default_factory=lambda: ["f16", "q8_0"])  # of the files, of GGUF_TYPES
    mmproj: bool = True  # write the image side too
    check: bool = True  # compare the files, run in the installed runtime, with transformers
    measure: bool = True  # measure their speed there, beside the dense model's
    repeats: int = 5  # rounds of that, >= 1; medians are reported


@dataclass
class SweepConfig:
    """What several runs share (``-m``)."""

    name: str = MISSING  # folder under sweeps/; the same command has the same name
    arms: dict[str, list[str]] = field(default_factory=dict)  # of hydra/sweeper=arms: name -> what is typed for it


@dataclass
class PathsConfig:
    """The only place that names folders."""

    output_dir: str = "outputs"
    cache_dir: str = "outputs/cache"


@dataclass
class GpuPoolConfig:
    """``hydra.launcher`` of ``hydra/launcher=gpu_pool``, which runs every job of a sweep as a process of its own."""

    _target_: str = "hydra_plugins.launchers.GpuPoolLauncher"
    gpus_per_job: int | None = None  # GPUs of one job, >= 1; None: as many as trainer.devices asks for
    slots: int | None = None  # jobs at once where they use no GPU, >= 1; None: one per core
    timeout_min: float | None = None  # minutes after which a job counts as hanging and is ended, > 0


@dataclass
class WandbConfig:
    """``logger=wandb``: every job is one W&B run, whose id is kept in the job's folder."""

    project: str = "efficientllava"
    entity: str | None = None  # account or team; None: your own
    name: str = "${name}"
    group: str | None = None  # None: the sweep, where the run belongs to one
    job_type: str | None = None  # None: the last stage: evaluate | prune | recover
    tags: list[str] = field(default_factory=list)  # beside model, paradigm and recovery
    notes: str | None = None
    mode: str | None = None  # online | offline | disabled; None: online if you are logged in, else offline
    weights: bool = False  # upload the last checkpoint too


@dataclass
class RunConfig:
    """The root of the configuration."""

    name: str = MISSING  # part of the run folder's name
    seed: int = 0
    data_frac: float = 1.0  # fraction of the recovery data, (0, 1]
    optimized_metric: str | None = None  # dotted key into results.json that a sweeper optimises
    dry_run: bool = False  # say what a run would make and need, and stop; reads no weights
    reuse: bool = True  # take finished stages from the cache
    keep: str = "all"  # checkpoints on disk once a run has ended: all | recovered (the last of a run) | none
    threads: int | None = None  # CPU threads per process; None: as many as torch likes
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    deploy: DeployConfig = field(default_factory=DeployConfig)
    pretrain: Any = (
        None  # a ``_target_`` and its arguments: what is done in place of a run, see experiments/tiny_models
    )
    sweep: SweepConfig = field(default_factory=SweepConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: Any = None
    callbacks: Any = None
    paths: PathsConfig = field(default_factory=PathsConfig)
