import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from efficientllava.checkpoint import export
from efficientllava.checkpoint import folder as store
from efficientllava.checkpoint.export import CHECK, reload_gate, save
from efficientllava.data.collator import prompt
from efficientllava.data.embedded.digits import Digits
from efficientllava.models.offload import Disk
from efficientllava.models.pruned import is_per_layer
from efficientllava.pruning.plan import LayerPlan, PruningPlan
from efficientllava.pruning.surgery import cut
from efficientllava.runtime.errors import UserError

from ..runs import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2)


@pytest.fixture
def loaded(folder):
    return store.load(str(folder))


def probe(checkpoint):
    return prompt(checkpoint.processor, "which digit ?", Digits("test", 1)[0].image)


def test_the_same_weights_pass_in_a_process_without_this_package(loaded, folder):
    reload_gate(folder, loaded.model, probe(loaded))
    assert "-I" not in CHECK


def test_other_weights_are_refused(loaded, folder):
    with torch.no_grad():
        loaded.model.lm_head.weight[5, 0] += 1e-3
    with pytest.raises(RuntimeError, match="differs from the model in memory: logits differ by"):
        reload_gate(folder, loaded.model, probe(loaded))


def test_a_model_in_files_is_compared_in_the_type_that_it_computes_in(folder, tmp_path):
    filed, disk = store.load(str(folder), offload="disk"), Disk(torch.float32, torch.float16, tmp_path)
    assert filed.model.dtype == filed.storage == torch.float16
    reload_gate(folder, filed.model, probe(filed), disk)
    filed = store.load(str(folder), offload="disk")
    filed.model.lm_head.weight.data[5, 0] += 1e-3  # private: the file stays as it is
    with pytest.raises(RuntimeError, match="differs from the model in memory: logits differ by"):
        reload_gate(folder, filed.model, probe(filed), disk)


@torch.no_grad()
def test_a_recovered_model_that_asks_for_no_gradients_passes(tmp_path):
    """As wide as Bunny's projector: there, torch takes another kernel where a weight asks for none."""
    tower = {"image_size": 56, "patch_size": 14, "hidden_size": 1152, "intermediate_size": 8, "num_attention_heads": 1}
    text = {"hidden_size": 2560, "intermediate_size": 8, "num_attention_heads": 1, "head_dim": 8, "vocab_size": 40}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**tower, num_hidden_layers=1),
        text_config=LlamaConfig(**text, num_hidden_layers=1),
        image_token_index=39,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.tensor([[1, *[39] * 16, 2, 3]])
    images = torch.randn(1, 3, 56, 56, dtype=torch.bfloat16)
    reload_gate(tmp_path, model.eval().requires_grad_(False), {"input_ids": ids, "pixel_values": images})


def test_weights_of_another_type_than_config_says_are_no_files_to_prune_from(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace("float16", "bfloat16"))
    with pytest.raises(
        UserError, match=r"is stored as F16, and config.json says torch.bfloat16; for prune.offload=disk"
    ):
        store.load(str(copy), offload="disk")


def test_a_folder_that_does_not_load_is_refused(loaded, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="differs from the model in memory"):
        reload_gate(tmp_path, loaded.model, probe(loaded))


def test_a_process_that_is_killed_has_not_shown_a_difference(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "CHECK", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match=r"not shown to be as in memory: .* was ended by SIGKILL, out of memory"):
        reload_gate(tmp_path, loaded.model, probe(loaded))


@pytest.mark.slow
def test_layers_of_unequal_size_need_the_package_and_pass_with_it(loaded, tmp_path):
    layers = (LayerPlan(0, tuple(range(4)), tuple(range(50))), LayerPlan(1, tuple(range(8)), tuple(range(90))))
    plan = PruningPlan("widthwise", layers, 2, 1, None, 0.0, ())
    smaller = cut(loaded.model, plan)
    assert is_per_layer(smaller.config.get_text_config())
    inputs = probe(loaded)
    copy = save(loaded.after(smaller.eval(), {"stage": "prune"}, (0, 1)), tmp_path / "copy")
    reload_gate(copy, smaller, inputs)
    stock = f"from transformers import AutoModelForImageTextToText as A; A.from_pretrained({str(copy)!r})"
    assert subprocess.run([sys.executable, "-I", "-c", stock], capture_output=True, check=False).returncode != 0
