"""steerlens: find, read and apply the directions that instructions write into a language model's residual stream.

Names are imported when they are first used, so `import steerlens` is quick and loads no torch. No room has the name of a
public function: importing it would put it in the function's place.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerlens.checks.catalogue import format_instructions
    from steerlens.checks.registry import check, register_check
    from steerlens.data.families import keyword_pairs, length_pairs, sentence_count, sentence_pairs
    from steerlens.data.load import load_pairs
    from steerlens.data.pairs import InstructionPair, PairSet
    from steerlens.errors import DataError, ModelError, SteerlensError
    from steerlens.figures.report import write_report
    from steerlens.models.load import load_model
    from steerlens.models.prompts import PromptFormat
    from steerlens.stats.comparisons import bootstrap_mean, compare_conditions, holm, mcnemar
    from steerlens.stats.slopes import agreement, d_prime, sample_slopes, steerability_summary
    from steerlens.steering.candidates import Candidate, draws, grid
    from steerlens.steering.plan import Intervention, Plan
    from steerlens.steering.positions import Window
    from steerlens.steering.residual import steer
    from steerlens.steering.sampling import Generation, SamplingConfig, generate, stream
    from steerlens.study.calibration import calibrate
    from steerlens.study.config import RunConfig
    from steerlens.study.engines import ray_engine
    from steerlens.study.job import RunResult, run
    from steerlens.study.judge import Judge, Judgement, judge_frame
    from steerlens.study.quality import Quality
    from steerlens.study.scores import Evaluation, evaluate
    from steerlens.study.sweeps import Best, Sweep, sweep
    from steerlens.vectors.activations import ActivationMeans, Activations, record_activations, record_means
    from steerlens.vectors.estimators import MeanDifference, fit_steering_vector, fit_vectors
    from steerlens.vectors.transfer import RidgeMap, fit_ridge_map
    from steerlens.vectors.vector import SteeringVector

_HOME = {
    "checks.catalogue": ("format_instructions",),
    "checks.registry": (
        "check",
        "register_check",
    ),
    "data.families": (
        "keyword_pairs",
        "length_pairs",
        "sentence_count",
        "sentence_pairs",
    ),
    "data.load": ("load_pairs",),
    "data.pairs": (
        "InstructionPair",
        "PairSet",
    ),
    "errors": (
        "DataError",
        "ModelError",
        "SteerlensError",
    ),
    "figures.report": ("write_report",),
    "models.load": ("load_model",),
    "models.prompts": ("PromptFormat",),
    "stats.comparisons": (
        "bootstrap_mean",
        "compare_conditions",
        "holm",
        "mcnemar",
    ),
    "stats.slopes": (
        "agreement",
        "d_prime",
        "sample_slopes",
        "steerability_summary",
    ),
    "steering.candidates": (
        "Candidate",
        "draws",
        "grid",
    ),
    "steering.plan": (
        "Intervention",
        "Plan",
    ),
    "steering.positions": ("Window",),
    "steering.residual": ("steer",),
    "steering.sampling": (
        "Generation",
        "SamplingConfig",
        "generate",
        "stream",
    ),
    "study.calibration": ("calibrate",),
    "study.config": ("RunConfig",),
    "study.engines": ("ray_engine",),
    "study.job": (
        "RunResult",
        "run",
    ),
    "study.judge": (
        "Judge",
        "Judgement",
        "judge_frame",
    ),
    "study.quality": ("Quality",),
    "study.scores": (
        "Evaluation",
        "evaluate",
    ),
    "study.sweeps": (
        "Best",
        "Sweep",
        "sweep",
    ),
    "vectors.activations": (
        "ActivationMeans",
        "Activations",
        "record_activations",
        "record_means",
    ),
    "vectors.estimators": (
        "MeanDifference",
        "fit_steering_vector",
        "fit_vectors",
    ),
    "vectors.transfer": (
        "RidgeMap",
        "fit_ridge_map",
    ),
    "vectors.vector": ("SteeringVector",),
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
