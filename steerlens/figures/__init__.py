"""Pictures of tidy frames, and the one-page report. Nothing here runs a model or imports torch."""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens.figures.cells import four_cells as four_cells
    from steerlens.figures.layers import layer_curve as layer_curve
    from steerlens.figures.matrices import cosine_heatmap as cosine_heatmap
    from steerlens.figures.report import write_report as write_report

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
