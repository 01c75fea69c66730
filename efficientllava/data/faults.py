"""What is said of records that cannot be used, and how many may be."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..errors import UserError

log = logging.getLogger(__name__)


def report_bad(where: str, bad: Sequence[str], total: int, max_bad_fraction: float, hint: str = "") -> None:
    """Warn about corrupt records, or fail if there are too many.

    Args:
        where: The file, for the message.
        bad: One reason per corrupt record.
        total: Number of records, corrupt ones included.
        max_bad_fraction: Share of corrupt records that is tolerated, in [0, 1).
        hint: What else a user should know.

    Raises:
        UserError: If more are corrupt than tolerated, or nothing is left.
    """
    if not total:
        raise UserError(f"{where}: holds no record; give a non-empty list of conversations")
    if not bad:
        return
    found = f"{where}: {len(bad)} of {total} records are corrupt, the first: {bad[0]}"
    if len(bad) > max_bad_fraction * total or len(bad) == total:
        allowed = f"data.max_bad_fraction allows {max_bad_fraction:g}"
        raise UserError(f"{found}; {allowed}; repair the data or raise it{hint}")
    log.warning("%s; they are left out", found)
