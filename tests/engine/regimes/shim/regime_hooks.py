"""Changes to Triton and vLLM, made while they are imported, that let every engine regime run on a CPU.

This module imports neither: most processes that load it never need them.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from types import ModuleType

ASYNC_SCHEDULING = "AICI_TEST_ASYNC_SCHEDULING"
"""Set to 1 in the environment: vLLM schedules asynchronously on the CPU platform."""

Change = Callable[[ModuleType], None]


def accept_triton_on_cpu() -> None:
    """Give Triton a `cpu` backend whose driver says it is active.

    vLLM asks for one before it takes Model Runner V2; kernels run only where TRITON_INTERPRET=1.
    """
    _after_import("triton.backends", _add_cpu_backend)


def let_interpreter_take_integer_masks() -> None:
    """Let Triton's interpreter load and store under masks that it made integers of.

    It does so where a kernel joins comparisons of scalars with others, as vLLM's n-gram drafter does.
    """
    _after_import("triton.runtime.interpreter", _wrap_masked_access)


def filter_top_p_without_a_kernel() -> None:
    """Have vLLM do as without Triton: the interpreter refuses the arguments of its kernel."""
    _after_import(
        "vllm.v1.sample.ops.topk_topp_sampler", lambda sampler: setattr(sampler, "HAS_TRITON", False)
    )


def let_environment_choose_async_scheduling() -> None:
    """Turn async scheduling back on, where the environment says so, after the CPU platform turned it off."""
    _after_import("vllm.platforms.cpu", _wrap_config_check)


def _add_cpu_backend(backends: ModuleType) -> None:
    class InterpreterDriver:
        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> None:
            # torch's compiler asks, and takes this error for an answer.
            raise RuntimeError("the interpreter compiles for no target")

    backends.backends["cpu"] = backends.Backend(compiler=backends.BaseBackend, driver=InterpreterDriver)


def _wrap_masked_access(interpreter: ModuleType) -> None:
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self, pointers, mask, *args):  # type: ignore[no-untyped-def]
        mask.data = mask.data.astype(bool)
        return load(self, pointers, mask, *args)

    def create_masked_store(self, pointers, value, mask, *args):  # type: ignore[no-untyped-def]
        mask.data = mask.data.astype(bool)
        return store(self, pointers, value, mask, *args)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store


def _wrap_config_check(platform: ModuleType) -> None:
    check = platform.CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):  # type: ignore[no-untyped-def]
        check(cls, vllm_config)
        if os.environ.get(ASYNC_SCHEDULING) == "1":
            vllm_config.scheduler_config.async_scheduling = True

    platform.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _after_import(name: str, change: Change) -> None:
    if name in sys.modules:
        raise RuntimeError(f"{name} is imported already; load the shim before it")
    sys.meta_path.insert(0, _ChangingFinder(name, change))


class _ChangingFinder(MetaPathFinder):
    """Finds one module where it lies, and has it changed once its code has run."""

    def __init__(self, name: str, change: Change) -> None:
        self.name = name
        self.change = change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ChangingLoader(spec.loader, self.change)
        return spec


class _ChangingLoader(Loader):
    def __init__(self, loader: Loader, change: Change) -> None:
        self.loader = loader
        self.change = change

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.change(module)
