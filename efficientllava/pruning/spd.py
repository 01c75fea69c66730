"""Symmetric positive definite systems: equilibrated Cholesky factors, and a check of every one of them.

LU decomposition (`torch.linalg.solve`) plays no part: batched on the CPU it returns garbage from 160 unknowns on
(torch 2.13 with several threads). Every factor and every inverse is compared with the matrix that it came from on a
random vector, so that a wrong one is an error and never a ranking.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.errors import UserError

DAMPING = 0.3  # where nothing says better; of 0.01 to 3 the best on SmolLM2-135M (experiments/real_weights)
# Largest relative error of what a factor gives back of a random vector.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


class UnsolvedError(UserError):
    """A system of equations of the calibration statistics has no trustworthy solution."""

    exit_code = 1


def damping_of(gram: Tensor, damping: float) -> Tensor:
    """What is added to the diagonal of a Gram matrix: a share of each channel's own power.

    One channel with a massive activation then does not decide how much the others are damped.

    Args:
        gram: ``E[x x^T]``, ``(n, n)``.
        damping: Share of the diagonal, > 0.

    Returns:
        ``(n,)``, > 0 also where a channel is dead.
    """
    diagonal = gram.diagonal()
    floor = max(float(diagonal.mean()) * 1e-6, torch.finfo(torch.float32).tiny)
    return damping * diagonal.clamp(min=floor)


def factorise(gram: Tensor, shift: Tensor, what: str) -> Tensor:
    """Cholesky factor of a damped Gram matrix, in the matrix's own memory.

    Args:
        gram: Symmetric ``(n, n)``; used up.
        shift: What is added to its diagonal, see `damping_of`.
        what: Layer and component, for the error.

    Returns:
        Lower factor ``L`` with ``L L^T = gram + diag(shift)``.

    Raises:
        UnsolvedError: The damped matrix is not finite or not positive definite.
    """
    gram.diagonal().add_(shift)
    probe = _probe(gram)
    image = gram @ probe
    # Equilibrated to a diagonal of ones: channels of very different power do not cost digits.
    scale = gram.diagonal().sqrt()
    if not bool(torch.isfinite(scale).all()):
        raise UnsolvedError(f"{what}: the statistics of its inputs are not finite")
    gram.div_(scale).div_(scale.unsqueeze(1))
    lower = gram.T  # symmetric; LAPACK works in place on column-major memory only
    try:
        lower = torch.linalg.cholesky(lower, out=lower)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise UnsolvedError(
            f"{what}: the damped Gram matrix of its inputs is not positive definite; check that the calibration "
            "records are finite and differ from each other"
        ) from error
    lower.mul_(scale.unsqueeze(1))
    _require(lower @ (lower.T @ probe), image, f"{what}: Cholesky factor")
    return lower


def invert(lower: Tensor, what: str) -> Tensor:
    """Inverse of ``L L^T``, in the factor's own memory.

    Args:
        lower: Lower factor; used up.
        what: Layer and component, for the error.

    Raises:
        UnsolvedError: The inverse does not give a vector back.
    """
    probe = _probe(lower)
    image = lower @ (lower.T @ probe)
    inverse = torch.cholesky_inverse(lower, out=lower)
    _require(inverse @ image, probe, f"{what}: inverse")
    return inverse


def divide(rows: Tensor, lower: Tensor, what: str) -> float:
    """Turn ``rows`` into ``rows (L L^T)^-1``, in their own memory.

    Args:
        rows: ``(m, n)``; changed.
        lower: Lower factor ``L``, ``(n, n)``.
        what: Layer and component, for the error.

    Returns:
        Inner product of the result with what ``rows`` were.

    Raises:
        UnsolvedError: The solution does not solve the system.
    """
    probe = _probe(rows.T)
    wanted = probe @ rows
    torch.linalg.solve_triangular(lower, rows.T, upper=False, out=rows.T)
    inner = float(torch.linalg.vector_norm(rows)) ** 2
    torch.linalg.solve_triangular(lower.T, rows.T, upper=True, out=rows.T)
    _require(lower @ (lower.T @ (probe @ rows)), wanted, f"{what}: least-squares solution")
    return inner


def inverts(inverse: Tensor, gram: Tensor, shift: Tensor, places: Tensor) -> bool:
    """Whether a matrix is the inverse of ``(gram + diag(shift))`` restricted to ``places``.

    Args:
        inverse: ``(len(places), len(places))``.
        gram: ``(n, n)``.
        shift: ``(n,)``.
        places: Rows and columns of ``gram``.
    """
    if not len(places):
        return True
    probe = _probe(inverse)
    spread = gram.new_zeros(len(gram))
    spread[places] = probe
    image = (gram @ spread + shift * spread)[places]
    return _error(inverse @ image, probe) <= TOLERANCE[inverse.dtype]


def _probe(matrix: Tensor) -> Tensor:
    """A fixed random vector for the columns of a matrix."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64).to(matrix)


def _error(found: Tensor, wanted: Tensor) -> float:
    error = float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted).clamp(min=1e-30))
    return error if error == error else float("inf")


def _require(found: Tensor, wanted: Tensor, what: str) -> None:
    error = _error(found, wanted)
    if error > TOLERANCE[found.dtype]:
        raise UnsolvedError(f"{what} is wrong (relative residual {error:.1e}); report this with your torch version")
