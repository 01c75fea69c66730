"""The kinds of failure that a user sees; everything else is a bug and keeps its traceback.

Numbers that are not finite are one of them, with a name: never a value that something is decided by.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class UserError(Exception):
    """A fault in configuration, paths, model folder or data: one line that names the fix.

    Attributes:
        exit_code: 2 while nothing has been done yet; the pipeline sets 1 once the first stage has begun.
    """

    exit_code = 2


class ConfigError(UserError):
    """All problems that were found before the first stage, raised once.

    Args:
        problems: One line each: key path, value, what is allowed, the fix.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no space left; safetensors and ``shutil`` say so in words only."""
    if isinstance(error, OSError) and error.errno:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error) for words in (f"(os error {errno.ENOSPC})", f"[Errno {errno.ENOSPC}]"))


def memory_full(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of a GPU or of the host."""
    kinds = {cls.__name__ for cls in type(error).__mro__}  # by name: torch is not imported for this
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """All that an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


CHUNK = 1 << 24  # elements that are counted at once


class NotFiniteError(UserError):
    """NaN or infinity among weights, statistics, scores, losses or logits."""


def require_finite(tensor: Tensor, what: str, fix: str = "") -> None:
    """Refuse a tensor that holds NaN or infinity; no copy of it is made.

    Args:
        tensor: Any; integers, empty tensors and those on the meta device pass.
        what: Start of the message: what it is and where, such as ``layers.3.mlp: the Gram matrix``.
        fix: End of the message: what the user can do.

    Raises:
        NotFiniteError: Says how many elements are NaN and how many infinite.
    """
    tensor = tensor.detach()
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return
    if all(end.isfinite() for end in tensor.aminmax()):  # NaN is passed on by both
        return
    chunks = tensor.flatten().split(CHUNK)
    nan = sum(int(chunk.isnan().sum()) for chunk in chunks)
    infinite = sum(int(chunk.isinf().sum()) for chunk in chunks)
    counts = " and ".join(f"{n:,} {kind}" for n, kind in ((nan, "NaN"), (infinite, "infinite")) if n)
    raise NotFiniteError(f"{what}: not finite, {counts} of {tensor.numel():,}" + (f"; {fix}" if fix else ""))
