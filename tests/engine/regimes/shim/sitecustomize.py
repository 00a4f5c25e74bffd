"""Python imports this at start-up in every process that has this folder on its PYTHONPATH."""

import os

import regime_hooks

if os.environ.get("TRITON_INTERPRET") == "1":
    regime_hooks.accept_triton_on_cpu()
    regime_hooks.let_interpreter_take_integer_masks()
    regime_hooks.filter_top_p_without_a_kernel()
if os.environ.get(regime_hooks.ASYNC_SCHEDULING) == "1":
    regime_hooks.let_environment_choose_async_scheduling()
