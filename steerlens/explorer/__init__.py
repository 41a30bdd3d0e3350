"""Vectors at one's fingertips, in a notebook: what each says, what it makes a model say, and how likely that was before."""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens.explorer.notebook import explore as explore
    from steerlens.explorer.runs import Explorer as Explorer, Lens as Lens, Said as Said, Side as Side, View as View
    from steerlens.explorer.settings import Settings as Settings
    from steerlens.explorer.verdicts import Verdict as Verdict

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
