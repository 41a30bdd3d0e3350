"""What jobs depend on: frozen dataclasses, each setting declared once, shared by the command line and the jobs.

    ModelConfig, PairsConfig, EngineConfig, AttentionConfig     groups that several commands have
    SearchConfig                                                all of them, and what a search tries and measures
    RunConfig, SweepConfig                                      the two jobs
    LookConfig                                                  what looks at a run or at saved vectors

Imports nothing heavy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steerlens._typing import Gate, Operator, RuleName, Unit, real_numbers, whole, whole_numbers
from steerlens.models.prompts import PromptFormat
from steerlens.steering.settings import SamplingConfig


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and where it runs.

    Example:
        >>> ModelConfig("smollm2-135m").dtype
        'float32'
    """

    model: str = "tiny"
    """A local folder, a named model (see `steerlens models`), or a hub id."""
    dtype: str = "float32"
    """Of the weights: float32, bfloat16 or float16."""
    device: str | None = None
    """As in PyTorch; default: the best one present."""
    backend: Literal["auto", "hooks", "lean", "graphs"] = "auto"
    """How it is run: without TransformerLens' hook points where they are not needed, always with them, or never; graphs is never,
    with decoding steps that a GPU records and replays."""

    def load(self, *, progress: bool = True) -> Any:
        """The model, to be run so.

        >>> ModelConfig("tiny").load(progress=False).cfg.n_layers
        8
        """
        from steerlens.models.choice import use_backend
        from steerlens.models.load import load_model

        model = load_model(self.model, dtype=self.dtype, device=self.device, progress=progress)
        use_backend(model, self.backend)
        return model


@dataclass(frozen=True)
class PairsConfig:
    """Which pairs vectors are fitted on, and how they are split."""

    pairs: str = "auto"
    """Where vectors come from: "tiny" or "format" (bundled), or a JSONL file; auto is tiny for the tiny models, else format."""
    seed: int = 0
    """Decides splits, phrasings, samples, random candidates and the random directions of the control."""


@dataclass(frozen=True)
class EngineConfig:
    """Where responses are generated."""

    engine: Literal["local", "ray"] = "local"
    """Where responses are generated: in this process, or on a Ray cluster, with the same results."""
    ray_address: str | None = None
    """Of a running Ray cluster; default: one is started on this machine."""
    n_workers: int | None = None
    """Ray workers; default: as many as the cluster's processors allow."""


@dataclass(frozen=True)
class AttentionConfig:
    """What steers besides a vector, and what all steering must pass.

    Example:
        >>> AttentionConfig("pasta:alpha=0.01")
        AttentionConfig(attention='pasta:alpha=0.01', plausible=None)
    """

    attention: str | None = None
    """Steer attention towards the instruction in the prompt: a method, such as pasta:alpha=0.01; see `steerlens methods`."""
    plausible: float | None = None
    """Steer behind a gate: a token must have at least this share of the largest unsteered probability (0.5 in DIRECTER), or
    steering gives way."""


@dataclass(frozen=True)
class SearchConfig(AttentionConfig, EngineConfig, PairsConfig, ModelConfig):
    """A search of layers and more on validation prompts, with vectors fitted on others."""

    data: str | None = None
    """A JSONL file of test prompts, which nothing is fitted or searched on; default: the test split of `pairs`."""
    queries: str | None = None
    """For official IFEval files, a JSONL file of base queries: `key`, and `model_output` without the instructions."""
    instructions: tuple[str, ...] = ()
    """Instruction ids; default: all that both `pairs` and `data` have."""
    n_train: int = 48
    """Training pairs per instruction, at most."""
    n_valid: int = 8
    """Validation prompts per instruction, at most (the paper uses 8 to 10)."""
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
    trials: int = 1
    """Responses per prompt and condition; more than one needs a temperature."""
    batch_size: int = 16
    """Rows per batch; pairs per batch when recording."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are sampled, and when they stop."""
    prompt_format: PromptFormat = PromptFormat()
    """How a prompt's text becomes what the model reads."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(whole_numbers(self.layers, "layer")))
        object.__setattr__(self, "coeffs", tuple(real_numbers(self.coeffs, "coeff")))
        for name in COUNTS:
            if getattr(self, name, None) is not None:
                object.__setattr__(self, name, whole(getattr(self, name), name))


COUNTS = ("n_train", "n_valid", "n_test", "n_random", "search_tokens", "trials", "seed", "batch_size")


@dataclass(frozen=True)
class RunConfig(SearchConfig):
    """Everything that a run depends on, besides the model's weights and the prompts themselves.

    Example:
        >>> RunConfig(model="tiny", n_test=4).seed
        0
    """

    n_test: int | None = None
    """Test prompts per instruction, at most; default: all."""
    search_tokens: int = 64
    """max_new_tokens of the search."""
    kl: bool = False
    """Also measure how far steering moves the next-token distribution, in nats."""
    reward_model: str | None = None
    """Also score each response with this reward model: a folder or hub id of a sequence classifier."""


@dataclass(frozen=True)
class SweepConfig(SearchConfig):
    """Everything that a sweep in a folder depends on, besides the model's weights and the prompts themselves.

    Example:
        >>> SweepConfig(layers=(1, 3)).sampling.max_new_tokens
        64
    """

    n_random: int | None = None
    """Draw this many candidates at random, with coefficients between the lowest and the highest, instead of every combination."""
    coeffs: tuple[float, ...] = ()
    """Coefficients to search: for set_projection and ablate the share of the full change (default 1), for add the step's length;
    with `attention`, which is searched in place of vectors, values of the method's first parameter."""
    condition: Literal["vector", "text+vector"] = "vector"
    """Of vectors: with the bare query, or with the instruction in the prompt. Attention is searched with it."""
    batch_size: int = 64
    """Rows per batch; pairs per batch when recording."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=64)
    """How responses are sampled, and when they stop."""


@dataclass(frozen=True)
class LookConfig:
    """How a run's folder or saved vectors are opened to be looked at; a run has its own pairs, prompt format and folder.

    Example:
        >>> LookConfig(model="smollm2-135m").pairs is None
        True
    """

    out: Path | None = None
    """For saved vectors: the folder of the tables and the page; made if need be, gone on with if it was cut short."""
    model: str | None = None
    """A local folder, a named model, or a hub id; default: the run's, or the one that the vectors name."""
    dtype: str | None = None
    """Of the weights: float32, bfloat16 or float16; default: the run's, or float32."""
    device: str | None = None
    """As in PyTorch; default: the run's, or the best one present."""
    pairs: str | None = None
    """For saved vectors: where prompts come from: "tiny" or "format" (bundled), or a JSONL file; default: what they name."""
    prompt_format: PromptFormat = PromptFormat()
    """For saved vectors: how a prompt's text becomes what the model reads."""


PLACE = ("device", "backend", "engine", "ray_address", "n_workers")
"""Settings that say where and how a run runs, not what comes out."""


TINY = ("tiny", "tiny-base", "tiny-half", "tiny-plain")
"""The models that are part of the package."""


def pairs_for(pairs: str, model: str) -> str:
    """The bundled pairs that "auto" stands for: the tiny models, and copies in a folder of their name, know little."""
    if pairs != "auto":
        return pairs
    folder = Path(model).expanduser()
    return "tiny" if model in TINY or (folder.is_dir() and folder.name in TINY) else "format"
