"""Was an instruction followed? The catalogue of instructions, IFEval's checks offline, and checks of one's own."""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens.checks.catalogue import (
        Instruction as Instruction,
        format_instructions as format_instructions,
        language_instructions as language_instructions,
    )
    from steerlens.checks.registry import (
        CheckResult as CheckResult,
        check as check,
        check_all as check_all,
        instruction_types as instruction_types,
        register_check as register_check,
    )
    from steerlens.checks.text import sentence_splitter as sentence_splitter

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
