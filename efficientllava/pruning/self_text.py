"""Text that the dense model writes itself: more statistics where the calibration records are few, without any data.

Sources: self-calibration (arXiv 2410.17170), prompts as in Magpie (arXiv 2406.08464). Half of the sequences are
conversations: the model starts from what its chat template puts before a question, writes the question, and after what
the template puts next, the answer. The other half is whatever it writes on from its begin token: text of other kinds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from ..data.prompts import IGNORE, Prompts
from ..data.records import Turn
from ..models.anatomy import decoder_of, layers_of, parameters
from ..models.forward import Batch
from ..runtime.console import Tick
from ..runtime.errors import UserError
from ..settings.schema import CalibrationConfig, PruneConfig
from .stream import silent

# Where nobody says how many sequences are written: until there are so many positions for a channel of the widest MLP,
# and at most so many sequences; fewer where a search judges its policies on them, of which each reads all.
ENOUGH = 16
MOST, SEARCHED = 192, 48
MEMORY = 1 << 31  # bytes that keys, values and probabilities of the rows written at once may take
ATTENTION = "one_position"  # the name of `_attend`
# Decoder parameters below which a model writes nothing worth reading, and a copy in bf16 costs more than it saves.
SMALL = 20_000_000
_MARKS = ("qzxuser", "qzxanswer", "qzxnext", "qzxlast")  # no mark is part of another or of a chat template


class _Speaker(NamedTuple):
    """Who writes a turn, and what the template puts behind it.

    Args:
        answers: Whether it is the assistant.
        after: Token ids up to the next turn's content.
        sign: How many of them say that the turn is over; the model writes them, the rest is put in.
    """

    answers: bool
    after: tuple[int, ...]
    sign: int


class _Chat(NamedTuple):
    """A chat template taken apart; without speakers the model runs free.

    Args:
        opening: Token ids before the first question.
        speakers: User and assistant.
        ends: Token ids that end a turn.
    """

    opening: tuple[int, ...]
    speakers: tuple[_Speaker, ...]
    ends: frozenset[int]

    @classmethod
    def of(cls, model: Any, processor: Any) -> _Chat:
        prompts = Prompts(processor)
        special, free = _specials(prompts.tokenizer), cls.free(model, prompts.tokenizer)
        ends = set(free.ends)
        text, _ = prompts.text([Turn(_MARKS[0], _MARKS[1]), Turn(_MARKS[2], _MARKS[3])], 0)
        if any(text.count(mark) != 1 for mark in _MARKS):
            return free
        ids, offsets = prompts.tokenize(text)
        # A blank before the content belongs to the content's first token.
        found = [(at := text.index(mark), at + len(mark)) for mark in _MARKS[:3]]
        whole = [(token, start, end) for token, (start, end) in zip(ids, offsets, strict=True)]
        opening, asked, answered = (
            tuple(token for token, start, end in whole if low <= start and end <= high)
            for low, high in ((0, found[0][0]), (found[0][1], found[1][0]), (found[1][1], found[2][0]))
        )
        if not asked or not answered:
            return cls(opening or free.opening, (), free.ends)
        speakers = []
        for answers, after in ((False, asked), (True, answered)):
            first = next((i for i, token in enumerate(after) if token in special), None)
            ends |= set() if first is None else {after[first]}
            speakers.append(_Speaker(answers, after, len(after) if first is None else first + 1))
        return cls(opening or free.opening, tuple(speakers), frozenset(ends))

    @classmethod
    def free(cls, model: Any, tokenizer: Any) -> _Chat:
        """No template: the model writes on from its begin token."""
        named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else min(ends, default=None)
        if first is None:
            raise UserError(
                "calibration.generate: the tokenizer has no begin or end token to write on from; set "
                "calibration.generate=0"
            )
        return cls((first,), (), frozenset(ends))


def _specials(tokenizer: Any) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def _unwritten(model: Any, processor: Any) -> set[int]:
    """Special tokens, and those that stand for images and the like whether or not the tokenizer calls them special."""
    named = model.config.to_dict().items()
    told = [token for name, token in named if name.endswith(("_token_id", "_token_index"))]
    placeholders = {each for token in told for each in (token if isinstance(token, list) else [token])}
    return {*_specials(processor.tokenizer), processor.image_token_id, *placeholders} - {None}


class _Row:
    """A sequence as it is written.

    Args:
        chat: The chat template's parts.
    """

    def __init__(self, chat: _Chat) -> None:
        first, *due = ((token, IGNORE) for token in chat.opening)
        self.ids, self.labels = [first[0]], [first[1]]
        self._chat, self._turn, self._begin = chat, 0, len(chat.opening)
        self._due = due  # (token, label) of what the template puts in

    def add(self, sampled: int) -> None:
        """Append the sampled token, or what the template has in its place."""
        written = (sampled, sampled)
        if self._chat.speakers and not self._due:
            speaker = self._chat.speakers[self._turn % 2]
            written = (sampled, sampled if speaker.answers else IGNORE)
            sign = speaker.after[: speaker.sign]
            said = (*self.ids[self._begin :], sampled)[-len(sign) :] == sign
            if said or sampled in self._chat.ends:
                supervised = speaker.sign if speaker.answers else 0
                due = [(t, t if i < supervised else IGNORE) for i, t in enumerate(speaker.after)]
                # An end that is not the template's gives way to the template's.
                self._due = [written, *due[speaker.sign :]] if said else due
                self._turn += 1
                self._begin = len(self.ids) + len(self._due)
        token, label = self._due.pop(0) if self._due else written
        self.ids.append(token)
        self.labels.append(label)


class _Slots(DynamicLayer):
    """Keys and values of one layer, written into memory that is taken once.

    Args:
        length: Most tokens.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length, self._filled = length, 0
        self._memory: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new positions and return all, ``(rows, heads, seq, head_dim)``."""
        new = (key_states, value_states)
        if not self._memory:
            self._memory = tuple(s.new_empty(*s.shape[:2], self._length, s.shape[3]) for s in new)
            self.is_initialized = True
        start, self._filled = self._filled, self._filled + key_states.shape[2]
        for memory, states in zip(self._memory, new, strict=True):
            memory[:, :, start : self._filled] = states
        keys, values = (memory[:, :, : self._filled] for memory in self._memory)
        return keys, values

    def get_seq_length(self) -> int:
        """Positions so far."""
        return self._filled


def sequences(
    config: CalibrationConfig,
    prune: PruneConfig,
    positions: int,
    model: nn.Module,
    context: int | None = None,
    images: bool = True,
) -> int:
    """How many sequences the model is to write, see ``calibration.generate``.

    Args:
        config: How many are asked for; where nobody says, so many that there are `ENOUGH` positions for every channel.
        prune: What they would be written for.
        positions: Positions of the records.
        model: The dense model; the meta device is enough.
        context: Most tokens of a sequence, where that is known.
        images: Whether a record shows one, so that a search judges its policies without written text.
    """
    if not prune.solves:
        return 0
    if config.generate is not None:
        return config.generate
    fits = context is None or context >= config.generate_length
    judged_on = prune.method == "auto" and not images
    if prune.offload == "disk" or not fits or parameters(decoder_of(model)) < SMALL:
        return 0
    lacking = ENOUGH * max(layer.mlp.units for layer in layers_of(model)) - positions
    return min(SEARCHED if judged_on else MOST, max(0, -(-lacking // config.generate_length)))


def _row_bytes(model: nn.Module, length: int, size: int) -> int:
    """Bytes of keys, values and probabilities of a sequence while it is written."""
    width = sum(2 * layer.attention.units * layer.head_dim for layer in layers_of(model))
    return width * length * size + 16 * len(model.lm_head.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def writing_bytes(model: nn.Module, count: int, length: int, device: str) -> int:
    """Bytes that writing takes beside the weights, at most.

    Args:
        model: The model, in the type that it computes in; the meta device is enough.
        count: Sequences of a process.
        length: Tokens of each.
        device: ``cuda`` or ``cpu``, where a copy may be made.
    """
    parts: list[Any] = [decoder_of(model), model.lm_head]
    weights = {id(p): p for part in parts for p in part.parameters()}.values()
    copied = device == "cpu" and all(p.dtype == torch.float32 for p in weights)
    rows = min(MEMORY, count * _row_bytes(model, length, next(iter(weights)).element_size()))
    return rows + 2 * sum(p.numel() for p in weights) * copied


def positions_of(batches: Sequence[Batch]) -> int:
    """Positions of batches without the padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def write_text(
    model: nn.Module,
    processor: Any,
    count: int,
    length: int,
    seed: int,
    batch_size: int = 8,
    tick: Tick = silent,
    part: tuple[int, int] = (0, 1),
) -> list[Batch]:
    """Have the dense model write conversations and, every other one, text without a template.

    Sampled at temperature 1 from the whole vocabulary.

    The random numbers belong to sequence and position, so that a sequence does not depend on how many others there are.

    Args:
        model: An image-text-to-text model in eval mode; stays as it is.
        processor: Its processor, whose chat template and special tokens count.
        count: Number of sequences, >= 1.
        length: Tokens of each, those of the template included.
        seed: Seed.
        batch_size: Rows per returned batch.
        tick: Progress.
        part: Which of how many processes this is: each writes every so many-th batch.

    Returns:
        Batches as of `efficientllava.data.collator.Collator`, without padding and images; what the model wrote as the
        assistant is supervised.

    Raises:
        UserError: ``length`` leaves nothing to write or exceeds the context, or the model's logits are not finite.
    """
    kinds = chat, free = _Chat.of(model, processor), _Chat.free(model, processor.tokenizer)
    longest = int(processor.tokenizer.model_max_length)
    if not len(chat.opening) < length <= longest:
        raise UserError(
            f"calibration.generate_length={length}: must be in ({len(chat.opening)}, {longest}], more than what the "
            "chat template puts before a question and within the model's context"
        )
    decoder, head = _working_copy(model)
    weight = head.weight
    barred = (_unwritten(model, processor) | set(range(len(processor.tokenizer), len(weight)))) - chat.ends
    bar = torch.zeros(2, len(weight), device=weight.device)
    bar[:, [token for token in barred if token < len(weight)]] = -torch.inf
    bar[
        1, list(free.ends)
    ] = -torch.inf  # text goes on, else a model that was never asked to may write nothing but ends
    (rank, processes), numbers = part, range(count)
    starts = numbers[rank * batch_size :: processes * batch_size]
    mine = [number for start in starts for number in numbers[start : start + batch_size]]
    draws = torch.rand(count, length, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    at_once = max(1, MEMORY // _row_bytes(model, length, weight.element_size()))
    rows: list[_Row] = []
    for start in range(0, len(mine), at_once):
        some = mine[start : start + at_once]
        kind = [number % 2 for number in some]
        new = [_Row(kinds[i]) for i in kind]
        _write(decoder, head, new, draws[some], bar[kind])
        rows += new
        tick("write text", len(rows), len(mine))
    batches: list[Batch] = []
    for start in range(0, len(mine), batch_size):
        together = rows[start : start + batch_size]
        ids = torch.tensor([row.ids for row in together])
        labels = torch.tensor([row.labels for row in together])
        names = [f"self/{number}" for number in mine[start : start + batch_size]]
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "ids": names})
    return batches


@torch.inference_mode()
def _write(decoder: Any, head: nn.Module, rows: Sequence[_Row], draws: Tensor, bar: Tensor) -> None:
    """Write rows to the length of ``draws`` ``(rows, length)``; ``bar`` ``(rows, vocabulary)`` is added to logits."""
    length = draws.shape[1]
    cache = Cache(layers=[_Slots(length) for _ in decoder.layers])
    for position in range(1, length):
        ids = torch.tensor([row.ids[-1:] for row in rows], device=draws.device)
        # By position: what the cache is called depends on the version of transformers.
        state = decoder(ids, None, None, cache, use_cache=True).last_hidden_state[:, -1]
        sampled = _sample(head(state).float() + bar, draws[:, position])
        for row, token in zip(rows, sampled, strict=True):
            row.add(token)


def _sample(logits: Tensor, draws: Tensor) -> list[int]:
    """Tokens by inverse CDF: ``logits`` ``(rows, vocabulary)``, ``draws`` ``(rows,)`` in [0, 1)."""
    cdf = logits.softmax(-1).cumsum(-1)
    total = cdf[:, -1:]
    if not total.isfinite().all():
        raise UserError(
            "calibration.generate: the dense model's logits are not finite; check its weights, or set "
            "calibration.generate=0"
        )
    # Below the total also where the product rounds up; a token of probability 0 is never the first above it.
    wanted = torch.minimum(draws.unsqueeze(1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cdf, wanted, right=True).squeeze(1).tolist()


def _working_copy(model: nn.Module) -> tuple[Any, Any]:
    """Decoder and head in eval mode over the model's own weights, or bf16 copies where a CPU is faster with these."""
    parts = [decoder_of(model), model.lm_head]
    weights = {id(tensor): tensor for part in parts for tensor in (*part.parameters(), *part.buffers())}
    trained = [tensor for tensor in weights.values() if isinstance(tensor, nn.Parameter)]
    large = parameters(parts[0]) > SMALL
    if large and _bf16_is_fast() and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in trained):
        weights |= {id(p): nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in trained}
    decoder, head = copy.deepcopy(parts, dict(weights))
    if next(decoder.parameters()).device.type == "cpu":
        decoder.config._attn_implementation = ATTENTION
    return decoder.eval(), head.eval()


def _attend(_module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any) -> Any:
    """Attention of one new position of every row, for which torch's own takes ten times as long on a CPU.

    Args:
        query: ``(rows, heads, 1, head_dim)``.
        key: ``(rows, groups, seq, head_dim)``.
        value: The same.
        mask: True where a key is seen, ``(rows or 1, 1, 1, seq)``; None: all are.
        how: ``scaling``, and ``softcap`` where a decoder has one.
    """
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    scores = grouped @ key.transpose(2, 3) * (how.get("scaling") or query.shape[-1] ** -0.5)
    if cap := how.get("softcap"):
        scores = (scores / cap).tanh() * cap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    seen = scores.softmax(-1, torch.float32).to(value.dtype) @ value
    return seen.flatten(1, 2).unsqueeze(1), None


AttentionInterface.register(ATTENTION, _attend)  # pyright: ignore[reportArgumentType]
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # pyright: ignore[reportArgumentType]


def _bf16_is_fast() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
