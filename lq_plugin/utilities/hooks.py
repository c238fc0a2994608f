"""Forward hooks of one module, and what stands in for its methods, which its copies do not take over.

`copy.deepcopy` and pickle copy the hooks of a module with it, and what they are bound to: a model that copies a part of
itself while it runs (weight averages, inner loops of meta learning) would copy whatever watches it, and the copy would
be watched as if it were the part itself. What is put on a user's modules for a while is therefore put on here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def before(module: nn.Module, function: Callable[..., Any], **options: Any) -> RemovableHandle:
    """Returns the handle of a forward pre-hook that is called for this module, and not for copies of it.

    Args:
        module: that is watched.
        function: the hook.
        options: of `nn.Module.register_forward_pre_hook`.
    """
    return module.register_forward_pre_hook(OwnHook(module, function), **options)


def after(module: nn.Module, function: Callable[..., Any], **options: Any) -> RemovableHandle:
    """Returns the handle of a forward hook that is called for this module, and not for copies of it.

    Args:
        module: that is watched.
        function: the hook.
        options: of `nn.Module.register_forward_hook`; with `always_call` put a hook `before` it also.
    """
    return module.register_forward_hook(OwnHook(module, function), **options)


class OwnHook:
    """A hook of one module; that of a copied or unpickled module takes itself away at the first call.

    Args:
        module: that is watched; None: none.
        function: the hook.
    """

    def __init__(self, module: nn.Module | None = None, function: Callable[..., Any] | None = None) -> None:
        self.module, self.function = module, function

    def __reduce__(self) -> tuple[type[OwnHook], tuple[()]]:
        return OwnHook, ()

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        if module is self.module and self.function is not None:
            return self.function(module, *args)
        # All at once: torch goes over the hooks themselves where a forward pass has failed.
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, OwnHook) and hook.module is not module]:
                del hooks[key]
                for flags in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(key, None)
        return None


class StandIn:
    """Stands in `module.__dict__` for a method of the module; copies of the module have the method itself.

    Args:
        method: what the module has without it.
        function: is called in its place.
    """

    def __init__(self, method: Callable[..., Any], function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)  # Lightning reads the signatures of steps
        self.method, self.function = method, function

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any]]:
        return _itself, (self.method,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method
