"""Sandbox code that every session starts with: the helpers that need to see the model's variables.

Names of the helpers' own begin with two underscores, which are hidden from the lists of variables. What a
helper needs of the builtins is bound once at the start, so that model code can shadow any name.
"""

PRELUDE = r"""
def __final_helper(answer):
    return __final__(f"{answer}")

def __final_var_helper(__name):
    __name = f"{__name}".strip().strip("\"'")
    if not __name.isidentifier():
        return f"FINAL_VAR({__name})"
    try:
        __value = __eval(__name)
    except __NameError:
        return f"FINAL_VAR({__name})"
    if __value is None:
        return f"FINAL_VAR({__name})"
    return __final__(f"{__value}")

def __show_vars_helper():
    __shown = []
    for __name in __candidates__():
        try:
            __eval(__name)
        except __NameError:
            continue
        __shown.append(__name)
    return __shown

def __show(__value, __depth=0):
    if __isinstance(__value, __text_types):
        return f"{__value[:500]!r}"
    __is_dict = __isinstance(__value, __dict)
    if __depth > 2 or not (__is_dict or __isinstance(__value, __list)):
        return f"{__value!r}"[:500]
    __parts = []
    for __item in __value:
        if __len(__parts) == 50:
            __parts.append("...")
            break
        __shown = __show(__item, __depth + 1)
        __parts.append(f"{__shown}: {__show(__value[__item], __depth + 1)}" if __is_dict else __shown)
    return f"{{{', '.join(__parts)}}}" if __is_dict else f"[{', '.join(__parts)}]"

__eval, __NameError, __isinstance, __len, __locals = eval, NameError, isinstance, len, locals
__text_types, __dict, __list = (str, bytes), dict, list
"""
"""Defines the helpers. They call the host functions `__final__(text)` and `__candidates__()`."""

REBIND = "FINAL, FINAL_VAR, SHOW_VARS = __final_helper, __final_var_helper, __show_vars_helper"
"""Gives the helpers their names again, should a block have reassigned them."""

VARIABLES = """
{
    __k: __show(__v)[:500]
    for __k, __v in __locals().items()
    if not __k.startswith("__") and __k not in __hidden__
}
"""
"""The model's variables with the start of their `repr`; needs `__hidden__`, the names to leave out."""

HELPER_NAMES = ("FINAL", "FINAL_VAR", "SHOW_VARS")
