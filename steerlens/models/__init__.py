"""Loading models, what is asked of them, and how prompts become rows of tokens that are run."""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens.models.choice import backend_used as backend_used, use_backend as use_backend
    from steerlens.models.facts import model_facts as model_facts
    from steerlens.models.load import load_model as load_model
    from steerlens.models.passes import Read as Read, run_pass as run_pass
    from steerlens.models.probe import abilities as abilities
    from steerlens.models.prompts import PromptFormat as PromptFormat, encode as encode, token_span as token_span
    from steerlens.models.rows import Rows as Rows, pad as pad, pair_rows as pair_rows

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
