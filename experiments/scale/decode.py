"""Decoding as fast as it goes with stock parts: a static cache, decoder layers compiled once, all of it a CUDA graph.

``generate`` compiles the whole model, which takes minutes for nine of them. Here all layers of one shape share one
program: each is given its own part of the cache, and none its number.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from efficientllava.evaluation.efficiency import now
from efficientllava.models.anatomy import decoder_of
from efficientllava.models.forward import decoder_inputs, going_on
from efficientllava.pruning.stream import forwarded

WARM_UP = 3
PROGRAMS = 64  # one per shape of layer and batch


class Slot:
    """The keys and values of one layer, in place of the cache of all.

    Args:
        layer: The layer's part of a static cache, filled by the prompt.
    """

    def __init__(self, layer: Any) -> None:
        # Copies, as the cache's own tensors are marked to have one address, which makes a program of every layer.
        self.keys, self.values, self.length = (t.clone() for t in (layer.keys, layer.values, layer.cumulative_length))

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add one position."""
        at = self.length.view(1)
        self.keys.index_copy_(2, at, keys)
        self.values.index_copy_(2, at, values)
        self.length.add_(1)
        return self.keys, self.values


@contextmanager
def one_program(model: Any, name: str, cache: Any) -> Iterator[None]:
    """Let all decoder layers run one compiled program.

    Args:
        model: The model.
        name: Under which its layers are given a cache.
        cache: A static cache, filled by the prompt.
    """
    layers, backend = decoder_of(model).layers, "inductor" if model.device.type == "cuda" else "eager"
    program = torch.compile(type(layers[0]).forward, fullgraph=True, dynamic=False, backend=backend)

    def run(layer: Any, slot: Slot, hidden: Tensor, **given: Any) -> Tensor:
        return program(layer, hidden, **{**given, name: slot})

    numbers = [layer.self_attn.layer_idx for layer in layers]
    with ExitStack() as changed, torch._dynamo.config.patch(recompile_limit=PROGRAMS):
        for layer, part in zip(layers, cache.layers, strict=True):
            changed.enter_context(forwarded(partial(run, layer, Slot(part)), layer))
            layer.self_attn.layer_idx = 0
        yield
    for layer, number in zip(layers, numbers, strict=True):
        layer.self_attn.layer_idx = number


def replayed(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def decoding(model: Any, prompt: dict[str, Any], room: int) -> Iterator[tuple[Callable[[], None], Tensor]]:
    """A function that chooses the next token of every row, behind a prompt, and where it leaves it.

    Args:
        model: An image-text-to-text model in eval mode.
        prompt: A batch on its device.
        room: Most calls.
    """
    inputs = decoder_inputs(model, prompt)
    (name,) = going_on(model(**inputs, use_cache=True, logits_to_keep=1))
    cache: Any = StaticCache(config=model.config, max_cache_len=prompt["input_ids"].shape[1] + room)
    token = model(**inputs, **{name: cache}, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def step() -> None:
        token.copy_(model(input_ids=token, **{name: cache}, use_cache=True).logits[:, -1:].argmax(-1))
        cache.layers[0].cumulative_length.add_(1)  # tells position and mask

    with one_program(model, name, cache):
        yield step, token


@torch.no_grad()
def decode_ms(model: Any, prompt: dict[str, Any], new_tokens: int, repeats: int) -> float:
    """Shortest time of a greedy token of all rows, in milliseconds.

    Args:
        model: As for `decoding`.
        prompt: As for `decoding`.
        new_tokens: Tokens that are timed in one go.
        repeats: How often.
    """
    device = model.device
    with decoding(model, prompt, WARM_UP + 1 + new_tokens * repeats) as (step, _):
        step()
        run = replayed(step) if device.type == "cuda" else step
        times = timeit.repeat(run, timer=partial(now, device), repeat=repeats, number=new_tokens)
    return 1e3 * min(times) / new_tokens
