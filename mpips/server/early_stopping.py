"""When to stop early, judged by the server alone; its state is in the checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpips.config import EarlyStopping
from mpips.model.message import Stop


@dataclass
class Patience:
    """What the validations so far say.

    Attributes:
        best: the best value so far; NaN before the first.
        waited: validations since the last gain.
    """

    best: float = math.nan
    waited: int = 0

    def judge(self, value: float, rule: EarlyStopping) -> Stop:
        """Take note of a validation; a NaN is no gain.

        Returns:
            Stop.NO to go on, else why to stop.
        """
        sign = 1 if rule.mode == "max" else -1
        if (math.isnan(self.best) and not math.isnan(value)) or sign * (value - self.best) > rule.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if rule.target is not None and sign * (value - rule.target) >= 0:
            return Stop.TARGET
        return Stop.PATIENCE if rule.patience and self.waited >= rule.patience else Stop.NO
