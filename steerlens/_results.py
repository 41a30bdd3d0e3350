"""What a reading of a model returns: a tidy frame that knows its picture."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import plotly.graph_objects as go


MISSING = "\u2013"


@dataclass(frozen=True, eq=False)
class Result:
    """Rows of a tidy frame; each kind of result says what they are and draws them.

    >>> len(Result(pd.DataFrame({"layer": [1, 2]})))
    2
    """

    table: pd.DataFrame
    """One row per number, or per few numbers that belong together."""

    def to_frame(self) -> pd.DataFrame:
        """The table as a frame of the caller's own."""
        return self.table.copy()

    def plot(self, **options: Any) -> "go.Figure":
        """The picture of this result; options are those of the figure's function, such as `title`."""
        raise NotImplementedError(f"{type(self).__name__} has no picture")

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.table.itertuples(index=False, name="Row"))

    def _repr_html_(self) -> str:
        # Of what is missing, pandas writes only nan as it is told to.
        cells = self.table.astype(object).where(self.table.notna(), np.nan)
        table = cells.to_html(index=False, max_rows=24, formatters=dict.fromkeys(cells, _seen), na_rep=MISSING)
        return f'<p style="white-space: pre-line">{html.escape(repr(self))}</p>{table}'

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows: {', '.join(map(str, self.table.columns))})"


def _seen(value: Any) -> str:
    """What stands in a cell: a token in quotation marks where its spaces and breaks would not be seen."""
    if not isinstance(value, str):
        return f"{value:.3f}" if isinstance(value, float | np.floating) else str(value)
    return value if value.isprintable() and value == value.strip() else repr(value)
