"""What images are conditioned on: the class folder ("group"), the level of a slice, age, sex, what else a table says.

The condition of an image is a row of float32 numbers, one for each attribute. A number is scaled so that the values of
the training data run from -1 to 1; a category is its index among the values, which are sorted; NaN means "unknown".
What was learnt about the attributes goes into the header of the weights: names, units, quantiles and shares, so that
values can be drawn as they were in training. No row of a person does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import UserError, generator, is_folder_name

GROUP = "group"  # the attribute that is the class folder
UNKNOWN = ("", "na", "n/a", "nan", "none", "unknown", "?")  # what tables write where they know nothing, in lower case
UNITS = {"age": "years", "education": "years", "weight": "kg", "height": "cm"}
MOST = 64  # attributes, and values of a category: more are names or dates
RESERVED = ("file", "class", "seed", "index", "checkpoint")  # other columns of a manifest
PERCENTS = np.arange(0, 101, 5)  # at which the quantiles of a number are kept


@dataclass(frozen=True)
class Attribute:
    """One attribute, a number or a category, as the training data had it."""

    name: str
    values: tuple[str, ...] = ()  # of a category, sorted; empty for a number
    shares: tuple[float, ...] = ()  # of these values
    quantiles: tuple[float, ...] = ()  # of a number, at PERCENTS: the first and the last are its range
    unit: str = ""

    def __str__(self) -> str:
        """For example "age 55 to 90 years" or "sex F, M"."""
        if self.values:
            return f"{self.name} {', '.join(self.values)}"
        return f"{self.name} {self.quantiles[0]:g} to {self.quantiles[-1]:g}{' ' * bool(self.unit)}{self.unit}"

    @property
    def middle(self) -> float:
        """Of the range of a number: the value whose code is 0."""
        return (self.quantiles[0] + self.quantiles[-1]) / 2

    @property
    def half(self) -> float:
        """Half of the range of a number: how much a code of 1 is, in its unit."""
        return (self.quantiles[-1] - self.quantiles[0]) / 2

    def encode(self, text: str) -> float:
        """The number of a condition's row for a value in words. UserError if training had no such value."""
        if text.strip().lower() in UNKNOWN and text not in self.values:
            return math.nan
        code = self.encode_all([text])[0]
        if math.isnan(code) or (not self.values and not -1.001 <= code <= 1.001):  # limits are rounded
            raise UserError(f"{self.name}={text} is not among what the run was trained on: {self}")
        return float(code)

    def encode_all(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 codes of values in words. Values of other data may be outside [-1, 1]; new categories are unknown."""
        if self.values:
            index = {value: i for i, value in enumerate(self.values)}
            found = (index.get(text, index.get(spelt(text), math.nan)) for text in texts)
            return np.array([*found], np.float32)
        return ((np.array([number(text) for text in texts]) - self.middle) / self.half).astype(np.float32)

    def decode(self, code: float) -> str:
        """The value in words; empty for "unknown"."""
        if math.isnan(code):
            return ""
        if self.values:
            return self.values[round(code)]
        return f"{round(self.middle + code * self.half, digits(2 * self.half)):g}"

    def quantile(self, u: float) -> float:
        """The code at u in [0, 1) of the training data: for uniform u it is distributed as there."""
        if self.values:
            return float(np.searchsorted(np.cumsum(self.shares)[:-1], u, side="right"))
        return float((np.interp(100 * u, PERCENTS, self.quantiles) - self.middle) / self.half)


def spelt(text: str) -> str:
    """The text without blanks around it, and a number in one spelling: 1.0 is 1."""
    value = number(text)
    return text.strip() if math.isnan(value) else f"{value:g}"


def digits(span: float) -> int:
    """How many decimals a number needs that is one of a thousand within this span."""
    return max(0, 3 - math.floor(math.log10(span)))


def number(text: str) -> float:
    """The finite number that a text says, else NaN."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Learning from data, and the header of the weights


def learn_attribute(name: str, texts: Sequence[str], flag: str = "--condition") -> Attribute:
    """What values an attribute has; texts: one per training slice, with "" where it is unknown. `flag` asked for it.

    If all known values are numbers, and there are more than two of them, it is a number, else a category; groups always
    are. The range of a number is rounded outwards, so that it is not somebody's own age. UserError if there is nothing
    to learn from, too many categories, or a name that has another meaning.
    """
    if not is_folder_name(name) or "=" in name or name in RESERVED:
        raise UserError(f"{flag} {name}: an attribute cannot be called so; rename its column")
    # What is known, each value in one spelling
    known = [spelt(text) for text in texts if text.strip().lower() not in UNKNOWN]
    counts = Counter(known)
    if len(counts) < 2:
        raise UserError(f"{flag} {name}: no two training slices differ in it, so there is nothing to learn")
    # A number: its quantiles. Two numbers alone are more likely a code, such as 0 and 1 for no and yes.
    numbers = np.array([number(text) for text in known])
    if name != GROUP and len(counts) > 2 and not np.isnan(numbers).any():
        places, (low, *inner, high) = digits(np.ptp(numbers)), np.percentile(numbers, PERCENTS).tolist()
        step = 10.0 ** (2 - places)  # whole years where ages span ten to a hundred
        ends = (math.floor(low / step) * step, math.ceil(high / step) * step)
        quantiles = tuple(round(q, places) for q in (ends[0], *inner, ends[1]))
        return Attribute(name, quantiles=quantiles, unit=UNITS.get(name, ""))
    if len(counts) > MOST:
        raise UserError(f"{flag} {name}: {len(counts)} values, such as {known[0][:40]}, are no categories")
    return category(name, known)


def category(name: str, texts: Sequence[str]) -> Attribute:
    """A category with these values, whatever they are called; texts: one per training slice."""
    counts = Counter(texts)
    values = sorted(counts)
    return Attribute(name, tuple(values), tuple(round(counts[v] / len(texts), 6) for v in values))


def encode_rows(attributes: Sequence[Attribute], columns: Mapping[str, Sequence[str]], n: int) -> Tensor:
    """Conditions float32 [n, A] from a column of texts for each attribute's name; without one it is unknown."""
    unknown = np.full(n, np.nan, np.float32)
    rows = [a.encode_all(columns[a.name]) if a.name in columns else unknown for a in attributes]
    return torch.from_numpy(np.stack(rows, 1) if rows else np.zeros((n, 0), np.float32))


def network_conditions(attributes: Sequence[Attribute]) -> list[int]:
    """What the U-Net must know of each attribute: the number of categories, or 0 for a number."""
    return [len(a.values) for a in attributes]


def to_header(attributes: Sequence[Attribute]) -> list[dict[str, Any]]:
    """The attributes as the header of the weights holds them."""
    fields = ("name", "values", "shares", "quantiles", "unit")
    return [{k: v if isinstance(v := getattr(a, k), str) else list(v) for k in fields} for a in attributes]


def from_header(meta: Mapping[str, Any], conditions: Sequence[int]) -> list[Attribute]:
    """The attributes in a header, which may come from anywhere, for a U-Net of these conditions; else ValueError.

    Weights of before this had attributes know the classes alone.
    """
    # The list itself, or what stands for it in weights of before
    given = meta.get("attributes")
    if given is None:
        classes = meta["classes"]
        given = [{"name": GROUP, "values": classes, "shares": [1 / len(classes)] * len(classes)}] if conditions else []
    if not isinstance(given, list) or len(given) != len(conditions) or len(given) > MOST:
        raise ValueError(f"{len(conditions)} conditions do not fit to their names")
    # Each attribute: names that fit into tables and folders, and as many finite numbers as there must be
    attributes = []
    for entry, n in zip(given, conditions):
        if not isinstance(entry, dict) or not isinstance(entry.get("values", []), list):
            raise ValueError("an attribute is not described")
        texts: list[Any] = [entry.get("name"), *entry.get("values", [])]
        is_value = is_folder_name if texts[0] == GROUP else is_text  # groups become folders
        if not is_folder_name(texts[0]) or texts[0] in RESERVED or not all(map(is_value, texts[1:])):
            raise ValueError("an attribute has no proper name or values")
        if len({*texts[1:]}) != n or len(texts[1:]) != n:
            raise ValueError(f"the attribute {texts[0]!r} has another number of values than the network")
        numbers = entry.get("shares" if n else "quantiles")
        if (
            not isinstance(numbers, list) or len(numbers) != (n or len(PERCENTS))
            or not all(type(x) in (int, float) and abs(x) < 1e15 for x in numbers)  # NaN is not
            or not (min(numbers) >= 0 < sum(numbers) if n else sorted(numbers) == numbers and numbers[0] < numbers[-1])
        ):  # fmt: skip
            raise ValueError(f"the attribute {texts[0]!r} has no proper {'shares' if n else 'quantiles'}")
        unit = str(entry.get("unit", ""))[:20]
        values, numbers = tuple(texts[1:]), tuple(float(x) / (sum(numbers) if n else 1) for x in numbers)
        attributes.append(Attribute(texts[0], values, numbers if n else (), () if n else numbers, unit))
    if len({a.name for a in attributes}) != len(attributes):
        raise ValueError("two attributes have one name")
    return attributes


def is_text(value: object) -> bool:
    """Can this be a value: a line of text that fits into a table?"""
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


# ---------------------------------------------------------------------------------------------------------------------
# Values that somebody asks for


def place_of(attributes: Sequence[Attribute], name: str) -> int | None:
    """Which attribute has this name; None if none has."""
    return next((i for i, a in enumerate(attributes) if a.name == name), None)


def asked_attribute(attributes: Sequence[Attribute], name: str, run: str) -> int:
    """Which attribute has this name. UserError if none has."""
    place = place_of(attributes, name)
    if place is None:
        has = f"it has {'; '.join(map(str, attributes))}" if attributes else "it is unconditional"
        raise UserError(f"run {run} has no attribute '{name}': {has}")
    return place


def parse_values(words: Sequence[str], attributes: Sequence[Attribute], run: str) -> dict[str, float]:
    """["age=75", "sex=F"] -> {name: code} for rows of conditions. UserError on what the run does not know."""
    found: dict[str, float] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"'{word}' sets nothing: write it as in age=75 sex=F; age=unknown is possible, too")
        if name in found:
            raise UserError(f"{name} is set twice")
        found[name] = attributes[asked_attribute(attributes, name, run)].encode(value)
    return found


def parse_sweep(word: str, attributes: Sequence[Attribute], run: str) -> tuple[int, list[float]]:
    """ "age=55:90:5" -> (which attribute, codes from the first to the last); "sex" goes through all its categories.

    UserError on what the run does not know.
    """
    name, _, span = word.partition("=")
    place = asked_attribute(attributes, name, run)
    attribute = attributes[place]
    if attribute.values:
        if span:
            raise UserError(f"--sweep {word}: {name} is no number: --sweep {name} goes through all of its values")
        return place, [float(i) for i in range(len(attribute.values))]
    start, stop, step = ([number(part) for part in span.split(":")] + [math.nan] * 3)[:3]
    if span.count(":") != 2 or not (start < stop and 0 < step):  # NaN fails every comparison
        raise UserError(f"--sweep {word} is no sweep: write it as {name}=START:STOP:STEP, within {attribute}")
    if (stop - start) / step > 1000:
        raise UserError(f"--sweep {word} has over a thousand values: take a larger step")
    values = start + step * np.arange(math.floor((stop - start) / step + 1e-6) + 1)
    return place, [attribute.encode(f"{v:.10g}") for v in values]


def draw_rows(attributes: Sequence[Attribute], given: Mapping[str, float], seed: int, indices: Sequence[int]) -> Tensor:
    """Conditions float32 [B, A] of images number `indices` of a seed.

    What is not given is drawn as it was distributed in training, each attribute by itself, by (seed, index); the
    groups take turns instead.
    """
    rows = torch.empty(len(indices), len(attributes))
    for row, k in zip(rows, indices):
        # Always as many random numbers, and one for each place: what is given changes no other attribute.
        u = torch.rand(MOST, generator=generator(seed, 16, k), dtype=torch.float64).tolist()
        for i, a in enumerate(attributes):
            drawn = float(k % len(a.values)) if a.name == GROUP and a.values else a.quantile(u[i])
            row[i] = given.get(a.name, drawn)
    return rows


def set_values(rows: Tensor, attributes: Sequence[Attribute], given: Mapping[str, float]) -> Tensor:
    """Rows of conditions [B, A] with the columns that are given set to these codes, in a copy."""
    rows = rows.clone()
    for i, attribute in enumerate(attributes):
        if attribute.name in given:
            rows[:, i] = given[attribute.name]
    return rows


def in_words(attributes: Sequence[Attribute], row: Sequence[float]) -> list[str]:
    """The values of a row of conditions in words, "" where one is unknown."""
    return [a.decode(float(code)) for a, code in zip(attributes, row)]
