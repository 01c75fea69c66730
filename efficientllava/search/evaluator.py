"""Risk of many policies at once: candidates are assembled from a level table, and run what they share only once.

The policies of a call are ordered as a prefix tree over genes: the attention of a layer is a node, its MLP is the next.
The tree is walked depth first, batch by batch, so that only the activations of the current path are held; those on the
paths of chosen policies (the parents of the next generation) are kept for later calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..models.anatomy import Layer, decoder_of, layers_of
from ..models.forward import Batch, Reached, segment_mask, supervised_positions
from ..pruning.stream import Calibration, CalibrationStream, written_weight
from ..runtime import processes
from ..runtime.errors import UserError
from .evolution import Risk
from .levels import LevelTable
from .space import Policy


class _State(NamedTuple):
    """Activations behind the first ``depth`` genes.

    Args:
        depth: Number of genes that have run.
        hidden: Input of the layer that is next or under way.
        written: What this layer's attention wrote, where ``depth`` is odd.
    """

    depth: int
    hidden: Tensor
    written: Tensor | None = None


class Evaluator:
    """Evaluates policies on calibration batches; the model is not changed.

    Args:
        model: The dense model in eval mode.
        table: Its components at every level.
        stream: The samples.
        keep_bytes: Bound on the activations that are kept between calls. Where those of all chosen policies would take
            more, they are kept at every second, fourth, sixth... gene only.

    Attributes:
        answers: Supervised tokens of every batch and the dense model's distributions of them.
        dense: Risk of the dense model on all batches.

    Raises:
        UserError: The samples have no supervised token.
    """

    def __init__(
        self, model: nn.Module, table: LevelTable, stream: CalibrationStream, keep_bytes: int = 2 << 30
    ) -> None:
        image_token_id = model.config.image_token_id  # pyright: ignore[reportAttributeAccessIssue]
        short, columns = zip(*(without_unseen(b, image_token_id) for b in stream.batches), strict=True)  # pyright: ignore[reportArgumentType]
        self._table, self._keep_bytes = table, keep_bytes
        self._stream = stream.over(short)
        self._shells = [LayerShell(self._stream, layer, i) for i, layer in enumerate(layers_of(model))]
        self.answers = [Answers(batch, kept, self._stream) for batch, kept in zip(stream.batches, columns, strict=True)]
        if not sum(answers.count for answers in self.answers):
            raise UserError("search: the samples have no answer to score; pass records with answers")
        self._weights = self._weigh(stream.calibration)
        self._kept: dict[tuple[int, Policy], Tensor] = {}
        self._wanted: set[Policy] = set()
        self.restart()
        self.dense = self._run_dense(model)

    def restart(self) -> None:
        """Run projector and embeddings again and forget kept activations: to be called when the projector has changed.

        Divergences stay relative to the model that the evaluator was made with.
        """
        self._start = self._stream.start()
        self._kept.clear()

    @torch.no_grad()
    def _run_dense(self, model: nn.Module) -> Risk:
        sums = torch.zeros(3, dtype=torch.float64)
        for batch, answers in enumerate(self.answers):
            hidden = self._stream.load(self._start[batch])
            for position, layer in enumerate(decoder_of(model).layers):
                hidden = self._stream.call(layer, position, batch, hidden)
            rows = answers.rows(hidden)
            answers.remember(rows)
            sums += self._weights[batch] * answers.measure(rows).cpu()
        return self._risk(sums, range(len(self.answers)))

    def _weigh(self, calibration: Calibration) -> list[float]:
        """What a token of each batch counts for: written text has its share of the whole."""
        known = [(len(answers.targets), batch in calibration.written) for batch, answers in enumerate(self.answers)]
        read, made = (sum(tokens for tokens, written in known if written is kind) for kind in (False, True))
        weight = written_weight(calibration.written_share, read, made)
        return [weight if written else 1.0 for _, written in known]

    def _risk(self, sums: Tensor, batches: Iterable[int]) -> Risk:
        counts = [
            (self._weights[b] * len(self.answers[b].targets), self._weights[b] * self.answers[b].count) for b in batches
        ]
        tokens, answers = (sum(column) or 1.0 for column in zip(*counts, strict=True))
        loss, kl, wrong = sums.tolist()
        return Risk(loss / tokens, kl / tokens, wrong / answers)

    @torch.no_grad()
    def evaluate(
        self,
        policies: Sequence[Policy],
        batches: Sequence[int] | None = None,
        keep: Sequence[Policy] | None = None,
    ) -> list[Risk]:
        """Empirical risks; several processes share the work, and all get all results.

        Args:
            policies: One level per gene each; the same on all processes. Repeated ones run once.
            batches: Indices of the stream's batches to evaluate on; None for all.
            keep: Policies whose activations stay for later calls, wherever the policies of a call share them; those of
                others are dropped. None leaves what is kept as it is and adds to it.

        Returns:
            One risk per policy, in their order.
        """
        if keep is not None:
            self._wanted = self._prefixes(keep)
            self._kept = {key: value for key, value in self._kept.items() if key[1] in self._wanted}
        chosen = range(len(self.answers)) if batches is None else batches
        order = sorted(set(policies))
        rank, world = processes.rank(), processes.world_size()
        mine = order[len(order) * rank // world : len(order) * (rank + 1) // world]
        sums = {policy: torch.zeros(3, dtype=torch.float64) for policy in mine}
        for batch in chosen:
            for policy, values in self._walk(batch, mine):
                sums[policy] = sums[policy].to(values.device) + self._weights[batch] * values
        found = {policy: self._risk(values, chosen) for policy, values in sums.items()}
        everywhere = {policy: risk for part in processes.gather(found) for policy, risk in part.items()}
        return [everywhere[policy] for policy in policies]

    def _prefixes(self, policies: Sequence[Policy]) -> set[Policy]:
        """Prefixes of policies whose activations can be kept, as many as the bound allows."""
        depth, size = len(self._table.genes), sum(h.numel() * h.element_size() for h in self._start)
        for spacing in (1, *range(2, depth, 2)):
            prefixes = {policy[:end] for policy in policies for end in range(spacing, depth, spacing)}
            if len(prefixes) * size <= self._keep_bytes:
                return prefixes
        return set()

    def _walk(self, batch: int, policies: Sequence[Policy]) -> Iterator[tuple[Policy, Tensor]]:
        """Run the prefix tree of sorted policies on one batch; yield the sums of `Answers.measure` at its leaves."""
        groups: dict[Policy, list[Policy]] = {}
        for policy in policies:
            groups.setdefault(self._deepest(batch, policy), []).append(policy)
        pending = [
            (self._resume(batch, prefix), part)
            for prefix, group in groups.items()
            for part in _branches(group, len(prefix))
        ]
        while pending:
            state, group = pending.pop()
            state = self._step(batch, state, group)
            if state.depth == len(self._table.genes):
                yield group[0], self.answers[batch].measure(state.hidden)
                continue
            if (prefix := group[0][: state.depth]) in self._wanted:
                latest = state.hidden if state.written is None else state.written
                self._kept[batch, prefix] = self._stream.store(latest)
            pending += [(state, part) for part in _branches(group, state.depth)]

    def _step(self, batch: int, state: _State, group: Sequence[Policy]) -> _State:
        """Run the next gene, or the next two where nobody needs what lies between them.

        Args:
            batch: Index of the batch.
            state: Activations that the group shares.
            group: Sorted policies that share the level of the next gene too.
        """
        depth, policy = state.depth, group[0]
        shell, answers = self._shells[depth // 2], self.answers[batch]
        last = depth + 2 >= len(policy)
        if state.written is None:
            attention = self._table.module(depth, policy[depth])
            shared = policy[depth + 1] == group[-1][depth + 1] and policy[: depth + 1] not in self._wanted
            if last or not shared:
                return _State(depth + 1, state.hidden, shell.attend(attention, batch, state.hidden))
            mlp = self._table.module(depth + 1, policy[depth + 1])
            return _State(depth + 2, shell.whole(attention, mlp, batch, state.hidden))
        hidden, written = state.hidden, state.written
        if last:  # behind the last attention, positions are independent of each other
            hidden, written = answers.rows(hidden).unsqueeze(0), answers.rows(written).unsqueeze(0)
        hidden = shell.finish(written, self._table.module(depth, policy[depth]), batch, hidden)
        return _State(depth + 1, hidden.squeeze(0) if last else hidden)

    def _deepest(self, batch: int, policy: Policy) -> Policy:
        """The longest prefix of a policy whose activations are kept."""
        ends = range(len(policy) - 1, 0, -1)
        return next((policy[:end] for end in ends if (batch, policy[:end]) in self._kept), ())

    def _resume(self, batch: int, prefix: Policy) -> _State:
        def load(part: Policy) -> Tensor:
            return self._stream.load(self._kept[batch, part] if part else self._start[batch])

        if len(prefix) % 2:
            return _State(len(prefix), load(prefix[:-1]), load(prefix))
        return _State(len(prefix), load(prefix))


def _branches(group: Sequence[Policy], depth: int) -> list[list[Policy]]:
    """Parts of sorted policies that share the level of one gene."""
    return [list(part) for _, part in groupby(group, key=lambda policy: policy[depth])]


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

    def whole(self, attention: Callable[..., Any], mlp: Callable[..., Any], batch: int, hidden: Tensor) -> Tensor:
        """The layer's output, ``(batch, seq, hidden)``.

        Args:
            attention: Runs in place of the layer's attention.
            mlp: Runs in place of its MLP.
            batch: Index of the batch in the stream.
            hidden: The layer's input, ``(batch, seq, hidden)``.
        """
        # Plain attributes: faster to exchange than registered modules, and functions can stand in for them.
        vars(self._shell).update(zip(self._names, (attention, mlp), strict=True))
        return self._stream.call(self._shell, self._position, batch, hidden)

    def attend(self, attention: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        """What the attention writes, ``(batch, seq, hidden)``; arguments as for `whole`."""

        def stop(*args: Any, **kwargs: Any) -> NoReturn:
            raise Reached(attention(*args, **kwargs)[0])

        try:
            self.whole(stop, nn.Identity(), batch, hidden)
        except Reached as reached:
            return reached.args[0]
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
        return self.whole(lambda *_args, **_kwargs: (written, None), mlp, batch, hidden)


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
        batch: A collated batch with ``labels``.
        columns: Columns of the positions that are run, see `without_unseen`.
        stream: Gives logits, and keeps the dense model's distributions where it keeps hidden states.

    Attributes:
        targets: The supervised tokens, ``(tokens,)``.
        count: Number of answers.
        dense: Log-probabilities of the dense model, ``(tokens, vocab)``, fp32; set by `remember`.
    """

    dense: Tensor

    def __init__(self, batch: Batch, columns: Tensor, stream: CalibrationStream) -> None:
        self._stream = stream
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

    def remember(self, rows: Tensor) -> None:
        """Take the model that gave these outputs of the last layer, ``(tokens, hidden)``, as the dense one."""
        found = [logits.log_softmax(-1) for _, logits in self._stream.logits(rows)]
        self.dense = self._stream.store(torch.cat(found))

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
        for _, logits, targets, answer, dense in self._stream.logits(rows, self.targets, self._answer, self.dense):
            found = logits.log_softmax(-1)
            sums[0] += nn.functional.nll_loss(found, targets, reduction="sum")
            sums[1] += nn.functional.kl_div(found, dense.to(found.device), reduction="sum", log_target=True)
            wrong.index_add_(0, answer, (found.argmax(-1) != targets).long())
        sums[2] = (wrong > 0).sum()
        return sums
