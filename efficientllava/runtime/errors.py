"""The two kinds of failure that a user sees; everything else is a bug and keeps its traceback."""

from __future__ import annotations

import errno
from collections.abc import Sequence


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
