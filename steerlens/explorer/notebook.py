"""`explore`: vectors at one's fingertips, in JupyterLab, VS Code, Colab or marimo."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steerlens._typing import Operator, RealNumber, Unit, WholeNumber
from steerlens.errors import SteerlensError
from steerlens.explorer.runs import Explorer
from steerlens.explorer.settings import read_settings
from steerlens.models.prompts import PromptFormat
from steerlens.vectors.vector import SteeringVector

if TYPE_CHECKING:
    from steerlens.explorer.widget import ExplorerWidget


def explore(
    model: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    *,
    prompt: str = "Describe rain.",
    chosen: str | None = None,
    layer: WholeNumber | None = None,
    coeff: RealNumber = 1.0,
    operator: Operator | None = None,
    positions: str = "all",
    max_new_tokens: WholeNumber = 48,
    unit: Unit | None = None,
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
    prompt_format: PromptFormat = PromptFormat(),
) -> "ExplorerWidget":
    """A widget with the texts that the model says with and without vectors, as prompt, layer and strength are changed.

    Each token is coloured by its probability under the unsteered model. Beside the texts stand the verdicts of the
    instructions' checks, and what the vectors say at the layer (`logit_lens`). Texts are greedy: those of `generate`.

    Args:
        vectors: One, or several by name.
        prompt, chosen, layer, coeff, operator, positions, max_new_tokens: What the controls show at first: of the vectors the
            one that is named, by default the first, at its middle layer; the operator is "set_projection" where that vector
            knows its projections, else "add".
        unit: Of the coefficient of `add`; default "resid_norm" where every vector knows its layers' norms.
        arguments: Of the instructions' checks, by the vectors' names, for example {"detectable_format:number_bullet_lists":
            {"num_bullets": 3}}: a vector is a mean over pairs with several.
        prompt_format: Chat template or plain.

    Returns:
        The widget; its `plan` is what the controls say, to go on with in code.

    Raises:
        SteerlensError: if anywidget is missing, a vector does not fit the model, or a first value is none that can be.

    Example:
        >>> explorer = explore(model, vector, layer=4, max_new_tokens=4)
        >>> explorer.view["steered"]["finish_reason"]
        'length'
    """
    try:
        from steerlens.explorer.widget import ExplorerWidget
    except ModuleNotFoundError as error:
        raise SteerlensError(
            f'the explorer needs {error.name}, which is not installed; run: pip install "steerlens[notebook]"'
        ) from error
    named = {vectors.name: vectors} if isinstance(vectors, SteeringVector) else dict(vectors)
    if not named:
        raise SteerlensError("the explorer needs a vector, got none; fit one with fit_steering_vector")
    explorer = Explorer(model, named, unit=unit, arguments=arguments, prompt_format=prompt_format)
    name = next(iter(named)) if chosen is None else chosen
    first = named.get(name, next(iter(named.values())))
    layer = first.layers[len(first) // 2] if layer is None else layer
    knows = {*first.layers} <= {*first.proj_with}
    asked = {
        "prompt": prompt,
        "vectors": [name],
        "layer": layer,
        "coeff": coeff,
        "operator": operator or ("set_projection" if knows else "add"),
        "positions": positions,
        "max_new_tokens": max_new_tokens,
    }
    settings, problems = read_settings(asked, named, unit=explorer.unit)
    if settings is None:
        raise SteerlensError(next(iter(problems.values())))
    return ExplorerWidget(explorer, settings)
