"""steerlens: find, read and apply the directions that instructions write into a language model's residual stream.

Here are the names that a notebook needs; the rest is in the rooms, as `sl.stats.mcnemar` or `sl.study.run`. All are imported when
they are first used, so `import steerlens` is quick and loads no torch.
"""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens import (
        checks as checks,
        data as data,
        explorer as explorer,
        figures as figures,
        models as models,
        reading as reading,
        stats as stats,
        steering as steering,
        study as study,
        vectors as vectors,
    )
    from steerlens.checks.catalogue import format_instructions as format_instructions
    from steerlens.checks.registry import check as check, register_check as register_check
    from steerlens.data.families import (
        keyword_pairs as keyword_pairs,
        length_pairs as length_pairs,
        sentence_pairs as sentence_pairs,
    )
    from steerlens.data.load import load_pairs as load_pairs
    from steerlens.data.pairs import (
        InstructionPair as InstructionPair,
        PairSet as PairSet,
        contrast as contrast,
        pair_set as pair_set,
    )
    from steerlens.errors import DataError as DataError, ModelError as ModelError, SteerlensError as SteerlensError
    from steerlens.explorer.notebook import explore as explore
    from steerlens.models.load import load_model as load_model
    from steerlens.models.prompts import PromptFormat as PromptFormat
    from steerlens.reading.attention import attention_mass as attention_mass
    from steerlens.reading.embedding import embed as embed
    from steerlens.reading.lens import prompt_lens as prompt_lens
    from steerlens.reading.similarity import cosines as cosines
    from steerlens.reading.vocabulary import logit_lens as logit_lens
    from steerlens.steering.attention import instaboost as instaboost, pasta as pasta, spotlight as spotlight
    from steerlens.steering.candidates import grid as grid
    from steerlens.steering.directer import directer as directer, plausible as plausible
    from steerlens.steering.edits import steer as steer
    from steerlens.steering.generations import Generations as Generations
    from steerlens.steering.plan import Plan as Plan
    from steerlens.steering.positions import Window as Window
    from steerlens.steering.sampling import generate as generate
    from steerlens.study.calibration import calibrate as calibrate
    from steerlens.study.profiling import profile_heads as profile_heads
    from steerlens.study.quality import Quality as Quality
    from steerlens.study.scores import Evaluation as Evaluation, evaluate as evaluate
    from steerlens.study.sweeps import Sweep as Sweep, sweep as sweep
    from steerlens.vectors.activations import Activations as Activations, record_activations as record_activations
    from steerlens.vectors.estimators import fit_steering_vector as fit_steering_vector, fit_vectors as fit_vectors
    from steerlens.vectors.vector import SteeringVector as SteeringVector

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
