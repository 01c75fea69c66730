"""The configuration: every field with its meaning, its range, and when it has an effect; see `fields`.

Importing this file is cheap, so that ``--help`` is fast. Nodes that belong to other libraries (trainer, logger,
callbacks) stay plain dictionaries with a ``_target_``. What two fields must not be together is in
`efficientllava.settings.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from ..runtime import is_hub_id, processes
from . import COUNT, DTYPE, NATURAL, POSITIVE, SHARE, Rule, When, setting
from .methods import (
    BLOCKS,
    GGUF_TYPES,
    IMPORTANCES,
    MASKED,
    TAYLOR,
    LoraConfig,
    PruneConfig,
    RecoverConfig,
    SearchBudgetConfig,
    SearchConfig,
    TeacherConfig,
    WeightsConfig,
)

JUDGED = ("llava_bench", "mathvista", "mmvet")  # benchmarks with a judge
DIGITS = "digits_vqa"  # the embedded data, and the benchmark that is made of them
PROSE = "prose"  # the benchmark over running text

PRUNES = When(lambda c: c.prune.method != "none", "choose a paradigm with prune=")
RECOVERS = When(lambda c: c.recover.name != "none", "choose a recovery with recover=")
TRAINS = When(lambda c: c.recover.name != "none" or bool(c.pretrain), "choose a recovery with recover=")
OF_FILES = When(lambda c: not c.data.embedded, "choose data=conversations")
GENERATES = When(lambda c: c.calibration.generate != 0, "set calibration.generate above 0")
ASKS = When(lambda c: bool(c.evaluate.tasks), "choose a benchmark with evaluate=")
ANSWERS = When(lambda c: bool(c.evaluate.tasks or c.evaluate.lmms_eval.tasks), "choose a benchmark with evaluate=")
PUBLISHED = When(
    lambda c: any(task not in (DIGITS, PROSE) for task in c.evaluate.tasks),
    "choose a published benchmark with evaluate=",
)
MEASURES = When(lambda c: c.evaluate.efficiency, "set evaluate.efficiency=true")
SENDS = When(lambda c: c.evaluate.judge.base_url is not None, "set evaluate.judge.base_url")


@dataclass
class ModelConfig:
    """Which checkpoint a run starts from."""

    name: str = setting(MISSING, "short name for folders and tables")
    path: str = setting(MISSING, 'folder, hub id, or "builtin:<name>" for a checkpoint shipped with this package')
    revision: str | None = setting(
        None,
        "hub revision; null is the default branch",
        None,
        When(lambda c: is_hub_id(c.model.path), "it belongs to a hub id as model.path"),
    )
    dtype: str = setting("auto", "auto: float32 on CPU, as stored elsewhere", DTYPE)
    train: str = setting("full", "what recoveries that train the decoder train by default", "lora | full")
    lr: Any = setting(
        None,
        "learning rates by what trains, such as {projector: 1e-3, lora: 2e-4, full: 2e-5}, which recover.lr takes "
        "where it is not typed; null: it has its own",
        None,
        When(lambda c: c.recover.name != "none", "choose a recovery with recover="),
    )
    architecture: Any = setting(
        None, "fields of the config.json of a hub id, as far as they decide sizes; null: it is fetched"
    )
    protocol: str | None = setting(
        None, "vicuna_v1: LLaVA-1.5's own preprocessing and prompt; null: as the folder says", "null | vicuna_v1"
    )
    system: str | None = setting(
        None,
        "system sentence of every prompt; null: that of the chat template",
        Rule(lambda text: bool(text.strip()), "a sentence"),
    )


@dataclass
class CalibrationConfig:
    """Samples that importance and refit statistics come from."""

    samples: int = setting(64, "number of records", COUNT)
    prose: int = setting(
        0,
        "of them, paragraphs of English that come with this package",
        "[0, 32]",
        When(
            lambda c: c.data.embedded and c.calibration.path is None,
            "it belongs to data=digits_vqa without calibration.path",
        ),
    )
    path: str | None = setting(None, "your own records (LLaVA-style JSON); null: the data's calibration split")
    image_root: str | None = setting(
        None,
        "folder that relative image paths of calibration.path start from",
        None,
        When(lambda c: c.calibration.path is not None, "set calibration.path"),
    )
    report: int = setting(
        8, "records of calibration.path that no choice sees, to report losses on, where data have no minival", NATURAL
    )
    batch_size: int = setting(
        8,
        "records per forward pass; Taylor scores take one at a time",
        COUNT,
        When(lambda c: not c.prune.taylor, "Taylor scores take one record at a time"),
    )
    generate: int | None = setting(
        None,
        "sequences that the dense model writes itself for the statistics; null: until an MLP channel has 16 tokens, at "
        "most 192, of a decoder of 20 million parameters or more; of a search without images at most 48",
        NATURAL,
        When(
            lambda c: c.prune.solves,
            "only a refit and its scores use written text; set prune.refit=true or prune.importance=obs",
        ),
    )
    generate_length: int = setting(
        128, "tokens of each, those of the chat template included", "[2, infinity)", GENERATES
    )
    generate_share: float = setting(0.5, "share of the statistics that the written text decides", "(0, 1)", GENERATES)


@dataclass
class DataConfig:
    """Recovery, calibration and test records."""

    name: str = setting(MISSING, "digits_vqa: the embedded data; any other: records of files")
    path: str | None = setting(None, "LLaVA-style JSON, JSONL or parquet, here or on the hub", None, OF_FILES)
    image_root: str | None = setting(
        None,
        "folder that relative image paths start from",
        None,
        When(
            OF_FILES.holds,
            "choose data=conversations (the images of calibration.path start from calibration.image_root)",
        ),
    )
    images: int = setting(
        4000,
        "size of the recovery pool",
        COUNT,
        When(
            lambda c: c.data.embedded and c.recover.name != "none",
            "it is the size of the recovery pool of data=digits_vqa",
        ),
    )
    test_questions: int = setting(
        2000, "size of the test split", COUNT, When(lambda c: c.data.embedded, "it belongs to data=digits_vqa")
    )
    max_length: int | None = setting(
        None,
        "tokens per record; null: the model's context",
        COUNT,
        When(
            lambda c: c.prune.method != "none" or c.recover.name != "none",
            "choose a paradigm with prune= or a recovery with recover=",
        ),
    )
    group_by_modality_length: bool = setting(
        False, "batches of one modality and of similar length, as in LLaVA", None, OF_FILES, RECOVERS
    )
    max_bad_fraction: float = setting(0.0, "share of records that cannot be used and are left out", SHARE, OF_FILES)
    batch_size: int = setting(16, "records per process and step", COUNT, TRAINS)
    global_batch_size: int | None = setting(
        None, "records per optimiser step over all processes; null: data.batch_size x processes", COUNT, TRAINS
    )
    num_workers: int = setting(0, "loader processes", NATURAL, TRAINS)
    image_layout: str | None = setting(
        None, "what data.image_root has to hold, where images are published apart from their records"
    )

    @property
    def embedded(self) -> bool:
        """Whether the records are the digits that come with this package."""
        return self.name == DIGITS


@dataclass
class JudgeConfig:
    """Who grades the answers of the benchmarks in `JUDGED`."""

    base_url: str | None = setting(
        None, "of an OpenAI-compatible endpoint, up to /v1; null: requests are exported, not sent"
    )
    model: str | None = setting(None, "the judge's name at the endpoint")
    key_env: str | None = setting(
        "OPENAI_API_KEY", "name of the environment variable with the key; null: there is no key", None, SENDS
    )
    prompts: str | None = setting(None, "folder with the benchmarks' official prompt files; null: our wording")
    runs: int | None = setting(None, "evaluations of every answer; null: as official", COUNT)
    attempts: int = setting(5, "requests until a reply can be read", COUNT)
    concurrency: int = setting(8, "requests at a time", COUNT, SENDS)
    timeout: float = setting(120.0, "seconds for one request", POSITIVE, SENDS)
    retries: int = setting(6, "repetitions of a request after a transient fault", NATURAL, SENDS)
    body: dict[str, Any] = setting({}, "merged into every request; null removes what stands there")


@dataclass
class LmmsConfig:
    """Tasks that lmms-eval runs, prompts and scores (extra ``[lmms]``)."""

    tasks: list[str] = setting([], "names of lmms-eval, such as mme; empty: none")
    include_path: str | None = setting(
        None,
        "folder with further tasks in lmms-eval's format",
        None,
        When(lambda c: bool(c.evaluate.lmms_eval.tasks), "it belongs to evaluate.lmms_eval.tasks"),
    )


@dataclass
class ProseConfig:
    """Whose running text is measured."""

    path: str | None = setting(
        None,
        "your own text: .txt, cut at empty lines into pieces of at most 150 words, or LLaVA-style JSON; null: three "
        "that come with this package",
        None,
        When(lambda c: PROSE in c.evaluate.tasks, "choose evaluate=prose"),
    )


@dataclass
class EvaluateConfig:
    """What base, pruned and recovered models are measured on."""

    tasks: list[str] = setting([], "benchmark names; empty: none")
    root: str | None = setting(
        None, "file or folder with the benchmarks' rows; null: the Hugging Face hub", None, PUBLISHED
    )
    namespace: str = setting(
        "lmms-lab-encoder",
        "account of the hub that keeps the benchmarks' copies",
        None,
        When(
            lambda c: PUBLISHED.holds(c) and c.evaluate.root is None,
            "it belongs to published benchmarks without evaluate.root",
        ),
    )
    protocol: str = setting(
        "llava",
        "llava: prompts and parsing of the papers' scripts; lmms_eval: of that leaderboard",
        "llava | lmms_eval",
        PUBLISHED,
    )
    limit: int | None = setting(None, "first N questions of each task", COUNT, ANSWERS)
    batch_size: int = setting(128, "questions per generate call", COUNT, ANSWERS)
    num_workers: int = setting(0, "processes that read and prepare images", NATURAL, ASKS)
    max_new_tokens: int | None = setting(None, "longest answer in tokens; null: as the benchmark says", COUNT, ASKS)
    efficiency: bool = setting(True, "FLOPs and latency of one image-question")
    repeats: int = setting(9, "latency repeats after warm-up; the median is reported", COUNT, MEASURES)
    new_tokens: int = setting(16, "tokens generated for the decode latency", "[2, infinity)", MEASURES)
    speed_batches: list[int] = setting(
        [1, 8],
        "prompts at once for tokens per second",
        Rule(lambda sizes: len({*sizes}) == len(sizes) and min(sizes, default=1) >= 1, "distinct, >= 1"),
        MEASURES,
    )
    quantization: str = setting(
        "none",
        "every stage again, decoder linears quantized weight-only (torchao)",
        "none | int8 | int4",
        When(
            lambda c: MEASURES.holds(c) or ANSWERS.holds(c),
            "set evaluate.efficiency=true or choose a benchmark with evaluate=",
        ),
    )
    judge: JudgeConfig = setting(
        JudgeConfig,
        "",
        None,
        When(lambda c: not {*JUDGED}.isdisjoint(c.evaluate.tasks), f"it belongs to evaluate.tasks={'|'.join(JUDGED)}"),
    )
    prose: ProseConfig = setting(ProseConfig)
    lmms_eval: LmmsConfig = setting(LmmsConfig)


@dataclass
class DeployConfig:
    """A checkpoint as files for llama.cpp (extra ``[gguf]``)."""

    name: str = setting("none", "", "none | gguf")
    types: list[str] = setting(
        ["f16", "q8_0"],
        "of the files",
        Rule(
            lambda types: bool(types) and len({*types}) == len(types) and {*types} <= {*GGUF_TYPES},
            f"distinct, of {', '.join(GGUF_TYPES)} (K-quants are made of the f16 file by llama.cpp's own program: "
            "llama-quantize <f16 file> <file> Q4_K_M)",
        ),
    )
    mmproj: bool = setting(True, "write the image side too")
    check: bool = setting(True, "compare the files, run in the installed runtime, with transformers")
    measure: bool = setting(True, "measure their speed there, beside the dense model's")
    repeats: int = setting(
        5,
        "rounds of that; medians are reported",
        COUNT,
        When(lambda c: c.deploy.measure, "set deploy.measure=true"),
    )


@dataclass
class SweepConfig:
    """What several runs share (``-m``)."""

    name: str = setting(MISSING, "folder under sweeps/; the same command has the same name")
    arms: dict[str, list[str]] = setting({}, "of hydra/sweeper=arms: name -> what is typed for it")


@dataclass
class PathsConfig:
    """The only place that names folders."""

    output_dir: str = setting("outputs", "of runs, sweeps and dry runs", was="root")
    cache_dir: str = setting("outputs/cache", "results of finished stages, by their content")


@dataclass
class GpuPoolConfig:
    """``hydra.launcher`` of ``hydra/launcher=gpu_pool``, which runs every job of a sweep as a process of its own."""

    _target_: str = setting("hydra_plugins.sweeps.GpuPoolLauncher")
    gpus_per_job: int | None = setting(None, "GPUs of one job; null: as many as trainer.devices asks for", COUNT)
    slots: int | None = setting(None, "jobs at once where they use no GPU; null: one per core", COUNT)
    timeout_min: float | None = setting(None, "minutes after which a job counts as hanging and is ended", POSITIVE)


@dataclass
class WandbConfig:
    """``logger=wandb``: every job is one W&B run, whose id is kept in the job's folder."""

    project: str = setting("efficientllava")
    entity: str | None = setting(None, "account or team; null: your own")
    name: str = setting("${name}")
    group: str | None = setting(None, "null: the sweep, where the run belongs to one")
    job_type: str | None = setting(None, "null: the last stage, evaluate, prune or recover")
    tags: list[str] = setting([], "beside model, paradigm and recovery")
    notes: str | None = setting(None)
    mode: str | None = setting(
        None, "null: online if you are logged in, else offline", "null | online | offline | disabled"
    )
    weights: bool = setting(
        False,
        "upload the last checkpoint too",
        None,
        When(
            lambda c: c.keep != "none" and (c.prune.method != "none" or c.recover.name != "none"),
            "no checkpoint stays; prune or recover, and set keep=all or keep=recovered",
        ),
    )


@dataclass
class RunConfig:
    """The root of the configuration."""

    name: str = setting(MISSING, "part of the run folder's name")
    seed: int = setting(0, "of all draws", "[0, 4294967296)")
    data_frac: float = setting(1.0, "fraction of the recovery data", "(0, 1]", TRAINS)
    optimized_metric: str | None = setting(
        None,
        "key of results.json that a sweeper optimises, such as stages.recovered.metrics.digits_vqa.accuracy; "
        "where lower is better, as for a perplexity, give the sweeper's direction, or take a share: "
        "stages.recovered.retained.prose/perplexity",
    )
    dry_run: bool = setting(
        False,
        "say what a run would make and need, and stop; reads no weights",
        None,
        When(lambda c: not c.pretrain, "a training from nothing has no dry run"),
    )
    reuse: bool = setting(True, "take finished stages from the cache")
    keep: str = setting(
        "all",
        "checkpoints on disk once a run has ended; recovered: the last of a run",
        "all | recovered | none",
        When(lambda c: not c.pretrain, "it belongs to runs that prune or recover"),
    )
    threads: int | None = setting(None, "CPU threads per process; null: as many as torch likes", COUNT)
    model: ModelConfig = setting(ModelConfig)
    calibration: CalibrationConfig = setting(CalibrationConfig, "", None, PRUNES)
    data: DataConfig = setting(DataConfig)
    prune: PruneConfig = setting(PruneConfig, inside=(PRUNES,))
    search: SearchConfig = setting(SearchConfig, "", None, When(lambda c: c.prune.method == "auto", "set prune=auto"))
    recover: RecoverConfig = setting(RecoverConfig, inside=(RECOVERS,))
    evaluate: EvaluateConfig = setting(EvaluateConfig)
    deploy: DeployConfig = setting(DeployConfig, inside=(When(lambda c: c.deploy.name != "none", "set deploy=gguf"),))
    pretrain: Any = setting(
        None, "a _target_ and its arguments: what is done in place of a run, see experiments/tiny_models"
    )
    sweep: SweepConfig = setting(SweepConfig)
    trainer: dict[str, Any] = setting({}, "arguments of Lightning's Trainer")
    logger: Any = setting(None, "a logger of Lightning's")
    callbacks: Any = setting(None, "callbacks of Lightning's, by name")
    paths: PathsConfig = setting(PathsConfig)

    @property
    def masks(self) -> bool:
        """Whether weights become zero, and shapes stay."""
        return self.prune.method == "auto" and self.search.granularity != "structured"

    @property
    def bypassed(self) -> bool:
        """Whether something takes the place of ``prune.ratio``."""
        return bool(self.prune.nominal) or (self.prune.method == "auto" and self.search.budget.target is not None)

    @property
    def on_gpu(self) -> bool:
        """Whether the run computes on GPUs, here or, of a dry run, where it is meant for."""
        return processes.on_gpu(self.trainer, planned=self.dry_run)
