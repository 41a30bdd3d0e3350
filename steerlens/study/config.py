"""What a run depends on: one frozen dataclass, shared by the command line and the job; imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steerlens._typing import Gate, Operator, RuleName, Unit, real, real_numbers, whole, whole_numbers
from steerlens.models.prompts import PromptFormat


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on, besides the model's weights and the prompts themselves.

    Example:
        >>> RunConfig(model="tiny", n_test=4).seed
        0
    """

    model: str = "tiny"
    """A local folder, a named model (see `steerlens models`), or a hub id."""
    pairs: str = "auto"
    """Where vectors come from: "tiny" or "format" (bundled), or a JSONL file; auto is tiny for the tiny models, else format."""
    data: str | None = None
    """A JSONL file of test prompts; default: the test split of `pairs`."""
    queries: str | None = None
    """For official IFEval files, a JSONL file of base queries: `key`, and `model_output` without the instructions."""
    instructions: tuple[str, ...] = ()
    """Instruction ids; default: all that both `pairs` and `data` have."""
    n_train: int = 48
    """Training pairs per instruction, at most."""
    n_valid: int = 8
    """Validation prompts per instruction, at most (the paper uses 8 to 10)."""
    n_test: int | None = None
    """Test prompts per instruction, at most; default: all."""
    layers: tuple[int, ...] = ()
    """Layers to search; default: the paper's, every second one from a fifth of the depth on."""
    coeffs: tuple[float, ...] = (1.0,)
    """Coefficients to search; for set_projection and ablate the share of the full change, for add the step's length."""
    unit: Unit = "absolute"
    """Of the coefficients of add: absolute, or the layer's mean residual norm."""
    operators: tuple[Operator, ...] = ("set_projection",)
    """What to do with a vector: set_projection (the paper's format steering), add, or ablate; several are searched together."""
    positions: tuple[RuleName, ...] = ("all",)
    """Which tokens to steer; the paper steers all. Several rules are searched together."""
    gate: Gate = "degenerate"
    """What bars a searched candidate: degenerate (more looping or empty texts than without steering), low_perplexity (more texts
    of perplexity below 2.5 under the quality model), or no_low_perplexity (any such text)."""
    quality_model: str | None = None
    """The causal LM whose perplexity is measured: a name, folder or hub id; default: the unsteered model itself."""
    kl: bool = False
    """Also measure how far steering moves the next-token distribution, in nats."""
    reward_model: str | None = None
    """Also score each response with this reward model: a folder or hub id of a sequence classifier."""
    max_new_tokens: int = 128
    """At most this many new tokens for each test response."""
    search_tokens: int = 64
    """max_new_tokens of the search."""
    temperature: float = 0.0
    """0 is greedy."""
    stop: tuple[str, ...] = ()
    """Texts, special tokens among them, that end a response, besides the model's own stop tokens."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that do so."""
    trials: int = 1
    """Responses per prompt and condition; more than one needs a temperature."""
    seed: int = 0
    """Decides splits, phrasings, samples and the random directions of the control."""
    batch_size: int = 16
    """Rows per batch; pairs per batch when recording."""
    prompt_format: PromptFormat = PromptFormat()
    """How a prompt's text becomes what the model reads."""
    dtype: str = "float32"
    """Of the weights: float32, bfloat16 or float16."""
    device: str | None = None
    """As in PyTorch; default: the best one present."""
    engine: Literal["local", "ray"] = "local"
    """Where responses are generated: in this process, or on a Ray cluster, with the same results."""
    ray_address: str | None = None
    """Of a running Ray cluster; default: one is started on this machine."""
    n_workers: int | None = None
    """Ray workers; default: as many as the cluster's processors allow."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(whole_numbers(self.layers, "layer")))
        object.__setattr__(self, "coeffs", tuple(real_numbers(self.coeffs, "coeff")))
        object.__setattr__(self, "temperature", real(self.temperature, "temperature"))
        for name in ("n_train", "n_valid", "n_test", "max_new_tokens", "search_tokens", "trials", "seed", "batch_size"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole(getattr(self, name), name))


PLACE = ("device", "engine", "ray_address", "n_workers")
"""Settings that say where a run runs, not what comes out."""


TINY = ("tiny", "tiny-base", "tiny-half", "tiny-plain")
"""The models that are part of the package."""


def pairs_for(pairs: str, model: str) -> str:
    """The bundled pairs that "auto" stands for: the tiny models, and copies in a folder of their name, know little."""
    if pairs != "auto":
        return pairs
    folder = Path(model).expanduser()
    return "tiny" if model in TINY or (folder.is_dir() and folder.name in TINY) else "format"
