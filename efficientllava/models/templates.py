"""Chat templates: the prompts of LLaVA-1.5, Bunny and Mini-InternVL, and the short ones of the tiny models."""

from __future__ import annotations

_CONTENT = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}ASSISTANT: CONTENT{{ eos_token }}"
    "{% else %}USER: CONTENT {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\nCONTENT<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Of the 1.5 release; later releases of the InternVL repository put a Chinese sentence here.
PHI3_SYSTEM = "You are an AI assistant whose name is Phi-3."


def chat_template(text: str, image: str) -> str:
    """Fill a template in.

    Args:
        text: Jinja text in which ``CONTENT`` stands for the content of the message ``m``.
        image: What the template writes for an image.
    """
    return text.replace("CONTENT", _CONTENT).replace("IMAGE", image)


def vicuna_template() -> str:
    """``vicuna_v1`` of LLaVA-1.5 and ``bunny``: system sentence, ``USER: … ASSISTANT: …`` and the end token.

    A system message of the user's replaces the system sentence.
    """
    system = (
        f"{{% set m = messages[0] %}}{{% if m['role'] == 'system' %}}CONTENT{{% else %}}{VICUNA_SYSTEM}{{% endif %}} "
    )
    return chat_template(system + VICUNA.replace("in messages", "in messages if m['role'] != 'system'"), "<image>\n")


def phi3_template() -> str:
    """``phi3-chat`` of Mini-InternVL-Chat-4B-V1-5: no line break after ``<|end|>``, nor after an image at a turn's end.

    A system message of the user's replaces the system sentence.
    """
    system = f"{{% if messages[0]['role'] != 'system' %}}<|system|>\n{PHI3_SYSTEM}<|end|>{{% endif %}}"
    image = "<IMG_CONTEXT>{{ '' if loop.last else '\\n' }}"
    return chat_template(system + PHI3.replace("<|end|>\n", "<|end|>"), image)
