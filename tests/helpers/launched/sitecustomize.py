"""Of processes that tests start: they import torch in less time, which is more than the rest of most of these tests takes.

Without its compiler, until they ask for more of it than not to compile: whoever creates an optimizer imports all of it, to
mark a few methods, 1.5 s on each rank. And without collecting garbage in what the import leaves, neither meanwhile nor at the
end: 0.5 s.
"""

import gc
import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
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


class Frozen:
    """Finds torch as any other package is found, and makes what its import leaves exempt from garbage collection."""

    def find_spec(self, name: str, *where: Any) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec and spec.loader:
            self.execute = spec.loader.exec_module
            spec.loader.exec_module = self.exec_module  # type: ignore[method-assign]
        return spec

    def exec_module(self, module: ModuleType) -> None:
        gc.disable()
        self.execute(module)
        gc.enable()
        gc.freeze()


sys.modules[NAME] = Absent(NAME)
sys.meta_path.insert(0, Frozen())  # type: ignore[arg-type]
