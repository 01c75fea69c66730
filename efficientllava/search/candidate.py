"""Parts of a candidate: a decoder layer that runs with other components, and what the answers then cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..models.anatomy import Layer, final_norm_of
from ..models.forward import Batch, segment_mask, supervised_positions
from ..pruning.statistics import CalibrationStream

CHUNK = 512  # supervised positions whose logits exist at once, in fp32


class _Written(Exception):
    """Control flow: the attention has written, nothing else of the layer has to run."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


class LayerShell:
    """One decoder layer of which attention and MLP are exchanged at every call; the model's own layer stays as it is.

    Everything else (norms, residual sums, their order) is the stock layer's, so that no decoder needs code of its own.

    Args:
        stream: Knows what the layer is called with.
        layer: The layer.
        position: Its index.
    """

    def __init__(self, stream: CalibrationStream, layer: Layer, position: int) -> None:
        self._stream, self._position = stream, position
        names = {child: name for name, child in layer.module.named_children()}
        self._names = names[layer.attention.module], names[layer.mlp.module]
        self._shell = copy.copy(layer.module)
        kept = layer.module._modules.items()
        self._shell._modules = {name: child for name, child in kept if name not in self._names}

    def _call(self, attention: Callable[..., Any], mlp: Callable[..., Any], batch: int, hidden: Tensor) -> Tensor:
        # Plain attributes: faster to exchange than registered modules, and functions can stand in for them.
        vars(self._shell).update(zip(self._names, (attention, mlp), strict=True))
        return self._stream.call(self._shell, self._position, batch, hidden)

    def whole(self, attention: nn.Module, mlp: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        """The layer's output, ``(batch, seq, hidden)``.

        Args:
            attention: Runs in place of the layer's attention.
            mlp: Runs in place of its MLP.
            batch: Index of the batch in the stream.
            hidden: The layer's input, ``(batch, seq, hidden)``.
        """
        return self._call(attention, mlp, batch, hidden)

    def attend(self, attention: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        """What the attention writes, ``(batch, seq, hidden)``; arguments as for `whole`."""

        def stop(*args: Any, **kwargs: Any) -> NoReturn:
            raise _Written(attention(*args, **kwargs)[0])

        try:
            self._call(stop, nn.Identity(), batch, hidden)
        except _Written as reached:
            return reached.output
        raise RuntimeError(f"{type(self._shell).__name__} did not call its attention")

    def finish(self, written: Tensor, mlp: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        """The layer's output from what its attention has written.

        Args:
            written: Result of `attend`, like ``hidden``.
            mlp: Runs in place of the layer's MLP.
            batch: Index of the batch in the stream.
            hidden: The layer's input, at any selection of positions ``(..., hidden)``: without attention, they are
                independent of each other.
        """
        return self._call(lambda *_args, **_kwargs: (written, None), mlp, batch, hidden)


def without_unseen(batch: Batch, image_token_id: int) -> tuple[dict[str, Any], Tensor]:
    """Drop the positions that no supervised prediction sees: ends of answers, what follows the last one, padding.

    Args:
        batch: A collated batch with ``labels``.
        image_token_id: Positions with this token stay, as an image's features need all of them.

    Returns:
        The batch without ``labels``, and the column that every position ``(rows, width)`` had before.
    """
    supervised, _ = supervised_positions(batch["labels"])
    segments = batch.get("segment_ids", torch.ones_like(batch["labels"]))
    sees = segment_mask(batch["attention_mask"], segments, torch.float32).squeeze(1) == 0
    needed = (sees & supervised.unsqueeze(2)).any(1) | (batch["input_ids"] == image_token_id)
    order = needed.int().sort(dim=1, descending=True, stable=True).indices
    columns = order[:, : max(1, int(needed.sum(1).max()))]
    named = ("input_ids", "position_ids", "segment_ids")
    moved = {name: batch[name].gather(1, columns) for name in named if batch.get(name) is not None}
    rest = {name: value for name, value in batch.items() if name != "labels"}
    return {**rest, **moved, "attention_mask": needed.gather(1, columns).long()}, columns


class Answers:
    """The supervised tokens of a batch, and how far a model is from them and from the dense model.

    An answer is a run of supervised tokens of one row and one packed question.

    Args:
        model: Gives final norm and head.
        batch: A collated batch with ``labels``.
        columns: Columns of the positions that are run, see `without_unseen`.
        stream: Keeps the dense model's distributions where it keeps hidden states.

    Attributes:
        targets: The supervised tokens, ``(tokens,)``.
        count: Number of answers.
        dense: Log-probabilities of the dense model, ``(tokens, vocab)``, fp32; set by `remember`.
    """

    dense: Tensor

    def __init__(self, model: nn.Module, batch: Batch, columns: Tensor, stream: CalibrationStream) -> None:
        self._norm, self._head, self._stream = final_norm_of(model), model.lm_head, stream
        mask, self.targets = supervised_positions(batch["labels"])
        supervised = mask[:, :-1]
        opens = supervised.clone()
        opens[:, 1:] &= ~supervised[:, :-1]
        if (segments := batch.get("segment_ids")) is not None:
            opens |= supervised & (segments[:, 1:] != segments[:, :-1])
        self._positions = mask.gather(1, columns).flatten().nonzero().squeeze(1)
        self._answer = opens[supervised].cumsum(0) - 1
        self.count = int(opens.sum())

    def rows(self, hidden: Tensor) -> Tensor:
        """Choose the positions that predict a supervised token: ``(rows, width, hidden)`` to ``(tokens, hidden)``."""
        return hidden.flatten(0, 1)[self._positions]

    def _log_probabilities(self, rows: Tensor) -> Tensor:
        return self._head(self._norm(rows)).float().log_softmax(-1)  # pyright: ignore[reportCallIssue]

    def remember(self, rows: Tensor) -> None:
        """Take the model that gave these outputs of the last layer, ``(tokens, hidden)``, as the dense one."""
        self.dense = self._stream.store(torch.cat([self._log_probabilities(part) for part in rows.split(CHUNK)]))

    def measure(self, rows: Tensor) -> Tensor:
        """Sums over the batch.

        Args:
            rows: Outputs of the last layer, before the final norm, ``(tokens, hidden)``.

        Returns:
            Cross-entropy of the tokens, KL divergence from the dense model (both in nats), and number of answers with
            a token that is not the most likely one; float64 ``(3,)``.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=rows.device)
        wrong = torch.zeros(self.count, dtype=torch.long, device=rows.device)
        parts = (t.split(CHUNK) for t in (rows, self.targets, self._answer, self.dense))
        for part, targets, answer, dense in zip(*parts, strict=True):
            found = self._log_probabilities(part)
            sums[0] += nn.functional.nll_loss(found, targets, reduction="sum")
            sums[1] += nn.functional.kl_div(found, dense.to(found.device), reduction="sum", log_target=True)
            wrong.index_add_(0, answer, (found.argmax(-1) != targets).long())
        sums[2] = (wrong > 0).sum()
        return sums
