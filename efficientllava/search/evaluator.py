"""Risk of many policies at once: candidates are assembled from a level table, and run what they share only once.

The policies of a call are ordered as a prefix tree over genes: the attention of a layer is a node, its MLP is the next.
The tree is walked depth first, batch by batch, so that only the activations of the current path are held; those on the
paths of chosen policies (the parents of the next generation) are kept for later calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.anatomy import decoder_of, layers_of
from ..pruning.statistics import CalibrationStream
from ..runtime import processes
from ..runtime.errors import UserError
from .candidate import Answers, LayerShell, without_unseen
from .evolution import Risk
from .space import Gene, Policy


class Components(Protocol):
    """What the evaluator needs of a level table."""

    @property
    def genes(self) -> Sequence[Gene]:
        """Attention and MLP of every layer, in order."""
        ...

    def module(self, gene: int, level: int) -> nn.Module:
        """The component at a level, ready to be called in place of the model's own."""
        ...


@dataclass(frozen=True)
class _State:
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
        self, model: nn.Module, table: Components, stream: CalibrationStream, keep_bytes: int = 2 << 30
    ) -> None:
        image_token_id = model.config.image_token_id  # pyright: ignore[reportAttributeAccessIssue]
        short, columns = zip(*(without_unseen(b, image_token_id) for b in stream.batches), strict=True)  # pyright: ignore[reportArgumentType]
        self._table, self._keep_bytes = table, keep_bytes
        self._stream = stream.over(short)
        self._shells = [LayerShell(self._stream, layer, i) for i, layer in enumerate(layers_of(model))]
        self.answers = [
            Answers(model, batch, kept, self._stream) for batch, kept in zip(stream.batches, columns, strict=True)
        ]
        if not sum(answers.count for answers in self.answers):
            raise UserError("search: the samples have no answer to score; pass records with answers")
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
            sums += answers.measure(rows).cpu()
        return self._risk(sums, range(len(self.answers)))

    def _risk(self, sums: Tensor, batches: Iterable[int]) -> Risk:
        counts = [(len(self.answers[b].targets), self.answers[b].count) for b in batches]
        tokens, answers = (max(sum(column), 1) for column in zip(*counts, strict=True))
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
                sums[policy] = sums[policy].to(values.device) + values
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
        pending = [
            (self._resume(batch, prefix), part)
            for prefix, group in _grouped(policies, lambda policy: self._deepest(batch, policy))
            for part in _branches(group, len(prefix))
        ]
        while pending:
            state, group = pending.pop()
            state = self._step(batch, state, group)
            if state.depth == len(self._table.genes):
                yield group[0], self.answers[batch].measure(state.hidden)
                continue
            self._retain(batch, group[0][: state.depth], state)
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

    def _retain(self, batch: int, prefix: Policy, state: _State) -> None:
        if prefix in self._wanted:
            self._kept[batch, prefix] = self._stream.store(state.hidden if state.written is None else state.written)


def _grouped(policies: Sequence[Policy], key: Callable[[Policy], Policy]) -> list[tuple[Policy, list[Policy]]]:
    groups: dict[Policy, list[Policy]] = {}
    for policy in policies:
        groups.setdefault(key(policy), []).append(policy)
    return list(groups.items())


def _branches(group: Sequence[Policy], depth: int) -> list[list[Policy]]:
    """Parts of sorted policies that share the level of one gene."""
    return [list(part) for _, part in groupby(group, key=lambda policy: policy[depth])]
