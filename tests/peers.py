"""Single modules of peers whose package cannot be imported whole: timm without torchvision, which would replace torch."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import types
from types import ModuleType


def timm(name: str) -> ModuleType:
    """``timm("optim.lamb")``: that file of timm, without running the packages' ``__init__`` around it."""
    if "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        where = list(spec.submodule_search_locations)
        packages = {"timm": where[0]}
        packages |= {f"timm.{m.name}": f"{where[0]}/{m.name}" for m in pkgutil.iter_modules(where) if m.ispkg}
        for package, folder in packages.items():
            bare = types.ModuleType(package)
            bare.__path__ = [folder]
            sys.modules[package] = bare
    return importlib.import_module(f"timm.{name}")
