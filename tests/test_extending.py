"""What docs/extending.md shows works as it stands there, by its own text alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image

from efficientllava.evaluation import rows, tasks
from efficientllava.models import anatomy
from efficientllava.pruning import importance
from efficientllava.recovery import losses
from efficientllava.settings.schema import EvaluateConfig

from .conftest import FAMILIES, make_model

PAGE = (Path(__file__).resolve().parents[1] / "docs/extending.md").read_text(encoding="utf-8")
BLOCKS = [(kind, text) for kind, text in re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)]


def block(word: str) -> str:
    """The one block of code that has a word."""
    [found] = [text for kind, text in BLOCKS if kind == "python" and word in text]
    return found


def typed_into(module: ModuleType, text: str) -> dict:
    """The names of a module once a block has been typed into its file."""
    names = dict(vars(module))
    exec(text, names)
    return names


def test_a_benchmark_is_asked_and_scored(tmp_path):
    module = ModuleType(f"{tasks.__name__}.colours")
    module.__package__ = tasks.__name__
    exec(block("BENCHMARK"), vars(module))
    said = {"answer": "Red", "kind": "fruit", "question": "which colour?"}
    lines = [json.dumps({"question_id": i, "image": "a.png", **said}) for i in range(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    task = rows.task("colours", vars(module)["BENCHMARK"], EvaluateConfig(root=str(tmp_path)))
    assert [record.turns[0].question for record in task.records()] == ["which colour?" + tasks.SHORT] * 3
    answers = [{"id": str(i), "prediction": text, **said} for i, text in enumerate(("red", "Red.", "RED one"))]
    assert task.score(answers).metrics == pytest.approx(
        {"accuracy": 2 / 3, "n": 3, "accuracy/fruit": 2 / 3, "n/fruit": 3}
    )


def test_a_loss_is_a_sum_over_rows():
    names = typed_into(losses, block("class ConfidenceLoss"))
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = names["ConfidenceLoss"]()(logits, torch.zeros(5, dtype=torch.long))
    p = logits.softmax(-1)
    assert loss.item() == pytest.approx((p * p.log()).sum().item(), rel=1e-5)
    loss.backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    entry = re.search(r'`("confidence": lambda .*?),`', PAGE)
    assert entry and str(eval(f"{{{entry[1]}}}", names)["confidence"](None)) == "-H"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_importance_gives_every_unit_what_it_writes(family):
    names = typed_into(importance, block("def energy_scores"))
    row = eval(f"{{{block('Importance(INPUTS')}}}", names)["energy"]
    for layer in anatomy.layers_of(make_model(family)):
        for component in layer.components:
            x = torch.randn(60, component.units * component.width, generator=torch.Generator().manual_seed(0))
            gram = (x.T @ x / len(x)).double()
            found = names["energy_scores"](component, gram)
            written = x.double() @ component.writer.weight.detach().double().T
            assert found.sum().item() == pytest.approx(written.square().sum(1).mean().item(), rel=1e-5)
            assert row.rank(component, gram, None).order == tuple(found.sort(stable=True).indices.tolist())


def test_a_decoder_is_a_row():
    text = block("DecoderNames(")
    found = eval(f"{{{text}}}", dict(vars(anatomy)))
    [(model_type, names)] = found.items()
    from transformers import GemmaConfig
    from transformers.models.gemma import modeling_gemma

    assert GemmaConfig.model_type == model_type and model_type not in anatomy.DECODERS
    assert hasattr(modeling_gemma, names.layer)


@pytest.mark.parametrize(
    "text", [text for kind, text in BLOCKS if kind == "yaml"], ids=lambda text: text.split("\n")[0]
)
def test_an_option_is_a_file(text):
    node = yaml.safe_load(text.replace("<", "_").replace(">", "_"))
    assert node.get("name", "mine") == "mine"
