import pytest
from omegaconf import MISSING

from efficientllava.runtime.errors import ConfigError
from efficientllava.settings import settings_of
from efficientllava.settings.checks import check_sweep
from efficientllava.settings.compose import typed
from efficientllava.settings.schema import RunConfig, WandbConfig
from efficientllava.stages.request import check

from ..runs import composed


def problems(*overrides):
    try:
        check(typed(composed(*overrides), overrides), overrides)
    except ConfigError as error:
        return list(error.problems)
    return []


def test_defaults_have_no_problem():
    assert problems() == []
    assert problems("prune=widthwise", "recover=kd_hidden", "data_frac=0.05") == []


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("data_frac=0", "(0, 1]"),
        ("data_frac=1.2", "(0, 1]"),
        ("data_frac=-0.5", "(0, 1]"),
        ("data_frac=nan", "(0, 1]"),
        ("prune.ratio=1", "[0, 1)"),
        ("prune.ratio=1.5", "[0, 1)"),
        ("prune.ratio=-0.1", "[0, 1)"),
        ("recover.warmup=1", "[0, 1)"),
        ("calibration.samples=0", "[1, infinity)"),
        ("calibration.generate=-1", "[0, infinity)"),
        ("recover.steps=0", "[1, infinity)"),
        ("recover.lr=0", "(0, infinity)"),
        ("recover.lr=inf", "(0, infinity)"),
        ("prune.importance=best", "obs"),
        ("prune.selection=greedy", "shape, local, floor, global"),
        ("recover.train=all", "projector, lora, full"),
        ("model.dtype=int8", "bfloat16"),
        ("recover.teacher.dtype=int8", "bfloat16"),
        ("seed=-1", "[0,"),
    ],
)
def test_a_value_outside_its_range_is_named_with_what_is_allowed(override, allowed):
    key, _, _ = override.partition("=")
    (line,) = problems(override)
    assert line.startswith(f"{key}=")
    assert allowed in line


@pytest.mark.parametrize("override", ["data_frac=1", "prune.ratio=0", "prune.ratio=0.99", "recover.warmup=0"])
def test_the_ends_of_a_range_are_allowed(override):
    assert problems(override) == []


def test_every_default_is_within_its_range():
    for key, value, about, when in settings_of(RunConfig(logger=WandbConfig())):
        assert about.within is None or value in (None, MISSING) or about.within.allows(value), key
        assert all(each.fix for each in when), key


def test_several_problems_come_at_once():
    found = problems("prune.ratio=2", "data_frac=0", "recover.kl=sideways", "evaluate.batch_size=0")
    assert {line.partition("=")[0] for line in found} >= {
        "prune.ratio",
        "data_frac",
        "recover.kl",
        "evaluate.batch_size",
    }


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["recover=none", "data_frac=0.5"], "data_frac"),
        (["prune=none", "prune.ratio=0.5"], "prune.ratio"),
        (["recover=none", "recover.lr=1e-3"], "recover.lr"),
        (["prune=layerwise", "prune.importance=obs"], "prune.importance"),
        (["prune=layerwise", "prune.selection=local"], "prune.selection"),
        (["prune=widthwise", "prune.iterative=true"], "prune.iterative"),
        (["prune=widthwise", "prune.drop_layers=2"], "prune.drop_layers"),
        (["prune.taylor_mean=batch"], "prune.taylor_mean"),
        (["recover=sft", "recover.kl=reverse"], "recover.kl"),
        (["recover=sft", "recover.teacher.path=x"], "recover.teacher.path"),
        (["recover.train=full", "recover.lora.r=4"], "recover.lora.r"),
        (["model=checkpoint", "model.path=org/x", "data.path=x.json", "data.images=9"], "data.images"),
        (["recover=none", "data.images=9"], "data.images"),
        (["recover=none", "data.batch_size=4"], "data.batch_size"),
        (["data.max_bad_fraction=0.1"], "data.max_bad_fraction"),
        (["prune=none", "recover=none", "data.max_length=99"], "data.max_length"),
        (["calibration.image_root=."], "calibration.image_root"),
        (["prune=layerwise", "calibration.generate=8"], "calibration.generate"),
        (
            ["prune=widthwise", "prune.refit=false", "prune.importance=wanda", "calibration.generate=8"],
            "calibration.generate",
        ),
        (["calibration.generate=0", "calibration.generate_length=64"], "calibration.generate_length"),
        (["calibration.generate=0", "calibration.generate_share=0.5"], "calibration.generate_share"),
        (["recover=projector", "recover.projector_lr=1e-4", "recover.lr=1e-3"], "recover.lr"),
        (["recover.weights.sft=0", "recover.chunk=9"], "recover.chunk"),
        (["prune.share=0.3", "prune.ratio=0.3"], "prune.ratio"),
        (["prune=layerwise", "prune.drop_layers=1", "prune.ratio=0.3"], "prune.ratio"),
        (["prune=auto", "search.budget.target=0.3", "prune.ratio=0.3"], "prune.ratio"),
        (["prune=layerwise", "prune.damping=0.1"], "prune.damping"),
        (["prune=auto", "prune.bias=true"], "prune.bias"),
        (["prune=auto", "prune.heads=query"], "prune.heads"),
        (["prune=widthwise", "prune.importance=magnitude", "prune.prefix=pruned"], "prune.prefix"),
        (["prune.importance=random", "prune.refit=false", "prune.tokens=image"], "prune.tokens"),
        (["prune=auto", "search.granularity=2:4", "prune.refit=true"], "prune.refit"),
        (["prune=auto", "search.method=random", "search.mutation=0.1"], "search.mutation"),
        (["prune=auto", "search.rounds=1", "search.projector_lr=0.1"], "search.projector_lr"),
    ],
)
def test_a_typed_key_without_effect_is_an_error(overrides, key):
    assert any(line.startswith(f"{key}: has no effect") for line in problems(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune=widthwise", "prune.bias=true"], "prune.bias=true: a refit makes up for more"),
        (["prune=wanda_sp", "prune.selection=global"], "prune.prefix=pruned: scores then depend"),
        (["prune=flap", "prune.prefix=pruned", "prune.selection=floor"], "prune.prefix=pruned: prune.importance=flap"),
        (["prune=flap", "calibration.samples=1"], "calibration.samples=1: one record has no fluctuation"),
    ],
)
def test_peers_are_taken_as_published(overrides, message):
    assert [line for line in problems(*overrides) if line.startswith(message)]
    assert problems("prune=flap") == problems("prune=wanda_sp") == []


def test_the_same_key_passes_where_it_has_an_effect():
    assert problems("prune=layerwise", "prune.iterative=true") == []
    assert problems("prune.importance=param_first", "prune.taylor_mean=batch") == []
    assert problems("recover=kd_logit", "recover.kl=reverse") == []
    assert problems("recover.train=lora", "recover.lora.r=4") == []


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("+trainer.max_steps=3", "trainer.max_steps: is decided by the stages; remove it and use recover.steps"),
        ("+trainer.fast_dev_run=true", "trainer.fast_dev_run: is decided by the stages"),
        ("trainer.devices=0", "trainer.devices=0: must be a number >= 1"),
        ("trainer.devices=two", "trainer.devices=two: must be a number >= 1"),
        (
            "trainer.devices=[1]",
            "trainer.devices=[1]: must be a number >= 1 or auto; CUDA_VISIBLE_DEVICES=1,3 in front",
        ),
        ("trainer.num_nodes=two", "trainer.num_nodes=two: must be a whole number >= 1"),
        ("trainer.strategy=foo", "trainer.strategy=foo: must be auto, ddp, fsdp or one of their variants"),
        ("trainer.precision=half", "trainer.precision=half: must be one of 32-true, bf16-mixed"),
        ("trainer.precision=16-mixed", "trainer.precision=16-mixed: needs a GPU"),
        ("trainer.precision=bf16-true", "trainer.precision=bf16-true: needs a GPU"),
        ("trainer.accelerator=abacus", "trainer.accelerator=abacus: must be one of auto, cpu, gpu, cuda"),
    ],
)
def test_a_trainer_s_arguments_are_the_user_s_or_the_stages(option, told, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (line,) = problems(option)
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["search.granularity=2:4", "search.budget.resource=flops"], "search.budget.resource=flops: weight masks"),
        (["search.budget.target=1.8"], "search.budget.target=1.8: a speed-up is no share of parameters"),
        (["search.granularity=2:4", "prune.ratio=0.6"], "prune.ratio=0.6: search.granularity=2:4 removes at most 0.5"),
        (["search.granularity=unstructured", "search.budget.target=0.97"], "search.budget.target=0.97: search.gran"),
        (["search.uniform=true", "search.budget.resource=flops"], "search.uniform=true: needs"),
        (["search=paper", "search.population=4"], "search.population=4: is less than"),
        (["prune.ratio=null"], "prune.ratio=null: set it"),
    ],
)
def test_what_no_search_can_reach_is_refused(options, told):
    (line,) = problems("prune=auto", *options)
    assert line.startswith(told)


def test_a_search_takes_its_target_in_place_of_the_ratio():
    assert problems("prune=auto", "search.budget.target=0.3", "prune.ratio=null") == []
    assert problems("prune=auto", "search.budget.target=1.8", "search.budget.resource=latency") == []
    assert problems("prune=auto", "search.granularity=2:4", "prune.ratio=0.5") == []


def test_offload_needs_a_gpu_and_no_search(monkeypatch):
    assert problems("prune.offload=true") == [
        "prune.offload: has no effect here; without a GPU all weights are in host memory anyway, or in files with "
        "prune.offload=disk, or leave it out"
    ]
    monkeypatch.setattr("efficientllava.runtime.processes.on_gpu", lambda trainer, planned=False: True)
    assert problems("prune.offload=true") == []
    (line,) = problems("prune=auto", "prune.offload=true")
    assert line.startswith("prune.offload: a search runs whole candidates")
    assert problems("prune.offload=none") == ["prune.offload=none: must be one of false, true, disk"]


ONLY = ("recover=none", "evaluate=none", "evaluate.efficiency=false", "deploy=none")


@pytest.mark.parametrize("left_out", [None, *ONLY])
def test_pruning_from_files_is_all_that_its_run_does(left_out):
    options = [option for option in ONLY if option not in (left_out, "deploy=none")]
    options += ["deploy=gguf", "deploy.check=false", "deploy.measure=false"] if left_out == "deploy=none" else []
    found = problems("prune.offload=disk", "trainer=cpu", *options)
    assert [line[:31] for line in found] == ["prune.offload=disk: recovery, b"] * (left_out is not None)


def test_pruning_from_files_needs_a_cpu_and_old_weights(monkeypatch):
    assert problems("prune.offload=disk", *ONLY[:3], "prune.reinitialise=true")[0].startswith(
        "prune.offload=disk: prune.re"
    )
    assert problems("prune.offload=disk", *ONLY[:3], "prune=auto")[0].startswith("prune.offload: a search")
    monkeypatch.setattr("efficientllava.runtime.processes.on_gpu", lambda trainer, planned=False: True)
    assert problems("prune.offload=disk", *ONLY[:3]) == [
        "prune.offload=disk: is for a CPU; set trainer=cpu, or prune.offload=true"
    ]


@pytest.mark.parametrize("key", ["nonsense", "prune.nonsense", "recover.lora.nonsense"])
def test_an_added_key_that_nothing_reads_is_an_error(key):
    assert problems(f"+{key}=3") == [f"{key}: unknown key; remove it"]


def test_steps_and_epochs_exclude_each_other():
    (line,) = problems("recover.epochs=2", "recover.steps=5")
    assert "exactly one" in line
    assert problems("recover.epochs=2", "recover.steps=null") == []
    assert problems("recover.epochs=2", "++recover.steps=5")


@pytest.mark.parametrize(("model", "preset"), [("tiny_llava", "steps"), ("llava_1_5_7b", "epochs")])
@pytest.mark.parametrize(("told", "value"), [("steps", 7), ("epochs", 0.5), ("epochs", None)])
def test_the_length_of_a_recovery_that_is_typed_wins_over_the_preset_s(model, preset, told, value):
    overrides = [f"model={model}", f"recover.{told}={'null' if value is None else value}"]
    recover = typed(composed(*overrides), overrides).recover
    left = {name for name in ("steps", "epochs") if getattr(recover, name) is not None}
    assert left == ({told} if value is not None else {preset} - {told})
    assert getattr(recover, told) == value


def test_losses_without_weight_are_an_error():
    assert any("all are 0" in line for line in problems("recover.weights.sft=0", "recover.weights.hidden=0"))
    assert problems("recover.weights.sft=0") == []


@pytest.mark.parametrize("layers", ["first", "[]", "[a]", "3"])
def test_hidden_layers_are_last_all_or_indices(layers):
    (line,) = problems(f"recover.hidden_layers={layers}")
    assert line.startswith("recover.hidden_layers=")


def test_missing_files_and_folders_are_found_early(tmp_path):
    typed = ("model.path=/no/such", "data.path=/no/such.json", f"data.image_root={tmp_path}/none")
    found = problems("model=checkpoint", *typed)
    assert [line.partition("=")[0] for line in found] == ["data.path", "data.image_root", "model.path"]
    (tmp_path / "file").write_text("")
    (line,) = problems(f"paths.output_dir={tmp_path}/file/deeper")
    assert "is a file" in line


def test_a_missing_value_names_its_key():
    assert any(line.startswith("model.path: not set") for line in problems("model=checkpoint"))
    (line,) = problems("model=checkpoint", "model.path=org/x")
    assert line.startswith("data.path: not set")
    assert problems("model=checkpoint", "model.path=org/x", "prune=none", "recover=none") == []


def test_choosing_a_model_chooses_its_data_and_benchmarks():
    config = composed("model=checkpoint")
    assert (config.data.name, list(config.evaluate.tasks)) == ("conversations", [])
    for model, data in (
        ("llava_1_5_7b", "llava_665k"),
        ("bunny_3b", "bunny_695k"),
        ("mini_internvl_4b", "internvl_sft"),
    ):
        config = composed(f"model={model}")
        assert (config.data.name, config.data.group_by_modality_length) == (data, True)
        assert problems(f"model={model}", "data.image_root=.") == []
        (line,) = problems(f"model={model}")
        assert line.startswith("data.image_root: not set; give the folder that holds the images: ")
    config = composed("model=tiny_bunny")
    assert (config.data.name, list(config.evaluate.tasks)) == ("digits_vqa", ["digits_vqa"])
    config = composed("model=checkpoint", "data=digits_vqa", "evaluate=digits_vqa")
    assert (config.data.name, list(config.evaluate.tasks)) == ("digits_vqa", ["digits_vqa"])
    assert composed("model=tiny_llava", "evaluate=none").evaluate.tasks == []


JUDGE = ("evaluate.tasks=[mmvet]", "evaluate.judge.model=m")


@pytest.mark.parametrize(
    "url",
    ["localhost:8000/v1", "ftp://x/v1", "http://", "http://me:secret@x/v1", "https://x/v1?key=secret", "http://x:y/v1"],
)
def test_a_judge_s_address_is_an_address_without_a_key(url):
    (line,) = problems(*JUDGE, f"evaluate.judge.base_url='{url}'")
    assert line.startswith("evaluate.judge.base_url: must be like https://host:port/v1") and "secret" not in line


def test_a_judge_s_key_is_named_not_given():
    (line,) = problems(*JUDGE, "evaluate.judge.base_url=http://x/v1", "evaluate.judge.key_env=sk-secret")
    assert line.startswith("evaluate.judge.key_env: must be the name") and "sk-secret" not in line


def test_a_judge_needs_a_name_and_a_benchmark():
    address = "evaluate.judge.base_url=http://localhost:8000/v1"
    assert problems(*JUDGE, address, "+evaluate.judge.body={max_tokens:null}", "evaluate.judge.runs=2") == []
    (line,) = problems(JUDGE[0], address)
    assert line.startswith("evaluate.judge.model: not set")
    (line,) = problems("evaluate.judge.runs=2")
    assert line.startswith("evaluate.judge.runs: has no effect here; it belongs to evaluate.tasks=")
    (line,) = problems(*JUDGE, "evaluate.judge.retries=2")
    assert line.startswith("evaluate.judge.retries: has no effect here; set evaluate.judge.base_url")


def test_benchmarks_are_known_and_their_rows_there(tmp_path):
    (line,) = problems("evaluate.tasks=[pope,nonsense]")
    assert line.startswith("evaluate.tasks: 'nonsense' is not a benchmark; choose of ai2d, ") and "vizwiz" in line
    (line,) = problems("evaluate.tasks=[pope,pope]")
    assert line.startswith("evaluate.tasks=[pope,pope]: names a benchmark more than once")
    (line,) = problems("evaluate=pope", f"evaluate.root={tmp_path}/nowhere")
    assert line.startswith(f"evaluate.root={tmp_path}/nowhere: no such file or folder")
    (line,) = problems("evaluate=pope", "evaluate.protocol=mine")
    assert line.startswith("evaluate.protocol=mine: must be one of llava, lmms_eval")


def test_options_of_benchmarks_need_one(tmp_path):
    for option in (f"evaluate.root={tmp_path}", "evaluate.namespace=x", "evaluate.protocol=lmms_eval"):
        assert problems("evaluate=gqa", option) == []
        (line,) = problems(option)
        assert "has no effect here" in line
    (line,) = problems("evaluate=gqa", f"evaluate.root={tmp_path}", "evaluate.namespace=x")
    assert line.startswith("evaluate.namespace: has no effect here")
    (line,) = problems("evaluate=none", "evaluate.limit=3")
    assert line.startswith("evaluate.limit: has no effect here; choose a benchmark")


def test_what_is_typed_for_a_sweep_has_an_effect_in_one_of_its_jobs():
    made = []

    def sweep(*jobs):
        made.clear()
        check_sweep(jobs, lambda job: made.append(job) or typed(composed(*job), job))

    none, sft = ["recover=none", "data_frac=0.1"], ["recover=sft", "data_frac=0.1"]
    sweep(none, sft, sft)
    assert made == [none, sft]  # no more than it takes to know
    with pytest.raises(ConfigError, match=r"^recover\.lora\.r: has no effect here; set recover\.train=lora"):
        sweep(none, [*sft, "recover.lora.r=4"])
    sweep(["recover=nonsense", "data_frac=0.1"], none)  # the first job tells by itself what is wrong with it
