"""Early stopping."""

from __future__ import annotations

import math

import pytest

from mpips.config import Stopping
from mpips.model.message import Stop
from mpips.server.early_stopping import Patience

NAN, INF = math.nan, math.inf


def verdicts(rule: Stopping, *values: float) -> list[Stop]:
    patience = Patience()
    return [patience.judge(value, rule) for value in values]


@pytest.mark.parametrize(("rule", "values", "stops_at"), [
    (Stopping(), [3, 2, 1, 0], None),
    (Stopping(patience=2), [1, 1, 1], 2),
    (Stopping(patience=2), [1, 0, 2, 0, 2], 4),
    (Stopping(patience=1, goal="min"), [3, 2, 1, 1], 3),
    (Stopping(patience=1, min_gain=0.5), [1, 1.6, 2.1], 2),
    (Stopping(patience=1, min_gain=0.5, goal="min"), [2, 1.4, 0.9], 2),
    (Stopping(patience=2, min_gain=0.5), [1, 1.4, 1.8], None),  # two small gains are one large one
    (Stopping(patience=3), [NAN, NAN, NAN], 2),
    (Stopping(patience=2), [NAN, 1, NAN, 2, NAN, NAN], 5),
    (Stopping(patience=2), [-INF, 0, INF, INF, INF], 4),
    (Stopping(patience=2, goal="min"), [INF, 5, 5, 5], 3),
], ids=str)  # fmt: skip
def test_patience(rule: Stopping, values: list[float], stops_at: int | None) -> None:
    expected = [Stop.PATIENCE if i == stops_at else Stop.NO for i in range(len(values))]
    assert verdicts(rule, *values) == expected


@pytest.mark.parametrize(("rule", "values", "expected"), [
    (Stopping(target=0.9), [0.8, 0.9], [Stop.NO, Stop.TARGET]),
    (Stopping(target=0.1, goal="min"), [0.2, 0.1], [Stop.NO, Stop.TARGET]),
    (Stopping(target=0.9), [NAN, INF], [Stop.NO, Stop.TARGET]),
    (Stopping(target=0.0, goal="min"), [1.0, 0.0], [Stop.NO, Stop.TARGET]),
    (Stopping(target=0.9, patience=1), [0.95, 0.95], [Stop.TARGET, Stop.TARGET]),
])  # fmt: skip
def test_target(rule: Stopping, values: list[float], expected: list[Stop]) -> None:
    assert verdicts(rule, *values) == expected


def test_the_best_value_is_remembered_and_a_resumed_judge_goes_on() -> None:
    rule, patience = Stopping(patience=3), Patience()
    for value in (1.0, 5.0, 4.0, 4.5):
        patience.judge(value, rule)
    assert patience == Patience(best=5.0, waited=2)
    assert Patience(patience.best, patience.waited).judge(5.0, rule) == Stop.PATIENCE
