"""Checks of the notebooks' exercises: each looks at an answer and says "Right.", or "Not yet" with a hint.

    exercises.check_01_1(answer)

A check decides by what a right answer must do, so that several right answers pass, and its hint never holds the answer. Whatever
comes, a check does not raise: an empty attempt (`...`) and a thing of another kind are "Not yet", too.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

import steerlens as sl
from steerlens.stats import holm, wilson_interval


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and if not, what to look at next.

    >>> Verdict(True), Verdict(False, "count layers from zero")
    (Right., Not yet: count layers from zero)
    """

    passed: bool
    hint: str = ""

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return "Right." if self.passed else f"Not yet: {self.hint}"


def check(wanted: str) -> Callable[[Callable[..., str | None]], Callable[..., Verdict]]:
    """Make a check of a function that gives a hint, or None where the answer is right.

    The function gets the answer first, then what else the notebook hands over.

    Args:
        wanted: What an answer is, as in "a layer (a whole number)"; said of empty attempts and of things of another kind.

    >>> @check("a layer (a whole number)")
    ... def is_three(answer):
    ...     return None if answer + 0 == 3 else "look at the highest bar"
    >>> is_three(3), is_three(2)
    (Right., Not yet: look at the highest bar)
    >>> is_three(...)
    Not yet: put a layer (a whole number) in place of the dots
    >>> is_three("3")
    Not yet: an answer is a layer (a whole number), and this one could not be read as that: TypeError on a str
    """

    def decorate(function: Callable[..., str | None]) -> Callable[..., Verdict]:
        @wraps(function)
        def checked(answer: Any, *given: Any) -> Verdict:
            if _has_dots(answer):
                return Verdict(False, f"put {wanted} in place of the dots")
            try:
                hint = function(answer, *given)
            except Exception as error:  # a learner's answer may be anything
                problem = f"{type(error).__name__} on a {type(answer).__name__}"
                return Verdict(False, f"an answer is {wanted}, and this one could not be read as that: {problem}")
            return Verdict(hint is None, hint or "")

        return checked

    return decorate


def _has_dots(answer: Any) -> bool:
    """Whether an answer is `...`, or holds it."""
    if isinstance(answer, Mapping):
        return any(_has_dots(value) for value in answer.values())
    return any(_has_dots(value) for value in answer) if isinstance(answer, list | tuple) else answer is ...


# 01_first_vector


@check("a function from residuals to their difference of means")
def check_01_1(answer: Any) -> str | None:
    resid = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(0))
    found, wanted = answer(resid.clone()), resid[:, 1].mean(0) - resid[:, 0].mean(0)
    if found is ... or found is None:
        return "the function gives nothing back yet"
    if tuple(found.shape) != (7,):
        return f"of 5 pairs with d_model 7 a direction has the shape [7], and this one is {list(found.shape)}"
    if torch.allclose(found, -wanted, atol=1e-5):
        return "it points the other way: which side of the axis carries the instruction?"
    return None if torch.allclose(found, wanted, atol=1e-5) else "the shape is right; each side's mean goes over pairs"


@check("a function that sets a projection")
def check_01_2(answer: Any) -> str | None:
    draw = torch.Generator().manual_seed(0)
    h, u = torch.randn(2, 3, 7, generator=draw), torch.randn(7, generator=draw)
    u = u / u.norm()
    before = h.clone()
    found = answer(h, u, 4.0)
    if found is ... or found is None:
        return "the function gives nothing back yet"
    if not torch.equal(h, before):
        return "the residual that came in was changed in place; give back a new one"
    if tuple(found.shape) != (2, 3, 7):
        return f"what comes out has the shape of what came in, [2, 3, 7], and this is {list(found.shape)}"
    if not torch.allclose(found @ u, torch.full((2, 3), 4.0), atol=1e-4):
        return "the projection of what comes out, found @ u, is not z at every token; what was it before?"
    rest = (found - h) - ((found - h) @ u)[..., None] * u
    return (
        None if torch.allclose(rest, torch.zeros(()), atol=1e-4) else "something changes across u as well as along it"
    )


@check("a number of prompts")
def check_01_3(answer: Any, table: Any) -> str | None:
    followed = {name: int(part["followed"].sum()) for name, part in table.scores.groupby("condition")}
    n = len(table.scores) // len(followed)
    if 0 < abs(answer) < 1 and n > 1:
        return f"that looks like a share; count prompts, of which each condition has {n}"
    if answer == followed["vector"] - followed["none"] != followed["vector"] - followed["random"]:
        return "that is the difference to no steering; the control is another condition"
    return None if answer == followed["vector"] - followed["random"] else "sum `followed` within each condition first"


@check("a plan, made by vector.at")
def check_01_4(answer: Any, vector: Any) -> str | None:
    (step,) = answer
    if str(step.positions) != "last":
        return f"it steers {step.positions}, and only the prompt's last token was asked for"
    if step.operator != "set_projection":
        return f"a target is where a projection is set to, and this plan's operator is {step.operator}"
    if abs(step.target - vector.proj_with[step.layer]) < 1e-4:
        return "it steers to where prompts with the instruction lie"
    return None if abs(step.target - vector.proj_without[step.layer]) < 1e-4 else "the target is not that layer's mean"


# 02_what_does_it_say


@check("a function from a direction to tokens' ids")
def check_02_1(answer: Any) -> str | None:
    draw = torch.Generator().manual_seed(0)
    direction, unembedding = 3 * torch.randn(7, generator=draw), torch.randn(7, 50, generator=draw)
    found = answer(direction, unembedding, 4)
    if found is ... or found is None:
        return "the function gives nothing back yet"
    ids, order = [int(token) for token in found], (direction @ unembedding).argsort().tolist()
    if len(ids) != 4:
        return f"with k = 4 there are four ids, and these are {len(ids)}"
    if ids == order[::-1][:4]:
        return "these are the promoted ones"
    if ids != order[:4] and set(ids) == set(order[:4]):
        return "these are the right tokens, in another order: the most suppressed comes first"
    return (
        None
        if ids == order[:4]
        else "the product of the direction and W_U has a logit per token; whose are the lowest?"
    )


@check("a list of instructions' names")
def check_02_2(answer: Any, lens: Any) -> str | None:
    if isinstance(answer, str):
        return "give a list, also of one name"
    first = lens.table.query("kind == 'promoted' and sign == 1 and rank == 0")
    quiet = set(first[first["logit"] <= first["random_high"]]["vector"])
    if unknown := sorted(set(answer) - set(first["vector"])):
        return f"{unknown[0]!r} is the name of no vector"
    if set(answer) == set(first["vector"]) - quiet:
        return "these say something; the others were asked for"
    if loud := sorted(set(answer) - quiet):
        return f"{loud[0]} says something: its first token is beyond random directions"
    return None if set(answer) == quiet else "there are more of them"


@check("a layer (a whole number)")
def check_02_3(answer: Any, effects: Any) -> str | None:
    kl = effects.table.query("condition == 'vector' and measure == 'kl'")
    by_layer = kl.pivot(index="layer", columns="effect", values="mean")
    if int(answer) not in by_layer.index:
        return f"a layer is one of {by_layer.index.tolist()}"
    if (later := by_layer.loc[int(answer) :])["direct"].lt(later["total"] / 2).any():
        return "there, or at a later layer, the direct effect is less than half of the total one"
    before = by_layer.loc[: int(answer) - 1]
    if len(before) and before["direct"].iloc[-1] >= before["total"].iloc[-1] / 2:
        return "it holds at an earlier layer, too"
    return None


# 03_geometry


@check("a list of measures")
def check_03_1(answer: Any, noise: Any) -> str | None:
    table = sl.reading.separability(noise).table
    beyond = set(table[table["value"] > table["control_high"]]["measure"])
    if unknown := sorted(set(answer) - set(table["measure"])):
        return f"there is no measure {unknown[0]!r}"
    return None if set(answer) == beyond else "compare `value` with `control_high`, in the table of the noise"


@check("two names of instructions")
def check_03_2(answer: Any, cosines: Any) -> str | None:
    names = set(answer)
    if len(names) != 2 or not names <= set(cosines.matrix):
        return "two different names, spelled as in the table"
    row = cosines.table.loc[cosines.table["cosine"].idxmax()]
    found = cosines.matrix.loc[answer[0], answer[1]]
    return None if names == {row["first"], row["second"]} else f"their cosine is {found:.2f}, and there is a larger one"


@check("a dict from names to vectors")
def check_03_3(answer: Any, vectors: Any) -> str | None:
    if set(answer) != set(vectors):
        return "give a vector for each name, and for no other"
    (layer, *_) = next(iter(vectors.values()))
    directions = torch.stack([answer[name][layer] for name in vectors])
    before = torch.stack([vectors[name][layer] for name in vectors])
    if torch.allclose(directions, before):
        return "these are the vectors as they were"
    if directions.mean(0).norm() > 1e-3 * before.norm(dim=1).mean():
        return "their mean is not zero yet; is the sum divided by how many there are?"
    if not torch.allclose(directions, before - before.mean(0), atol=1e-3):
        return "their mean is zero, but they differ by more than what all have in common"
    return None


@check("two counts of layers, by measure")
def check_03_4(answer: Any, line: Any) -> str | None:
    table = line.table
    beyond = table[table["value"] > table["control_high"]]["measure"]
    for measure in ("spearman", "share"):
        if int(answer[measure]) != (beyond == measure).sum():
            return f"the count of {measure!r} is another one; take the rows of that measure, one per layer"
    return None


# 04_which_layer


@check("what search.best returns")
def check_04_1(answer: Any, search: Any) -> str | None:
    rows = search.table[search.table["instruction"] == "change_case:english_lowercase"]
    allowed = rows[(rows["degenerate"] == 0) & (rows["median_perplexity"] < 3)]
    if answer.layer is None:
        return "that is no steering; some candidates do better under this condition"
    here = allowed[(allowed["layer"] == answer.layer) & (allowed["positions"] == str(answer.positions))]
    if len(here) != 1:
        return "its answers do not meet the condition, or it was chosen for another instruction"
    return (
        None
        if here["rate"].iloc[0] == allowed["rate"].max()
        else "another candidate meets the condition, too, and more follow"
    )


@check("a list of layers")
def check_04_2(answer: Any, needed: Any) -> str | None:
    table = needed.table
    table = table[(table["instruction"] == "change_case:english_lowercase") & (table["condition"] == "text+vector")]
    unclear = set(table["layer"][(table["degenerate"] > 0.1) | (table["loss_low"] <= 0)])
    found = {int(layer) for layer in answer}
    if found - set(table["layer"]):
        return f"layer {min(found - set(table['layer']))} was not ablated"
    if found - unclear:
        return f"at layer {min(found - unclear)} the texts are whole and the interval is above zero"
    return (
        None if found == unclear else "one is missing: did you look at both conditions, broken texts and the interval?"
    )


@check("a layer (a whole number)")
def check_04_3(answer: Any, model: Any, pairs: Any) -> str | None:
    table = sl.reading.patch(model, pairs, site="attn", positions=[-1], control=False).table
    restored = table.set_index("layer")["restored"]
    if int(answer) != answer or answer not in restored.index:
        return "the model has no such layer"
    return None if restored[answer] >= restored.max() - 1e-6 else "another layer's attention restores more"


@check("a function of z and hook")
def check_04_4(answer: Any, part: Any) -> str | None:
    head = int(part["head"])
    z = torch.randn(2, 3, head + 2, 4, generator=torch.Generator().manual_seed(0))
    others = [one for one in range(head + 2) if one != head]
    before = z.clone()
    found = answer(z, None)
    found = z if found is None else found  # a hook may also write in place
    if found is ... or found.shape != before.shape:
        return "a hook gives back what stands in the activation's place, of the same shape"
    if not torch.equal(found[:, :, others], before[:, :, others]):
        return "other heads are changed as well; which axis counts heads?"
    return "that head is still there" if found[:, :, head].any() else None


# 05_strength_and_quality


@check("a function of two settings")
def check_05_1(answer: Any) -> str | None:
    better, cheaper, worse = (0.9, 2.0), (0.5, 1.5), (0.5, 2.0)
    cases = {
        (better, worse): (True, "more following at the same price dominates"),
        (cheaper, worse): (True, "the same following at a lower price dominates"),
        ((0.9, 1.5), worse): (True, "a setting that is better in both dominates"),
        (worse, better): (False, "the worse of two settings dominates nothing"),
        (better, cheaper): (False, "where each is better in one respect, neither dominates"),
        (cheaper, better): (False, "where each is better in one respect, neither dominates"),
        (worse, worse): (False, "what about two equal settings?"),
    }
    for (a, b), (wanted, hint) in cases.items():
        found = answer(a, b)
        if found is ... or found is None:
            return "the function gives nothing back yet"
        if bool(found) != wanted:
            return hint
    return None


@check("what swept.best returns")
def check_05_2(answer: Any, swept: Any) -> str | None:
    rows = swept.table[swept.table["instruction"] == "change_case:english_lowercase"]
    allowed = rows[rows["rate"] >= 0.8]
    if answer.layer is None:
        return "that is no steering, which is not followed"
    here = allowed[(allowed["coeff"] == answer.coeff) & (allowed["positions"] == str(answer.positions))]
    if len(here) != 1:
        return "fewer than four in five of its answers follow, or it was chosen for another instruction"
    return (
        None
        if here["mean_kl"].iloc[0] <= allowed["mean_kl"].min()
        else "another one follows as asked, and is nearer to the model"
    )


@check("a number of prompts")
def check_05_3(answer: Any, curves: Any) -> str | None:
    slopes = {name: sl.stats.sample_slopes(group)["slope"] for name, group in curves.groupby("direction")}
    wanted = int((slopes["vector"] < 0).sum())
    if 0 < answer < 1:
        return "that looks like a share; count prompts"
    if answer == int((slopes["random"] < 0).sum()) != wanted:
        return "that is the count for the random direction"
    return None if answer == wanted else "a prompt goes the wrong way where its slope is below zero"


# 06_composition_and_keywords


@check("the name of a row")
def check_06_1(answer: Any, change: Any) -> str | None:
    if answer not in change.index:
        return f"the rows are {', '.join(change.index)}"
    means = change.sum(axis=1)
    if means[answer] <= means.min() + 1e-9:
        return None
    suspects = change.sum(axis=0)
    return (
        "that is who disturbs most; who is disturbed stands in a row"
        if answer == suspects.idxmin()
        else "another row loses more"
    )


@check("a function of z, y, p and c")
def check_06_2(answer: Any) -> str | None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        h, u, w = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(3))
        u, w, z, y = u / u.norm(), w / w.norm(), 2.0, -3.0
        first = h + (z - h @ u) * u
        second = first + (y - first @ w) * w
        found = answer(z, y, float(first @ w), float(u @ w))
        if found is ... or found is None:
            return "the function gives nothing back yet"
        if abs(found - float(second @ u)) > 1e-6:
            return "the second step adds (y - p) times w; how much of w lies along u?"
    return None


@check("a list of three plans, made by vector.at")
def check_06_3(answer: Any, vector: Any, layer: Any) -> str | None:
    if len(answer) != 3:
        return f"three plans were asked for, one for each length, and these are {len(answer)}"
    for plan, coeff in zip(answer, (1, 2, 4), strict=True):
        (step,) = plan
        if (step.operator, str(step.positions), step.layer) != ("add", "last", layer):
            return f"a plan says: {step}; it should add, at layer {layer}, at the last token"
        if not torch.allclose(step.direction, vector.unit(layer), atol=1e-5):
            return "that is another vector's direction"
        if abs(step.coeff_in_norms - coeff) > 1e-6:
            return f"a step is {step.coeff_in_norms:g} norms long, and {coeff} were asked for; in which unit is coeff?"
    return None


@check("a difference of two shares")
def check_06_4(answer: Any, kept: Any) -> str | None:
    at_one = kept[kept["coeff"] == 1].set_index("what")["kept out"]
    wanted = at_one["add exclusion"] - at_one["random direction"]
    if abs(answer - wanted) < 1e-9:
        return None
    if abs(answer + wanted) < 1e-9:
        return "that is the control less the vector"
    return (
        "that is the share itself" if abs(answer - at_one["add exclusion"]) < 1e-9 else "take both at the coefficient 1"
    )


# 07_other_models


@check("the name of an instruction")
def check_07_1(answer: Any, cosines: Any) -> str | None:
    rows = [row for row in cosines if row["model"] == "tiny-base"]
    sums: dict[str, float] = {}
    for row in rows:
        sums[row["instruction"]] = sums.get(row["instruction"], 0.0) + row["cosine"]
    name = answer.split(":")[-1]
    if name not in sums:
        return f"the names are {', '.join(sums)}"
    return (
        None
        if sums[name] == max(sums.values())
        else "take one model's rows, and the mean over layers of each instruction"
    )


@check("a function from two tensors to a number")
def check_07_2(answer: Any) -> str | None:
    draw = torch.Generator().manual_seed(0)
    true = 3 + torch.randn(20, 4, generator=draw) * torch.tensor([0.1, 1.0, 2.0, 4.0])
    guess = true + 0.5 * torch.randn(20, 4, generator=draw)
    found, mean = answer(true, guess), true.mean(0)
    if found is ... or found is None:
        return "the function gives nothing back yet"
    wanted = 1 - ((true - guess) ** 2).sum() / ((true - mean) ** 2).sum()
    if abs(float(answer(true, mean.expand_as(true)))) > 1e-4:
        return "a prediction that always says the mean has an R² of zero; whose mean is it, and over which axis?"
    return (
        None
        if abs(float(found) - float(wanted)) < 1e-4
        else "sum over texts and coordinates before you divide, not after"
    )


@check("a function from pairs and an id to pairs")
def check_07_3(answer: Any, pairs: Any) -> str | None:
    for name in pairs.instructions:
        found = answer(pairs, name)
        if found is ... or found is None:
            return "the function gives nothing back yet"
        ids = [pair.instruction_id for pair in found]
        if name in ids:
            return "the map would see texts with the instruction that it is to carry"
        if len(ids) < sum(pair.instruction_id != name for pair in pairs):
            return "more pairs than these are free of the instruction"
        if not hasattr(found, "instructions"):
            return "these are the right pairs; put them into a pair set"
    return None


# 08_checking_a_claim


@check("a function from two numbers to a probability")
def check_08_1(answer: Any) -> str | None:
    found = answer(3, 1)
    if found is ... or found is None:
        return "the function gives nothing back yet"
    for gained, lost in ((0, 0), (2, 2), (6, 0), (0, 6), (9, 2), (3, 1)):
        n = gained + lost
        wanted = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n)
        found = answer(gained, lost)
        if not 0 <= found <= 1:
            return f"for {gained} gained and {lost} lost it gives {found:g}, which is no probability"
        if math.isclose(found, wanted / 2, rel_tol=1e-6) and wanted < 1:
            return "that is one side; an equally uneven split the other way counts as well"
        if not math.isclose(found, wanted, rel_tol=1e-6):
            return f"for {gained} gained and {lost} lost, count the splits that are at least as uneven among all 2**{n}"
    return None


@check("a number of prompts")
def check_08_2(answer: Any) -> str | None:
    if answer != int(answer) or answer < 1:
        return "a number of prompts is whole, and at least one"
    if wilson_interval(0, int(answer))[1] >= 0.05:
        return "the interval of so few prompts still reaches 5 %"
    return None if wilson_interval(0, int(answer) - 1)[1] >= 0.05 or answer == 1 else "fewer prompts are enough"


@check("a function from p-values to p-values")
def check_08_3(answer: Any) -> str | None:
    if (first := answer([0.2, 0.01])) is ... or first is None:
        return "the function gives nothing back yet"
    for p_values in ([0.5], [0.04, 0.01, 0.03], [0.9, 0.8, 0.001], [0.01, 0.0104, 0.5, 0.02]):
        found, wanted = [float(p) for p in answer(list(p_values))], holm(p_values).tolist()
        if len(found) != len(wanted):
            return f"{len(wanted)} p-values came in, and {len(found)} came out"
        if any(p > 1 for p in found):
            return "one of them is above 1"
        if not all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(found, wanted, strict=True)):
            same = all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(sorted(found), sorted(wanted), strict=True))
            return (
                "the numbers are right, and in another order than what came in" if same else f"try {p_values} by hand"
            )
    return None


@check("a function from a text to True or False")
def check_08_4(answer: Any) -> str | None:
    if answer("a") is ... or answer("a") is None:
        return "the function gives nothing back yet"
    good = ["The stork stays safe because it can fly very far.", "Rain falls from clouds and clouds are made of water."]
    broken = ["", "PSPSPSPSPSPSPSPSPSPSPSPSPS", "ter " * 30, "no no no no no no no no"]
    if not all(answer(text) for text in good):
        return "it refuses a good sentence without a comma"
    if answer("The stork is safe, because it can fly very far."):
        return "a text with a comma passes"
    passed = [text for text in broken if answer(text)]
    return None if not passed else f"a broken text passes: {passed[0][:24]!r}"


# 09_attention_steering


@check("a function of shares, of which tokens are chosen, and of alpha")
def check_09_1(answer: Any) -> str | None:
    shares = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    chosen, alpha = torch.tensor([False, True, False, False, True, True]), 0.25
    found = answer(shares.clone(), chosen, alpha)
    if found is ... or found is None:
        return "the function gives nothing back yet"
    if tuple(found.shape) != (3, 6):
        return f"shares of 3 rows and 6 tokens stay [3, 6], and these are {list(found.shape)}"
    scaled = shares * torch.where(chosen, 1.0, alpha)
    wanted = scaled / scaled.sum(-1, keepdim=True)
    if torch.allclose(found, scaled, atol=1e-6):
        return "these shares do not sum to 1 any more; a softmax always makes them"
    other = shares * torch.where(chosen, alpha, 1.0)
    if torch.allclose(found, other / other.sum(-1, keepdim=True), atol=1e-6):
        return "that takes attention from the instruction; which tokens does alpha < 1 weaken?"
    return None if torch.allclose(found, wanted, atol=1e-5) else "multiply first, then divide by the new sum"


@check("a function of a mass and a target")
def check_09_2(answer: Any) -> str | None:
    for mass, target in ((0.05, 0.2), (0.1, 0.5), (0.19, 0.2)):
        found = answer(mass, target)
        if found is ... or found is None:
            return "the function gives nothing back yet"
        if abs(found - target) < 1e-9:
            return "that is the target; what happens to the instruction's share when all shares are made to sum to 1?"
        if abs(found - target / (1 + target - mass)) > 1e-6:
            return "the instruction has t, and the rest of the tokens still has 1 - m, before both are divided by their sum"
    return None if abs(answer(0.4, 0.2) - 0.4) < 1e-9 else "what if the mass is above the target already?"


@check("a number of prompts")
def check_09_3(answer: Any, found: Any) -> str | None:
    rows = found.comparisons[found.comparisons["method"] == "DIRECTER"].set_index("baseline")
    wanted = {name: int(rows.loc[name, "gained"] - rows.loc[name, "lost"]) for name in ("text", "control")}
    if 0 < abs(answer) < 1:
        return "that looks like a share; count prompts"
    if answer == wanted["control"]:
        return None
    if answer == wanted["text"]:
        return "that is the difference to the instruction alone; the control is another baseline"
    return "take the row of DIRECTER whose baseline is its control: those it gained, less those it lost"
