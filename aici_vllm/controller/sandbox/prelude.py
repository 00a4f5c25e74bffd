"""The words of a script in the sandbox. The worker runs this text before the script; nothing imports it.

`_aici_asked` and `_aici_awaited` map the names of words to functions that ask this process. Arguments
go to the host as they are, because the sandbox loses the caller's line when it refuses them itself.
Every line is part of every script's dump, so there are few; `prelude_decisions.py` has the rest.
"""
# ruff: noqa: F821
# mypy: ignore-errors


def _aici_make_words(asked, awaited):
    class module:
        pass

    aici = module()
    aici.log_level = 1

    def asks(ask):
        return lambda *args, **kwargs: ask(aici.log_level, *args, **kwargs)

    def awaits(ask):
        async def word(*args, **kwargs):
            return await ask(aici.log_level, *args, **kwargs)

        return word

    words = {name: asks(ask) for name, ask in asked.items()}
    words.update({name: awaits(ask) for name, ask in awaited.items()})
    new_label, tokens_after, text_after = words["Label"], words["tokens_since"], words["text_since"]

    class Label:
        def __init__(self, *args):
            self.mark, self.ptr = new_label(*args)

        def tokens_since(self):
            return tokens_after(self.mark)

        def text_since(self):
            return text_after(self.mark)

    mains = []

    def start(controller, ending=""):
        kind = type(controller).__name__
        if kind != "coroutine" and kind != "function":
            raise TypeError(f"aici.start() takes an async function or its coroutine, not {kind}")
        if mains:
            raise RuntimeError("aici.start() can be called once only")
        mains.append((controller, ending))

    async def run():
        if not mains:
            return "not started"
        main, ending = mains[0]
        if type(main).__name__ == "function":
            try:
                main = main()
            except TypeError as error:
                if "missing 1 required positional argument" not in str(error):
                    raise
                main = main(aici.controller_arg())
        if type(main).__name__ != "coroutine":
            return "not async"
        await main
        print(ending, end="")

    for name, word in words.items():
        setattr(aici, name, word)
    aici.Label = Label
    aici.start = start
    aici.test = lambda controller: start(controller, "TEST OK\n")
    aici.server_native = aici
    pyaici = module()
    pyaici.server = aici
    aici_vllm = module()
    aici_vllm.aici = aici
    return run, {"aici": aici, "pyaici": pyaici, "aici_vllm": aici_vllm}


_aici_run, _aici_modules = _aici_make_words(_aici_asked, _aici_awaited)
_aici_asked = _aici_awaited = None
