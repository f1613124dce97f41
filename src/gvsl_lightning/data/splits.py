"""Which cases train, validate and test."""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gvsl_lightning.errors import InputError

Amount = int | float
"""Below 1 a share of the cases, from 1 on their number (the command line may make 5 to 5.0)."""


@dataclass(frozen=True)
class Split:
    """Indices of cases, without overlap."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]


def split_cases(
    count: int,
    val: Amount,
    test: Amount,
    seed: int | None = 0,
    folds: int | None = None,
    fold: int = 0,
    strata: Sequence[Any] | None = None,
    groups: Sequence[Any] | None = None,
) -> Split:
    """Split cases into training, validation and test.

    Args:
        count: Number of cases.
        val: How many, or which share, validate; without effect where there are folds.
        test: How many, or which share, test.
        seed: Of the random order; None: the order stays, and the last cases test.
        folds: Deal the cases that do not test into so many folds; one validates.
        fold: The number of that one.
        strata: Class of every case: in a random order, each part gets its share of every class.
        groups: Subject of every case: no subject is in two parts. A part may then be larger than
            `val` and `test` say, by the other volumes of one subject.

    Returns:
        The split; each part in ascending order.

    Raises:
        InputError: There are too few cases.
    """
    order = list(range(count))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(count).tolist()
        if strata is not None:
            sizes, places = Counter(strata), Counter[Any]()
            shares: dict[int, float] = {}
            for case in order:
                places[strata[case]] += 1
                shares[case] = places[strata[case]] / (sizes[strata[case]] + 1)
            order.sort(key=shares.__getitem__)
    subjects = list(range(count)) if groups is None else list(groups)
    order = _together(order, subjects)
    testing = _number("test", test, count)
    rest, tested = _cut(order, testing, subjects)
    if folds is None:
        validating = _number("val", val, count)
        if validating > len(rest):
            raise InputError(
                f"There are {count} cases, and {validating} for validation and {testing} for test "
                "are more; lower val or test."
            )
        trained, validated = _cut(rest, validating, subjects)
    else:
        dealt = list(dict.fromkeys(subjects[case] for case in rest))
        if folds > len(dealt):
            raise InputError(f"There are {len(dealt)} cases for {folds} folds; make fewer folds.")
        chosen = set(dealt[fold::folds])
        validated = [case for case in rest if subjects[case] in chosen]
        trained = [case for case in rest if subjects[case] not in chosen]
    return Split(*(tuple(sorted(part)) for part in (trained, validated, tested)))


def subjects_of(names: Sequence[str], group_by: str | None) -> list[str]:
    r"""Tell which cases are of one subject.

    Args:
        names: Names of all cases.
        group_by: A regular expression that finds the subject in each name, such as `(sub-\d+)`; or
            a CSV file with the columns `name` and `group`; None: every case is a subject.

    Returns:
        The subject of every case.

    Raises:
        InputError: The file cannot be read, or a case has no subject.
    """
    if group_by is None:
        return list(names)
    if group_by.lower().endswith(".csv"):
        try:
            with open(Path(group_by).expanduser(), encoding="utf-8-sig", newline="") as file:
                listed = {row["name"]: row["group"] for row in csv.DictReader(file)}
        except (OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{group_by} cannot be read as a table with the columns name and group ({error}); "
                "correct it."
            ) from error
        found = [listed.get(name) for name in names]
    else:
        try:
            pattern = re.compile(group_by)
        except re.error as error:
            raise InputError.about(
                "group_by", f"is {group_by}, which is no regular expression ({error}); correct it."
            ) from error
        matches = [pattern.search(name) for name in names]
        found = [
            match and ("/".join(filter(None, match.groups())) or match[0]) for match in matches
        ]
    for name, subject in zip(names, found, strict=True):
        if not subject:
            raise InputError.about(
                "group_by",
                f"is {group_by}, which finds no subject for the case {name}; correct it.",
            )
    return [str(subject) for subject in found]


def read_split(path: str | Path, names: Sequence[str]) -> Split:
    """Read which cases train, validate and test.

    Args:
        path: JSON file `{"train": [...], "val": [...], "test": [...]}` of case names.
        names: Names of all cases.

    Returns:
        Their indices, in the order of the file.

    Raises:
        InputError: The file is unreadable, names an unknown case, or names one twice.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        parts = [list(content.get(role, ())) for role in ("train", "val", "test")]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f'{path} cannot be read as {{"train": [...], "val": [...], "test": [...]}} ({error}); '
            "correct it."
        ) from error
    numbers = {name: index for index, name in enumerate(names)}
    listed = [name for part in parts for name in part]
    for name in listed:
        if name not in numbers:
            raise InputError(
                f"{path} names the case {name!r} and there is none of this name; the first ones "
                f"are {', '.join(names[:3])}."
            )
    name, times = Counter(listed).most_common(1)[0] if listed else ("", 0)
    if times > 1:
        raise InputError(f"{path} names the case {name!r} {times} times; name it once.")
    return Split(*(tuple(numbers[name] for name in part) for part in parts))


def choose_labelled(
    cases: Sequence[int],
    labelled: Amount | None,
    seed: int = 0,
    strata: Sequence[Any] | None = None,
    groups: Sequence[Any] | None = None,
) -> tuple[int, ...]:
    """Choose some of the training cases.

    Args:
        cases: Indices of the training cases.
        labelled: How many, or which share, to choose; None: all.
        seed: Of the choice. A smaller choice of the same seed is part of a larger one.
        strata: Class of every case that there is: the classes take turns.
        groups: Subject of every case that there is: all volumes of a subject are chosen before the
            next subject.

    Returns:
        The chosen ones in ascending order.

    Raises:
        InputError: There are fewer.
    """
    if labelled is None:
        return tuple(cases)
    number = _number("labelled", labelled, len(cases))
    order = np.random.default_rng(seed).permutation(len(cases))
    chosen = [cases[place] for place in order]
    if strata is not None:
        turns: Counter[Any] = Counter()
        keyed = []
        for place, case in enumerate(chosen):
            keyed.append((turns[strata[case]], place, case))
            turns[strata[case]] += 1
        chosen = [case for _, _, case in sorted(keyed)]
    if groups is not None:
        chosen = _together(chosen, groups)
    return tuple(sorted(chosen[:number]))


def require_apart_subjects(split: Split, subjects: Sequence[str]) -> None:
    """Refuse a split that has volumes of one subject in two parts.

    Raises:
        InputError: A subject is in two parts.
    """
    parts: dict[str, str] = {}
    for role in ("train", "val", "test"):
        for case in getattr(split, role):
            if parts.setdefault(subjects[case], role) != role:
                raise InputError(
                    f"The subject {subjects[case]} has volumes in {parts[subjects[case]]} and in "
                    f"{role}; correct the split or group_by."
                )


def _together(order: Sequence[int], subjects: Sequence[Any]) -> list[int]:
    """The same cases, those of a subject behind the first of them."""
    first: dict[Any, int] = {}
    for place, case in enumerate(order):
        first.setdefault(subjects[case], place)
    return sorted(order, key=lambda case: first[subjects[case]])


def _cut(order: list[int], number: int, subjects: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Cut off the last cases: so many, and the others of the first one's subject."""
    start = len(order) - number
    while 0 < start < len(order) and subjects[order[start - 1]] == subjects[order[start]]:
        start -= 1
    return order[:start], order[start:]


def _number(name: str, amount: Amount, count: int) -> int:
    """How many of `count` an amount is; a share above 0 is at least one."""
    if 0 <= amount < 1:
        return max(round(amount * count), int(amount > 0 and count > 0))
    if not (0 <= amount <= count and amount == int(amount)):
        raise InputError(
            f"{name} is {amount:g} and there are {count} cases; give a share below 1 or a whole "
            f"number up to {count}."
        )
    return int(amount)
