"""Early stopping."""

from __future__ import annotations

import math

import pytest

from mpips.config import EarlyStopping
from mpips.model.message import Stop
from mpips.server.early_stopping import Patience

NAN, INF = math.nan, math.inf


def verdicts(rule: EarlyStopping, *values: float) -> list[Stop]:
    patience = Patience()
    return [patience.judge(value, rule) for value in values]


@pytest.mark.parametrize(("rule", "values", "stops_at"), [
    (EarlyStopping(), [3, 2, 1, 0], None),
    (EarlyStopping(patience=2), [1, 1, 1], 2),
    (EarlyStopping(patience=2), [1, 0, 2, 0, 2], 4),
    (EarlyStopping(patience=1, mode="min"), [3, 2, 1, 1], 3),
    (EarlyStopping(patience=1, min_delta=0.5), [1, 1.6, 2.1], 2),
    (EarlyStopping(patience=1, min_delta=0.5, mode="min"), [2, 1.4, 0.9], 2),
    (EarlyStopping(patience=2, min_delta=0.5), [1, 1.4, 1.8], None),  # two small gains are one large one
    (EarlyStopping(patience=3), [NAN, NAN, NAN], 2),
    (EarlyStopping(patience=2), [NAN, 1, NAN, 2, NAN, NAN], 5),
    (EarlyStopping(patience=2), [-INF, 0, INF, INF, INF], 4),
    (EarlyStopping(patience=2, mode="min"), [INF, 5, 5, 5], 3),
], ids=str)  # fmt: skip
def test_patience(rule: EarlyStopping, values: list[float], stops_at: int | None) -> None:
    expected = [Stop.PATIENCE if i == stops_at else Stop.NO for i in range(len(values))]
    assert verdicts(rule, *values) == expected


@pytest.mark.parametrize(("rule", "values", "expected"), [
    (EarlyStopping(target=0.9), [0.8, 0.9], [Stop.NO, Stop.TARGET]),
    (EarlyStopping(target=0.1, mode="min"), [0.2, 0.1], [Stop.NO, Stop.TARGET]),
    (EarlyStopping(target=0.9), [NAN, INF], [Stop.NO, Stop.TARGET]),
    (EarlyStopping(target=0.0, mode="min"), [1.0, 0.0], [Stop.NO, Stop.TARGET]),
    (EarlyStopping(target=0.9, patience=1), [0.95, 0.95], [Stop.TARGET, Stop.TARGET]),
])  # fmt: skip
def test_target(rule: EarlyStopping, values: list[float], expected: list[Stop]) -> None:
    assert verdicts(rule, *values) == expected


def test_the_best_value_is_remembered_and_a_resumed_judge_goes_on() -> None:
    rule, patience = EarlyStopping(patience=3), Patience()
    for value in (1.0, 5.0, 4.0, 4.5):
        patience.judge(value, rule)
    assert patience == Patience(best=5.0, waited=2)
    assert Patience(patience.best, patience.waited).judge(5.0, rule) == Stop.PATIENCE
