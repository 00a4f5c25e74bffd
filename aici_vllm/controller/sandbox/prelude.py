"""The words of a script in the sandbox. The worker runs what follows the line of dashes; nothing imports it.

`_aici_asked` and `_aici_awaited` map the names of words to functions that ask this process. Arguments
go to the host as they are, because the sandbox loses the caller's line when it refuses them itself.

Every function and every name that is left at the end is part of each dump of every script and costs time in
most turns; statements outside functions do not. More words are in `prelude_label.py`, `prelude_decisions.py`.
"""
# ruff: noqa: F821
# mypy: ignore-errors
# ---


class module:
    pass


_aici = module()
_aici.log_level = 1
for _aici_name, _aici_ask in _aici_asked.items():
    setattr(
        _aici,
        _aici_name,
        lambda *args, _aici_ask=_aici_ask, **kwargs: _aici_ask(_aici.log_level, *args, **kwargs),
    )
for _aici_name, _aici_ask in _aici_awaited.items():

    async def _aici_word(*args, _aici_ask=_aici_ask, **kwargs):
        return await _aici_ask(_aici.log_level, *args, **kwargs)

    setattr(_aici, _aici_name, _aici_word)
_aici_begin = _aici.begin_main
_aici_mains = []


def _aici_start(controller, ending=""):
    _aici_mains.append(_aici_begin(type(controller).__name__, ending) or controller)


_aici.start = _aici_start
_aici.test = lambda controller: _aici_start(controller, "TEST OK\n")
_aici.server_native = _aici
_aici_modules = {"aici": _aici, "pyaici": module(), "aici_vllm": module()}
_aici_modules["pyaici"].server = _aici
_aici_modules["aici_vllm"].aici = _aici
_aici_asked = _aici_awaited = _aici_ask = module = None
