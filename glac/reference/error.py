"""The one error measure of this project: ``|actual - expected| / |expected|``, Frobenius norms."""

from __future__ import annotations

import math

from torch import Tensor

from glac.errors import InputError


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Relative root-mean-square error of ``actual``, computed in fp64.

    Args:
        actual: Any floating tensor.
        expected: The truth, same shape; it may have another dtype and live on another device.

    Returns:
        ``norm(actual - expected) / norm(expected)``: nan if anything is nan, 0 if both norms are
        zero, inf if only the expected norm is zero.

    Raises:
        InputError: The shapes differ.
    """
    if actual.shape != expected.shape:
        raise InputError(
            f"actual must have the shape of expected, {tuple(expected.shape)}, "
            f"got {tuple(actual.shape)}"
        )
    truth = expected.detach().double()
    difference = float((actual.detach().to(truth.device).double() - truth).norm())
    size = float(truth.norm())
    if size == 0.0:
        return 0.0 if difference == 0.0 else difference * math.inf
    return difference / size
