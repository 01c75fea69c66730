"""A model of ours behind the interface that lmms-eval asks."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.utils import simple_parse_args_string  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import nn

from ...checkpoint.folder import load
from ...data.collator import GenerationCollator
from ...data.records import Record, Turn, rgb
from ...data.table import in_place
from ...models.forward import FeatureCache, to_device
from ...runtime import UserError
from ..generation import generate

LONGEST = 1024  # tokens of an answer where a task sets no limit, as in lmms-eval's wrappers


class EfficientLLaVA(lmms):
    """Greedy answers in left-padded batches, one vision pass per image; the first failure ends the evaluation.

    Args:
        model: An image-text-to-text model in eval mode.
        processor: Its processor.
        batch_size: Questions per generate call, >= 1.
        cache: From `FeatureCache`; None makes one.
        max_new_tokens: Longest answer; None: as the task says.

    Attributes:
        exits: Whether a failure ends the process: lmms-eval's command would report it and exit with 0.
    """

    is_simple = True
    exits = False

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        batch_size: int = 1,
        cache: FeatureCache | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self._model, self._processor, self.batch_size, self._limit = model, processor, batch_size, max_new_tokens
        self._cache, self._prompts = cache or FeatureCache(model), GenerationCollator(processor)
        self.device = next(model.parameters()).device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> EfficientLLaVA:
        """Load what ``--model_args`` describes.

        Args:
            arg_string: ``pretrained=<folder or hub id>``, and at will ``dtype``, ``revision``, ``protocol``,
                ``max_new_tokens``; see `efficientllava.checkpoint.folder.load`.
            additional_config: ``batch_size`` and ``device`` from the command line.

        Raises:
            SystemExit: An argument is missing or unknown, or the checkpoint cannot be loaded.
        """
        with _exiting(True):
            options = {**(additional_config or {}), **simple_parse_args_string(arg_string)}
            options.pop("max_batch_size", None)
            local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
            path, device = options.pop("pretrained", None), str(options.pop("device", None) or local)
            batch_size, limit = options.pop("batch_size", None) or 1, options.pop("max_new_tokens", None)
            unknown = sorted({*options} - {"dtype", "revision", "protocol"})
            if path is None or unknown or not str(batch_size).isdecimal():
                raise UserError(
                    "--model_args: must be pretrained=<folder>, and at will dtype, revision, protocol, device, "
                    f"max_new_tokens (got also: {', '.join(unknown) or 'nothing'}); --batch_size: a number"
                )
            checkpoint = load(str(path), device=device, **options)
            made = cls(checkpoint.model, checkpoint.processor, int(batch_size), None, limit)
            made.exits = True
            return made

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests.

        Args:
            requests: Instances of lmms-eval; their arguments are the text, the generation's settings, how to get the
                images of a document, the document's number, its task and split.

        Returns:
            One answer per request, in their order.

        Raises:
            UserError: A task wants samples, beams, or something else than images.
        """
        with _exiting(self.exits):
            return self._answers(requests)

    def _answers(self, requests: Sequence[Any]) -> list[str]:
        answers = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(index)
        for (longest, stop), members in groups.items():
            order = sorted(members, key=lambda index: len(requests[index].args[0]), reverse=True)
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                texts = self._answer([requests[index].args for index in batch], longest, stop)
                for index, text in zip(batch, texts, strict=True):
                    answers[index] = text
        return answers

    def _settings(self, wanted: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        if (wanted.get("temperature") or 0) > 0 or (wanted.get("num_beams") or 1) > 1:
            raise UserError(f"lmms-eval: the task wants {wanted}; only greedy decoding is supported")
        stop = wanted.get("until") or ()
        # lmms-eval puts an empty line where a task names no end, which its own wrappers do not obey either.
        stop = tuple(mark for mark in ([stop] if isinstance(stop, str) else stop) if mark.strip())
        return int(self._limit or wanted.get("max_new_tokens") or LONGEST), stop

    def _answer(self, asked: Sequence[tuple[Any, ...]], longest: int, stop: Sequence[str]) -> list[str]:
        batch = to_device(self._prompts([self._record(*arguments) for arguments in asked]), self.device)
        return generate(self._model, self._processor.tokenizer, batch, self._cache(batch), longest, stop)

    def _record(self, text: Any, _settings: Any, visuals: Any, number: int, task: str, split: str) -> Record:
        images = visuals(self.task_dict[task][split][number]) or []
        if not all(isinstance(image, Image.Image) for image in images):
            kinds = ", ".join(sorted({type(image).__name__ for image in images}))
            raise UserError(f"lmms-eval: task {task} shows {kinds}; only images are supported")
        shown = [rgb(image) for image in images]
        question, places = in_place(str(text))
        # Of one image, and where the tags do not fit the images, the template decides: all stand before the question.
        placed = 1 < len(shown) == len(places)
        turn = Turn(question if placed else question.strip(), "", images_at=tuple(places) if placed else ())
        first, more = (shown[0], tuple(shown[1:])) if shown else (None, ())
        return Record(f"{task}/{split}/{number}", first, (turn,), True, "lmms_eval", more)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise UserError("lmms-eval: tasks of several rounds are not supported; choose others")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse tasks that compare likelihoods."""
        raise UserError("lmms-eval: tasks that compare likelihoods are not supported; choose others")


@contextmanager
def _exiting(wanted: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not wanted:
            raise
        if not isinstance(error, UserError):
            traceback.print_exc()
        raise SystemExit(f"error: {type(error).__name__}: {error}") from error
