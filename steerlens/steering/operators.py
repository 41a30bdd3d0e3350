"""Steering operators: what happens to a residual stream at one site.

With `u` a unit direction and `h` a residual,

    add             h + c * u                      (contrastive addition; length and keyword steering of the paper)
    set_projection  h + c * (z - h.u) * u          (with c = 1 the projection h.u becomes z; Stolfo et al. 2025, Eq. 2)
    ablate          h - c * (h.u) * u              (with c = 1 the component along u is removed)

All three are one rank-one affine map, `h + (offset + slope * (h . read)) * write`, with `read = write = u`: that is the form
in which many rows of a batch, each with its own operator, are steered by one expression. A different `write` direction gives
the placebo of equal norm: the same amount at every token, written along a random direction.

The change is computed in float32 and added in the residual's own dtype. `c = 0` gives offset and slope zero, so `h` comes
back bit for bit. These functions say nothing about where or when; see `positions` and `plan`.
"""

from jaxtyping import Float
from torch import Tensor

from steerlens._typing import Operator


def add(
    resid: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"], *, coeff: float
) -> Float[Tensor, "*batch d_model"]:
    """The residual moved by `coeff`, in absolute units, along the unit `direction`.

    >>> import torch
    >>> add(torch.zeros(2), torch.tensor([0.0, 1.0]), coeff=3.0)
    tensor([0., 3.])
    """
    return rank_one(resid, direction, direction, *affine("add", coeff=coeff))


def set_projection(
    resid: Float[Tensor, "*batch d_model"],
    direction: Float[Tensor, " d_model"],
    *,
    target: float,
    coeff: float = 1.0,
) -> Float[Tensor, "*batch d_model"]:
    """The residual whose projection on the unit `direction` moved `coeff` of the way to `target`.

    >>> import torch
    >>> set_projection(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), target=5.0)
    tensor([1., 5.])
    """
    return rank_one(resid, direction, direction, *affine("set_projection", coeff=coeff, target=target))


def ablate(
    resid: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"], *, coeff: float = 1.0
) -> Float[Tensor, "*batch d_model"]:
    """The residual without `coeff` of its component along the unit `direction`.

    >>> import torch
    >>> ablate(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    tensor([1., 0.])
    """
    return rank_one(resid, direction, direction, *affine("ablate", coeff=coeff))


def affine(operator: Operator, *, coeff: float, target: float = 0.0) -> tuple[float, float]:
    """The (offset, slope) with which `rank_one` performs an operator."""
    match operator:
        case "add":
            return coeff, 0.0
        case "set_projection":
            return coeff * target, -coeff
        case "ablate":
            return 0.0, -coeff


def rank_one(
    resid: Float[Tensor, "*batch d_model"],
    read: Float[Tensor, "*#batch d_model"],
    write: Float[Tensor, "*#batch d_model"],
    offset: float | Float[Tensor, "*#batch"],
    slope: float | Float[Tensor, "*#batch"],
) -> Float[Tensor, "*batch d_model"]:
    """`resid + (offset + slope * (resid . read)) * write`; offset and slope may differ by row and position."""
    projection = (resid.float() * read).sum(-1)
    amount = offset + slope * projection
    return resid + (amount[..., None] * write).to(resid.dtype)
