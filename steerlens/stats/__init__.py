"""Arrays and tables only: rates with intervals, paired comparisons, slopes, Pareto fronts, words."""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens.stats.comparisons import (
        BootstrapMean as BootstrapMean,
        McNemar as McNemar,
        bootstrap_mean as bootstrap_mean,
        compare_cells as compare_cells,
        compare_conditions as compare_conditions,
        holm as holm,
        mcnemar as mcnemar,
        mean_intervals as mean_intervals,
        sign_flip as sign_flip,
        tango_interval as tango_interval,
    )
    from steerlens.stats.pareto import pareto_front as pareto_front
    from steerlens.stats.rates import (
        effective_n as effective_n,
        quality_table as quality_table,
        rate_table as rate_table,
        rates_and_quality as rates_and_quality,
        trial_spread as trial_spread,
        wilson_interval as wilson_interval,
    )
    from steerlens.stats.slopes import (
        Steerability as Steerability,
        agreement as agreement,
        d_prime as d_prime,
        pair_cosines as pair_cosines,
        sample_slopes as sample_slopes,
        steerability_summary as steerability_summary,
    )
    from steerlens.stats.words import distinct_n as distinct_n, repetition as repetition

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
