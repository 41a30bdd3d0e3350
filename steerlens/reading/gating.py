"""What a gate made of every token, as a table: the model's own tokens, what steering proposed instead, and what was taken."""

from typing import Any

import pandas as pd

from steerlens.errors import SteerlensError
from steerlens.reading.words import written
from steerlens.steering.generations import Generations

COLUMNS = (
    "row", "prompt", "position", "token", "outcome", "strength", "n_layers", "n_trials", "proposed", "raw", "p_proposed", "p_raw",
)  # fmt: skip


def gate_table(model: Any, generations: Generations) -> pd.DataFrame:
    """One row for each new token of texts that were generated under a gate; texts without one have no rows.

    Args:
        model: The model that generated them, for its tokenizer.
        generations: What `generate` returned under `directer` or `plausible`.

    Returns:
        Columns row (the text's place), prompt, position (0 for the first new token), token, outcome, strength, n_layers,
        n_trials, proposed (empty where steering was not tried), raw, p_proposed (missing there), p_raw; see
        `steering.gates.GatedToken`. Tokens are written as within a text, with their spaces.

    Raises:
        SteerlensError: if no text was generated under a gate.

    Example:
        >>> plan = sl.directer(on="Use capitals.")
        >>> out = sl.generate(model, ["Describe rain. Use capitals."], steering=plan, max_new_tokens=3)
        >>> gate_table(model, out)["position"].tolist()
        [0, 1, 2]
    """
    steps = [
        (place, generations.prompts[place], position, token, step)
        for place, row in enumerate(generations)
        for position, (token, step) in enumerate(zip(row.tokens, row.gated, strict=bool(row.gated)))
    ]
    if not steps:
        raise SteerlensError(
            f"a table of gates needs texts that were generated under one, got {len(generations)} without; steer with "
            "directer() or plausible(plan)"
        )
    ids = sorted({one for *_, token, step in steps for one in (token, step.raw, step.proposed) if one is not None})
    texts: dict[int | None, str] = {None: "", **dict(zip(ids, written(model, ids), strict=True))}
    values = [
        (
            place, prompt, position, texts[token], step.outcome, step.strength, step.n_layers, step.n_trials,
            texts[step.proposed], texts[step.raw], step.p_proposed, step.p_raw,
        )
        for place, prompt, position, token, step in steps
    ]  # fmt: skip
    return pd.DataFrame(values, columns=list(COLUMNS))
