"""steerlens: find, read and apply the directions that instructions write into a language model's residual stream.

Names are imported when they are first used, so `import steerlens` is quick and loads no torch. No module has the name of a
public function: importing such a module would put it in the function's place.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerlens.calibration import calibrate
    from steerlens.candidates import Candidate, draws, grid
    from steerlens.capture import ActivationMeans, Activations, record_activations, record_means
    from steerlens.comparisons import bootstrap_mean, compare_conditions, holm, mcnemar
    from steerlens.data import InstructionPair, PairSet, load_pairs
    from steerlens.engines import ray_engine
    from steerlens.errors import DataError, ModelError, SteerlensError
    from steerlens.estimators import MeanDifference, fit_steering_vector, fit_vectors
    from steerlens.evaluation import Evaluation, evaluate
    from steerlens.families import keyword_pairs, length_pairs, sentence_count, sentence_pairs
    from steerlens.instructions import check, format_instructions, register_check
    from steerlens.job import RunResult, run
    from steerlens.judge import Judge, Judgement, judge_frame
    from steerlens.model import load_model
    from steerlens.plan import Intervention, Plan
    from steerlens.positions import Window
    from steerlens.prompts import PromptFormat
    from steerlens.quality import Quality
    from steerlens.records import RunConfig
    from steerlens.report import write_report
    from steerlens.sampling import Generation, SamplingConfig, generate, stream
    from steerlens.steerability import agreement, d_prime, sample_slopes, steerability_summary
    from steerlens.steering import steer
    from steerlens.sweeps import Best, Sweep, sweep
    from steerlens.transfer import RidgeMap, fit_ridge_map
    from steerlens.vectors import SteeringVector

_HOME = {
    "calibration": ("calibrate",),
    "candidates": ("Candidate", "draws", "grid"),
    "capture": ("ActivationMeans", "Activations", "record_activations", "record_means"),
    "comparisons": ("bootstrap_mean", "compare_conditions", "holm", "mcnemar"),
    "data": ("InstructionPair", "PairSet", "load_pairs"),
    "errors": ("DataError", "ModelError", "SteerlensError"),
    "engines": ("ray_engine",),
    "estimators": ("MeanDifference", "fit_steering_vector", "fit_vectors"),
    "evaluation": ("Evaluation", "evaluate"),
    "sampling": ("Generation", "SamplingConfig", "generate", "stream"),
    "families": ("keyword_pairs", "length_pairs", "sentence_count", "sentence_pairs"),
    "instructions": ("check", "format_instructions", "register_check"),
    "judge": ("Judge", "Judgement", "judge_frame"),
    "model": ("load_model",),
    "plan": ("Intervention", "Plan"),
    "positions": ("Window",),
    "prompts": ("PromptFormat",),
    "quality": ("Quality",),
    "records": ("RunConfig",),
    "report": ("write_report",),
    "job": ("RunResult", "run"),
    "steerability": ("agreement", "d_prime", "sample_slopes", "steerability_summary"),
    "steering": ("steer",),
    "sweeps": ("Best", "Sweep", "sweep"),
    "transfer": ("RidgeMap", "fit_ridge_map"),
    "vectors": ("SteeringVector",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'steerlens' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"steerlens.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
