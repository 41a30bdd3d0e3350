"""Pareto fronts: the rows of a table that no other row beats in one column without losing in another.

    row i dominates row j:  v_ik >= v_jk in every column k, and v_ik > v_jk in one      (signs turned where less is better)

Rates are noisy, and of many rows the luckiest stand on the front: their values are too good to be seen again on new prompts.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from steerlens.errors import SteerlensError
from steerlens.stats.rates import require_columns


def pareto_front(frame: pd.DataFrame, *, maximize: Sequence[str] = (), minimize: Sequence[str] = ()) -> pd.DataFrame:
    """The rows that no other row dominates: at least as good in every column, and better in one.

    Equal rows stay together; rows with a missing value are left out.

    Args:
        maximize, minimize: Columns, at least one in all.

    Returns:
        The rows as they stand in the frame, in its order.

    Raises:
        SteerlensError: if no column is named.

    >>> table = pd.DataFrame({"rate": [0.2, 0.5, 0.4], "cost": [1, 2, 3]})
    >>> pareto_front(table, maximize=["rate"], minimize=["cost"])["rate"].tolist()
    [0.2, 0.5]
    """
    columns = [*maximize, *minimize]
    if not columns:
        raise SteerlensError("a Pareto front needs a column to maximize or to minimize, got none")
    require_columns(frame, columns, what="the table")
    kept = frame.dropna(subset=columns)
    values = kept[columns].to_numpy(dtype=float) * np.array([1.0] * len(maximize) + [-1.0] * len(minimize))
    # [i, j]: row i beside row j.
    as_good = (values[:, None] >= values[None]).all(-1)
    better = (values[:, None] > values[None]).any(-1)
    dominated = (as_good & better).any(0)
    front: pd.DataFrame = kept[~dominated]
    return front
