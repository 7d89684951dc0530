"""Stands for a package that SGLang imports and never calls on a CPU: every name in it is a mock.

Copied as NAME/__init__.py: `sgl_kernel` has CUDA builds only, and so has PyPI's torchvision.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any
from unittest.mock import MagicMock

__version__ = "0.0.0"


class _Anything(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module below this package, and fills it with mocks."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if not name.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__dict__["__getattr__"] = lambda name: MagicMock(name=name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, _Anything())


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
