"""A sub-package that shares its name with a public function and is called like it: `from rlhf_ray import ppo` gives the package
`rlhf_ray.ppo`, and `ppo(config)` runs the function. Python binds a sub-package as an attribute of its parent when it is first
imported, so a lazily imported function of that name would be the function or the package, depending on what was imported before."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """Set as `__class__` of the package's module. `FUNCTION` in the package names module and function."""

    FUNCTION: tuple[str, str]

    def _function(self) -> Any:
        module, name = self.FUNCTION
        return getattr(import_module(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())
