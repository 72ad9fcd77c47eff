"""Of processes that tests start: they do without torch's compiler, until they ask for more of it than not to compile.

Whoever creates an optimizer imports all of it, to mark a few methods as not to be compiled: 1.5 s on each rank, more than the
rest of most of these tests.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"


class Absent(ModuleType):
    """Stands in for the package; any other name than these two brings it in."""

    @staticmethod
    def disable(fn: Any = None, recursive: bool = True, **how: Any) -> Any:
        return fn or (lambda wrapped: wrapped)

    @staticmethod
    def graph_break(msg: str = "") -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # who looks through all modules does not mean this one
            raise AttributeError(name)
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME]
            sys.modules["torch"].__dict__.pop("_dynamo", None)
        return getattr(importlib.import_module(NAME), name)


sys.modules[NAME] = Absent(NAME)
