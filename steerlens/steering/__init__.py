"""What is done to a residual stream, where and when; and sampling text while it is done."""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens.steering.attention import instaboost as instaboost, pasta as pasta, spotlight as spotlight
    from steerlens.steering.candidates import Candidate as Candidate, draws as draws, grid as grid
    from steerlens.steering.directer import plausible as plausible, sensitivities as sensitivities
    from steerlens.steering.edits import steer as steer
    from steerlens.steering.gates import Gate as Gate, GatedToken as GatedToken, gate_stats as gate_stats
    from steerlens.steering.generations import Generation as Generation, Generations as Generations, Token as Token
    from steerlens.steering.interventions import (
        AttentionIntervention as AttentionIntervention,
        Intervention as Intervention,
    )
    from steerlens.steering.operators import ablate as ablate, add as add, set_projection as set_projection
    from steerlens.steering.plan import Plan as Plan
    from steerlens.steering.positions import Window as Window
    from steerlens.steering.sampling import (
        generate as generate,
        stream as stream,
        stream_tokens as stream_tokens,
    )
    from steerlens.steering.scores import bind as bind
    from steerlens.steering.settings import SamplingConfig as SamplingConfig

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
