"""The lean pass: the Hugging Face modules below a bridge, run as they are, without the bridge's hook points.

A bridge's hook points cost a fifth of a decoding step at 135 million parameters and half of it at 3 million, and its attention
shows every score. A pass that edits and reads nothing but blocks' outputs and attention's scores, input and output needs none of
it. So beside the bridge stands a tree of plain modules:

    one shallow copy of each module below the bridge's wrappers
    the very same tables of parameters and buffers: no second copy in memory, and an edit of weights is seen at once; where a
    wrapper has copied weights, to split them, the sums of both are compared before each use
    configurations of its own, that choose fused attention; where scores are edited, a layer computes them in the open

with a torch hook at each block or attention that is edited or read. The tree is used where it was seen, on the model itself, to
give what the hook points give (see `choice`), and refused with a reason otherwise: hooks of the caller's (they must fire), a
module with a forward of its own, an attention that computes something else.
"""

import copy
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steerlens.errors import ModelError
from steerlens.models.facts import attention_window, bit_sums, layer_of, resid_post, text_config

Hook = Callable[..., Tensor | None]
"""(activation, hook) -> the activation after it, or None to leave it."""

OPEN = "steerlens_open"
"""transformers' name for attention whose scores may be edited; see `open_attention`."""


class NotSharedError(ModelError):
    """A model's modules cannot stand beside its bridge; the message says why."""


@dataclass(eq=False)
class Tree:
    """A model's plain modules, and where its hook points' activations are in them."""

    root: nn.Module
    blocks: list[nn.Module]
    attention: list[nn.Module | None]
    """Of each layer its attention, where it is a module of its own."""
    configs: list[Any]
    causal_alone: bool
    """Whether every layer's mask is the causal one: no windows, no chunks."""

    def choose(self, attention: str) -> None:
        """Compute attention with another of transformers' functions."""
        for config in self.configs:
            config._attn_implementation_internal = attention

    @contextmanager
    def hooked(self, functions: Mapping[str, Hook]) -> Iterator[None]:
        """Hooks at blocks' outputs, and at attention's scores, input and output, inside the block, and none of them after it."""
        handles = []
        opened: list[tuple[nn.Module, Any]] = []
        try:
            for site, function in functions.items():
                layer, (*_, part, point) = layer_of(site), site.split(".")
                if part != "attn":
                    handles.append(self.blocks[layer].register_forward_hook(_at_output(function)))
                    continue
                module = self.attention[layer]
                if module is None:
                    raise NotSharedError("its attention is no module of its own")
                if point == "hook_in":
                    handles.append(module.register_forward_pre_hook(_at_input(function), with_kwargs=True))
                elif point == "hook_out":
                    handles.append(module.register_forward_hook(_at_output(function)))
                else:
                    config: Any = getattr(module, "config", None)
                    if not hasattr(config, "_attn_implementation_internal"):
                        raise NotSharedError("its attention asks transformers for no function")
                    opened.append((module, config))
                    if (closed := config._attn_implementation_internal) != OPEN:
                        module.__dict__["steerlens_closed"] = ALL_ATTENTION_FUNCTIONS.get(closed)
                    module.__dict__["config"] = copy.copy(config)
                    module.__dict__["config"]._attn_implementation_internal = OPEN
                    module.__dict__.setdefault("steerlens_hooks", []).append(function)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, config in reversed(opened):
                module.__dict__["config"] = config
                module.__dict__["steerlens_hooks"].pop()


def _at_input(function: Hook) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        after = function(args[0] if args else kwargs["hidden_states"], hook=None)
        if after is None:
            return None
        return ((after, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": after})

    return hook


def _at_output(function: Hook) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        whole = isinstance(output, Tensor)
        after = function(output if whole else output[0], hook=None)
        if after is None:
            return None
        return after if whole else (after, *output[1:])

    return hook


# --- building --------------------------------------------------------------------------------------------------------


def plain_tree(model: Any) -> Tree:
    """The plain modules below a bridge.

    Raises:
        NotSharedError: with the reason, if they cannot stand beside it.
    """
    bridged = getattr(model, "original_model", None)
    if not isinstance(bridged, nn.Module):
        raise NotSharedError("there is no Hugging Face model below it")
    if getattr(model, "compatibility_mode", False):
        raise NotSharedError("TransformerLens has processed its weights")
    if not hasattr(model, "_accepts_derived_position_ids"):
        raise NotSharedError("this TransformerLens does not say whether positions may be given; version 4.3 does")
    twins: dict[int, nn.Module] = {}
    root = _twin(bridged, twins)
    configs = _own_configs(twins.values())
    blocks: list[nn.Module] = []
    attention: list[nn.Module | None] = []
    for layer, block in enumerate(model.blocks):
        if model.hook_dict.get(resid_post(layer)) is not block.hook_out:
            raise NotSharedError(f"the residual after layer {layer} is no block's output")
        blocks.append(twins[id(_below(block))])
        wrapper = getattr(block, "attn", None)
        attention.append(twins.get(id(_below(wrapper))) if isinstance(wrapper, nn.Module) else None)
    return Tree(root, blocks, attention, configs, causal_alone=attention_window(text_config(model)) == math.inf)


def _below(module: nn.Module) -> nn.Module:
    """The module that a bridge's wrappers wrap, or the module itself."""
    while (below := module._modules.get("_original_component")) is not None:
        module = below
    return module


def _twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """A shallow copy of the module below the wrappers, and of those in it: its tables of parameters and buffers are the same."""
    module = _below(module)
    if id(module) in twins:
        return twins[id(module)]
    kind = type(module)
    if kind.__module__.startswith("transformer_lens"):
        raise NotSharedError(f"{kind.__name__} stands for no module of Hugging Face's")
    if "forward" in module.__dict__:
        raise NotSharedError(f"a {kind.__name__} has a forward of its own")
    twin = twins[id(module)] = copy.copy(module)
    for name, value in module.__dict__.items():
        if name == "_modules":
            twin.__dict__[name] = {key: child if child is None else _twin(child, twins) for key, child in value.items()}
        elif isinstance(value, nn.Module):
            twin.__dict__[name] = _twin(value, twins)
        elif name in _HOOKS:
            twin.__dict__[name] = OrderedDict()
        elif isinstance(getattr(value, "__self__", None), nn.Module):
            raise NotSharedError(f"{name} of a {kind.__name__} is bound to the module that it belongs to")
    twin.training = False
    return twin


_HOOKS = {name for name, value in nn.Module().__dict__.items() if isinstance(value, OrderedDict)}


def _own_configs(modules: Iterable[nn.Module]) -> list[Any]:
    """Give the tree's modules configurations of their own, one for each that they shared."""
    own: dict[int, Any] = {}
    for module in modules:
        for name, value in module.__dict__.items():
            if hasattr(value, "_attn_implementation_internal"):
                module.__dict__[name] = own.setdefault(id(value), copy.copy(value))
    for config in own.values():
        config.output_attentions = config.output_hidden_states = False
    return list(own.values())


# --- whether it still stands for the bridge --------------------------------------------------------------------------


class Parts:
    """What a bridge and the model below it consist of: each module's modules, tensors and settings, as the very objects.

    Where one of them is another now, or somebody's hook is there, plain modules do not stand for the bridge.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        # The model below is none of the bridge's submodules.
        modules = dict.fromkeys([*model.modules(), *model.original_model.modules()])
        self.points = [module.__dict__ for module in modules if type(module).__name__ == "HookPoint"]
        self.others = [module for module in modules if type(module).__name__ != "HookPoint"]
        self.split = _split_weights(model.original_model)
        self.before, self.sums = self._now(), self._sums()

    @property
    def same(self) -> bool:
        """Whether nothing was replaced."""
        now = self._now()
        if len(now) != len(self.before) or not all(map(operator.is_, now, self.before)):
            return False
        return all(map(torch.equal, self._sums(), self.sums))

    @property
    def hooked(self) -> bool:
        """Whether there are hooks of somebody's: they must fire, and a lean pass would skip them."""
        for point in self.points:
            if point["_forward_hooks"] or point["_forward_pre_hooks"] or point["_backward_hooks"]:
                handles = [*point["fwd_hooks"], *point["bwd_hooks"]]
                if not all(_wiring(getattr(handle, "user_hook", None)) for handle in handles):
                    return True
        for module in self.others:
            table = module.__dict__
            for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                # Both libraries wire modules with hooks of their own.
                if table[name] and not all(_wiring(hook) for hook in table[name].values()):
                    return True
        return False

    def _sums(self) -> list[Tensor]:
        return [sums for weights in self.split for sums in bit_sums(weights)]

    def _now(self) -> list[Any]:
        now: list[Any] = [self.model.__dict__.get("compatibility_mode")]
        for module in self.others:
            table = module.__dict__
            now += table["_modules"].values()
            now += table["_parameters"].values()
            now += table["_buffers"].values()
            if not type(module).__module__.startswith("transformer_lens"):
                now += [value for name, value in table.items() if name not in _MOVING]
        return now


_MOVING = {"training", "_modules", "_parameters", "_buffers", *_HOOKS}


def _split_weights(bridged: nn.Module) -> list[Tensor]:
    """The weights that wrappers have copied, and those they were copied from.

    Most wrappers split joint weights into views of them; where the parts are interleaved, they are copies.
    """
    below = {id(tensor): tensor for module in _modules_below(bridged) for tensor in module.parameters(recurse=False)}
    storages = {tensor.untyped_storage().data_ptr() for tensor in below.values()}
    wrappers = []
    for name, parameter in bridged.named_parameters():
        if parameter.untyped_storage().data_ptr() not in storages:
            # The last wrapper on the way is the part's own, the one before it has split the weights.
            path = name.split(".")
            on_the_way = [bridged.get_submodule(".".join(path[:end])) for end in range(1, len(path))]
            wrappers += [module for module in on_the_way if "_original_component" in module._modules][-2:-1]
    return [tensor for wrapper in dict.fromkeys(wrappers) for tensor in wrapper.parameters()]


def _modules_below(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below the wrappers, as `_twin` walks them."""
    module = _below(module)
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _modules_below(child)


def _wiring(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(("transformer_lens.", "transformers."))


# --- attention in the open -------------------------------------------------------------------------------------------


def open_attention(
    module: nn.Module,
    query: Float[Tensor, "row head query d_head"],
    key: Float[Tensor, "row kv_head key d_head"],
    value: Float[Tensor, "row kv_head key d_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Float[Tensor, "row query head d_head"], None]:
    """Attention as transformers' eager functions compute it, with the module's hooks between mask and softmax.

    Where none of them does anything, the scores stay closed, and the tree's own function is as good.
    """
    hooks = [hook for hook in module.__dict__["steerlens_hooks"] if not getattr(hook, "idle", False)]
    closed = module.__dict__["steerlens_closed"]
    if closed is not None and not hooks:
        found: tuple[Tensor, None] = closed(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, softcap=softcap, **more
        )
        return found
    if known := sorted(name for name in ("s_aux", "position_bias") if more.get(name) is not None):
        raise NotSharedError(f"its attention has {known[0]}")
    n_rows, n_heads, n_queries, d_head = query.shape
    n_keys = key.shape[2]
    # The queries of heads that share keys stand one after another, so that no key is copied.
    scores = query.reshape(n_rows, key.shape[1], -1, d_head) @ key.transpose(2, 3)
    scores = scores.view(n_rows, n_heads, n_queries, n_keys) * (d_head**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None and n_queries > 1:
        causal = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device)
        attention_mask = causal.tril(n_keys - n_queries)[None, None]
    if attention_mask is not None:
        attention_mask = attention_mask[..., :n_keys]
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    for hook in hooks:
        after = hook(scores, hook=None)
        scores = scores if after is None else after
    pattern = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    mixed = pattern.reshape(n_rows, key.shape[1], -1, n_keys) @ value
    return mixed.view(n_rows, n_heads, n_queries, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(OPEN, open_attention)
