"""From settings to a stream of views: two texts that grow, each token with its probability under the unsteered model.

    p(token) = softmax(logits of the unsteered model, after the prompt and the text so far)[token]

For the unsteered text that is what it was sampled from (greedily); the steered text is read by the unsteered model as it grows.
Where p is small, steering spoke against the model.

A view is a whole picture of the moment: whoever shows it keeps nothing. Nothing here knows a browser or a widget. Of an
explorer, only the last run goes on: another one, or `cancel`, ends those before it at their next token, and between two tokens
no hook is on the model.

What it does not show: one prompt, decoded greedily, is an example and no rate; see `evaluate` for one.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from steerlens._typing import Unit
from steerlens.errors import SteerlensError
from steerlens.explorer.settings import Settings, read_settings
from steerlens.explorer.verdicts import Verdict, judge
from steerlens.models.passes import run_pass
from steerlens.models.probe import abilities
from steerlens.models.prompts import PromptFormat, encode
from steerlens.models.rows import pad, pad_id
from steerlens.models.stops import decode
from steerlens.reading.vocabulary import logit_lens
from steerlens.steering.generations import Token
from steerlens.steering.plan import Plan
from steerlens.steering.sampling import stream_tokens
from steerlens.vectors.vector import SteeringVector

Status = Literal["refused", "running", "judging", "finished", "failed"]


@dataclass(frozen=True)
class Said:
    """One token of a text.

    >>> Said(" rain", probability=0.5, steered=0.5).text
    ' rain'
    """

    text: str
    """What it adds to the text; empty for a token that is a part of a letter, or ends the text."""
    probability: float
    """Under the unsteered model, after the same text."""
    steered: float
    """Under the model that said it."""
    ends: bool = False
    """Whether it ended the text."""


@dataclass(frozen=True)
class Side:
    """One of the two texts.

    >>> Side().text
    ''
    """

    tokens: tuple[Said, ...] = ()
    text: str = ""
    finish_reason: str = ""
    """As in a `Generation`; empty while the text grows."""
    verdicts: tuple[Verdict, ...] = ()
    """Of each chosen vector's instruction, once the text is finished."""


@dataclass(frozen=True)
class Lens:
    """What a vector says at the chosen layer when it is added (sign 1) or subtracted (-1): see `logit_lens`.

    >>> Lens("lowercase", 1, ((" in", 3.5, True),)).sign
    1
    """

    vector: str
    sign: int
    tokens: tuple[tuple[str, float, bool], ...]
    """Token, logit, and whether it is above the range of random directions."""


@dataclass(frozen=True)
class View:
    """All that is seen at one moment of a run.

    >>> View().status
    'running'
    """

    status: Status = "running"
    plan: str = ""
    """The plan in words."""
    unsteered: Side = Side()
    steered: Side = Side()
    lens: tuple[Lens, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
    """Controls with what is wrong with them, each a sentence; "run" for what is no control's, "lens" for the lens."""


class Explorer:
    """Runs settings on a model: texts with and without the vectors, token by token.

    Args:
        model: A bridge.
        vectors: By name.
        arguments: Of the instructions' checks, by the vectors' names.
        unit: Of the coefficient of `add`; default "resid_norm" where every vector knows its layers' norms.
        top_k: Tokens of the lens, of each sign.

    >>> explorer = Explorer(model, {"lowercase": vector})
    >>> *_, last = explorer.run({**Settings("What is iron?", ("lowercase",), 4).asked(), "max_new_tokens": 4})
    >>> last.status, last.unsteered.text == sl.generate(model, ["What is iron?"], max_new_tokens=4)[0].text
    ('finished', True)
    """

    def __init__(
        self,
        model: Any,
        vectors: Mapping[str, SteeringVector],
        *,
        arguments: Mapping[str, Mapping[str, Any]] | None = None,
        unit: Unit | None = None,
        prompt_format: PromptFormat = PromptFormat(),
        top_k: int = 8,
    ) -> None:
        for vector in vectors.values():
            vector.check_fits(model)
        self.model, self.vectors, self.arguments = model, dict(vectors), dict(arguments or {})
        if unknown := [name for name in self.arguments if name not in self.vectors]:
            raise SteerlensError(f"arguments must be of the vectors {list(self.vectors)}, got some of {unknown[0]!r}")
        known = all({*vector.layers} <= {*vector.resid_norm} for vector in self.vectors.values())
        self.unit: Unit = unit or ("resid_norm" if known else "absolute")
        self.prompt_format, self.top_k = prompt_format, top_k
        self._latest = 0
        self._lenses: dict[tuple[str, int], tuple[Lens, ...]] = {}

    def run(self, asked: Mapping[str, Any]) -> Iterator[View]:
        """The views of a run, the last one finished; runs before it stop at once.

        Whatever goes wrong is said in a view, and none of it is raised: a page has no other way to learn of it.

        Args:
            asked: The values of the controls, as `Settings.asked` has them.
        """
        self.cancel()
        return self._guarded(asked, self._latest)

    def cancel(self) -> None:
        """End the run that goes on, if any: its next view does not come."""
        self._latest += 1

    def _guarded(self, asked: Mapping[str, Any], number: int) -> Iterator[View]:
        view = View()
        settings, problems = read_settings(asked, self.vectors, unit=self.unit)
        if settings is None:
            yield View("refused", problems=tuple(problems.items()))
            return
        views = self._views(settings)
        try:
            for view in views:
                if number != self._latest:
                    return
                yield view
                if number != self._latest:
                    return
        except (
            Exception
        ) as error:  # a page's kernel must go on: out of memory, a check of the reader's own, a broken hook
            kind = "" if isinstance(error, SteerlensError) else f"{type(error).__name__}: "
            yield replace(view, status="failed", problems=(*view.problems, ("run", f"{kind}{error}")))
        finally:
            views.close()

    def _views(self, settings: Settings) -> Generator[View, None, None]:
        plan = settings.plan(self.vectors, unit=self.unit)
        view = View(plan=str(plan))
        try:
            view = replace(view, lens=self._lens(settings))
        except SteerlensError as error:  # a model without a readout has texts all the same
            view = replace(view, problems=(("lens", str(error)),))
        yield view
        for sides in self._sides(settings, plan):
            view = replace(view, unsteered=sides[0], steered=sides[1])
            yield view
        yield (view := replace(view, status="judging"))  # the first check takes seconds
        yield replace(
            view,
            status="finished",
            unsteered=self._judged(sides[0], settings),
            steered=self._judged(sides[1], settings),
        )

    def _sides(self, settings: Settings, plan: Plan) -> Iterator[tuple[Side, Side]]:
        """Both texts after each step."""
        prompt = encode(self.model, settings.prompt, self.prompt_format)
        texts = [_Text(self.model.tokenizer), _Text(self.model.tokenizer)]
        reader = _Reader(self.model, prompt, settings.max_new_tokens) if plan.active else None
        rows = stream_tokens(
            self.model,
            [settings.prompt] * 2,
            steering=[Plan(), plan],
            max_new_tokens=settings.max_new_tokens,
            prompt_format=self.prompt_format,
        )
        sides = [Side(), Side()]
        for one in rows:
            text = texts[one.index]
            if isinstance(one, Token):
                own = float(torch.tensor(one.log_prob).exp())
                read = reader.probability(one.id) if one.index == 1 and reader is not None else own
                sides[one.index] = replace(sides[one.index], tokens=text.add(one.id, read, own), text=text.text)
            else:
                said = text.finish(one.text, stopped=one.finish_reason == "eos")
                sides[one.index] = replace(
                    sides[one.index], tokens=said, text=one.text, finish_reason=one.finish_reason
                )
            yield sides[0], sides[1]

    def _judged(self, side: Side, settings: Settings) -> Side:
        found = (judge(side.text, name, self.vectors[name], self.arguments) for name in settings.vectors)
        return replace(side, verdicts=tuple(found))

    def _lens(self, settings: Settings) -> tuple[Lens, ...]:
        return tuple(lens for name in settings.vectors for lens in self._lens_of(name, settings.layer))

    def _lens_of(self, name: str, layer: int) -> tuple[Lens, ...]:
        if (name, layer) not in self._lenses:
            table = logit_lens(self.model, {name: self.vectors[name]}, layer=layer, top_k=self.top_k).table
            promoted = table[table["kind"] == "promoted"]
            beyond = promoted["logit"] > promoted["random_high"]
            said = list(
                zip(promoted["token"].tolist(), promoted["logit"].tolist(), beyond.tolist(), strict=True)
            )  # in order of rank, those of sign 1 first
            self._lenses[name, layer] = (
                Lens(name, 1, tuple(said[: self.top_k])),
                Lens(name, -1, tuple(said[self.top_k :])),
            )
        return self._lenses[name, layer]


class _Text:
    """A text that grows by tokens, and what each of them adds to it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.ids, self.text = tokenizer, list[int](), ""
        self.said: tuple[Said, ...] = ()

    def add(self, token: int, probability: float, steered: float) -> tuple[Said, ...]:
        self.ids.append(token)
        whole = decode(self.tokenizer, self.ids)
        # Half a letter is written as a sign of its own, until its other half comes.
        added = "" if whole.endswith("\N{REPLACEMENT CHARACTER}") else whole[len(self.text) :]
        self.text += added
        self.said = (*self.said, Said(added, probability, steered))
        return self.said

    def finish(self, text: str, *, stopped: bool) -> tuple[Said, ...]:
        """The tokens of the whole text; the last one is what the text lacks, or what ended it."""
        *before, last = self.said
        shown = sum(len(one.text) for one in before)
        self.said = (*before, replace(last, text=text[shown:], ends=stopped))
        return self.said


class _Reader:
    """Reads a text that grows with the unsteered model."""

    def __init__(self, model: Any, prompt: list[int], n_tokens: int) -> None:
        self.model, self.ids = model, list(prompt)
        self.rows = pad([self.ids], pad_id=pad_id(model))
        self.cached = abilities(model, len(prompt) + n_tokens).cache
        self.cache: Any = None

    def probability(self, token: int) -> float:
        """Of the token after the text, which then ends in it."""
        result = run_pass(self.model, self.rows, cache=self.cache, keep_cache=self.cached)
        self.cache = result.cache
        self.ids.append(token)
        if self.cached:
            self.rows = self.rows.then(torch.tensor([[token]]))
        else:
            self.rows = pad([self.ids], pad_id=pad_id(self.model))
        return float(result.logits[0].float().softmax(-1)[token])
