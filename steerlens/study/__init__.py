"""Does it work, against controls? Responses, scores, quality, sweeps, engines, and the whole job."""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens.study.arms import LayerStudy as LayerStudy
    from steerlens.study.calibration import calibrate as calibrate
    from steerlens.study.config import RunConfig as RunConfig, SweepConfig as SweepConfig
    from steerlens.study.engines import ray_engine as ray_engine
    from steerlens.study.job import RunResult as RunResult, run as run, run_sweep as run_sweep
    from steerlens.study.judge import Judge as Judge, Judgement as Judgement, judge_frame as judge_frame
    from steerlens.study.layers import (
        necessity as necessity,
        steer_by_layer as steer_by_layer,
        transfer_between_layers as transfer_between_layers,
    )
    from steerlens.study.methods import (
        MethodComparison as MethodComparison,
        Setting as Setting,
        compare_methods as compare_methods,
        measure_speed as measure_speed,
        swept as swept,
    )
    from steerlens.study.opened import look_at as look_at
    from steerlens.study.profiling import HeadProfile as HeadProfile, profile_heads as profile_heads
    from steerlens.study.quality import Quality as Quality
    from steerlens.study.responses import Sampler as Sampler, requests_for as requests_for
    from steerlens.study.scores import Evaluation as Evaluation, evaluate as evaluate, score as score
    from steerlens.study.seeing import (
        Subject as Subject,
        see_geometry as see_geometry,
        see_layers as see_layers,
        see_lens as see_lens,
    )
    from steerlens.study.sweeps import (
        Best as Best,
        Sweep as Sweep,
        candidate_layers as candidate_layers,
        sweep as sweep,
    )
    from steerlens.study.written import by_strength as by_strength, method as method

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
