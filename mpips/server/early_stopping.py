"""Early stopping, decided by the server alone; its state is part of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpips.config import EarlyStopping
from mpips.model.message import Stop


@dataclass
class Patience:
    """The best validation value so far, and the validations since.

    Attributes:
        best: the best value so far; NaN before the first.
        waited: the number of validations since the last gain.
    """

    best: float = math.nan
    waited: int = 0

    def judge(self, value: float, rule: EarlyStopping) -> Stop:
        """Record a validation value; a NaN is no gain.

        Args:
            value: the value.
            rule: the settings of early stopping.

        Returns:
            Stop.NO to continue, else the reason to stop.
        """
        sign = 1 if rule.mode == "max" else -1
        if (math.isnan(self.best) and not math.isnan(value)) or sign * (value - self.best) > rule.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if rule.target is not None and sign * (value - rule.target) >= 0:
            return Stop.TARGET
        return Stop.PATIENCE if rule.patience and self.waited >= rule.patience else Stop.NO
