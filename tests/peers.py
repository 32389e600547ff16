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


def timm_model(name: str) -> ModuleType:
    """``timm_model("vision_transformer")``: that file of timm.models, whose layers are imported as far as they go."""
    layers, data = (timm(f"{package}.{first}") for package, first in (("layers", "helpers"), ("data", "constants")))
    names = ("torchvision", "torchvision.ops", "torchvision.ops.misc")
    stubs = {n: types.ModuleType(n) for n in names if n not in sys.modules}
    for stub in stubs.values():
        stub.FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})  # type: ignore[attr-defined]
    sys.modules.update(stubs)
    try:
        package = sys.modules["timm.layers"]
        if not hasattr(package, "PatchEmbed"):
            sys.modules["timm"].__version__ = "0"  # type: ignore[attr-defined]
            sys.modules["timm.data"].__dict__.update(vars(data))
            path = f"{layers.__file__}".replace("helpers.py", "__init__.py")
            spec = importlib.util.spec_from_file_location("timm.layers", path)
            assert spec is not None
            assert spec.loader is not None
            package.__spec__ = spec
            spec.loader.exec_module(package)
        return importlib.import_module(f"timm.models.{name}")
    finally:
        for n in stubs:
            del sys.modules[n]
