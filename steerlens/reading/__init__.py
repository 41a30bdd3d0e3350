"""What a direction is: what it says in the vocabulary, how directions lie, where the model needs them, and who writes them."""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens.reading.attention import AttentionMass as AttentionMass, attention_mass as attention_mass
    from steerlens.reading.attribution import Attribution as Attribution, attribute as attribute
    from steerlens.reading.diagnosis import Diagnosis as Diagnosis, diagnose as diagnose
    from steerlens.reading.effects import VectorEffects as VectorEffects, vector_effects as vector_effects
    from steerlens.reading.embedding import Embedding as Embedding, embed as embed
    from steerlens.reading.gating import gate_table as gate_table
    from steerlens.reading.lens import PromptLens as PromptLens, prompt_lens as prompt_lens
    from steerlens.reading.lines import Line as Line, line as line
    from steerlens.reading.patching import PatchingMap as PatchingMap, patch as patch
    from steerlens.reading.probes import Separability as Separability, separability as separability
    from steerlens.reading.similarity import Cosines as Cosines, cosines as cosines, layer_cosines as layer_cosines
    from steerlens.reading.vocabulary import VocabularyLens as VocabularyLens, logit_lens as logit_lens

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
