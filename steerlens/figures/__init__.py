"""Pictures of tidy frames, and the one-page report. Nothing here runs a model or imports torch."""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens.figures.attention import (
        attention_mass_by_layer as attention_mass_by_layer,
        attention_mass_map as attention_mass_map,
        head_profile_map as head_profile_map,
    )
    from steerlens.figures.cells import four_cells as four_cells
    from steerlens.figures.effects import effect_curves as effect_curves
    from steerlens.figures.gates import active_layers as active_layers, gated_text as gated_text
    from steerlens.figures.geometry import embedding_scatter as embedding_scatter, line_scatter as line_scatter
    from steerlens.figures.layers import coeff_curve as coeff_curve, layer_curve as layer_curve
    from steerlens.figures.lens import lens_heatmap as lens_heatmap
    from steerlens.figures.matrices import cosine_heatmap as cosine_heatmap, transfer_matrix as transfer_matrix
    from steerlens.figures.measures import measure_curves as measure_curves, projection_profiles as projection_profiles
    from steerlens.figures.methods import (
        instruction_strength_heatmap as instruction_strength_heatmap,
        method_comparison as method_comparison,
    )
    from steerlens.figures.patching import attribution_map as attribution_map, patching_map as patching_map
    from steerlens.figures.report import write_report as write_report
    from steerlens.figures.studies import (
        necessity_by_layer as necessity_by_layer,
        steering_by_layer as steering_by_layer,
    )
    from steerlens.figures.tokens import token_table as token_table

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
