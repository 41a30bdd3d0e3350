"""Pairs of a query with and without an instruction: bundled, from files, in families; and their splits."""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens.data.conditions import CONDITIONS as CONDITIONS
    from steerlens.data.families import (
        keyword_pairs as keyword_pairs,
        length_pairs as length_pairs,
        sentence_count as sentence_count,
        sentence_pairs as sentence_pairs,
    )
    from steerlens.data.load import bundled_queries as bundled_queries, load_pairs as load_pairs
    from steerlens.data.pairs import (
        InstructionPair as InstructionPair,
        PairSet as PairSet,
        contrast as contrast,
        pair_set as pair_set,
    )

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
