"""The words of a script in the sandbox. The worker runs this text before the script; nothing imports it.

`host` maps the name of each function in `host.py` to a function that asks this process. Arguments go to the
host as they are, because the sandbox loses the caller's line when it refuses them itself.
"""
# ruff: noqa: F821
# mypy: ignore-errors


def _aici_make_words(host):
    class Module:
        pass

    aici = Module()
    aici.log_level = 1

    # Words that take no token: one question, one answer.

    def sync_word(ask):
        def word(*args, **kwargs):
            return ask(aici.log_level, *args, **kwargs)

        return word

    aici.tokenize = sync_word(host["tokenize"])
    aici.detokenize = sync_word(host["detokenize"])
    aici.token_repr = sync_word(host["token_repr"])
    aici.tokens_repr = sync_word(host["tokens_repr"])
    aici.eos_token = sync_word(host["eos_token"])
    aici.get_var = sync_word(host["get_var"])
    aici.set_var = sync_word(host["set_var"])
    aici.append_var = sync_word(host["append_var"])
    aici.check_var = sync_word(host["check_var"])
    aici.check_vars = sync_word(host["check_vars"])
    aici.get_tokens = sync_word(host["get_tokens"])
    aici.get_prompt_len = sync_word(host["get_prompt_len"])
    aici.get_config = sync_word(host["get_config"])
    aici.fork_supported = lambda: True
    aici.backtrack_supported = lambda: True

    ask_label = host["Label"]
    ask_tokens = host["tokens_since"]
    ask_text = host["text_since"]

    class Label:
        def __init__(self, *args):
            self.mark = ask_label(aici.log_level, *args)

        def tokens_since(self):
            return ask_tokens(aici.log_level, self.mark)

        def text_since(self):
            return ask_text(aici.log_level, self.mark)

    aici.Label = Label

    # Words that are awaited: the question is asked when the await begins.

    def async_word(ask):
        async def word(*args, **kwargs):
            return await ask(aici.log_level, *args, **kwargs)

        return word

    aici.FixedTokens = async_word(host["FixedTokens"])
    aici.gen_tokens = async_word(host["gen_tokens"])
    aici.gen_text = async_word(host["gen_text"])
    aici.fork = async_word(host["fork"])
    aici.wait_vars = async_word(host["wait_vars"])
    aici.GetPrompt = async_word(host["GetPrompt"])
    aici.StopToken = async_word(host["StopToken"])
    aici.Noop = async_word(host["Noop"])

    # How a script begins and ends.

    mains = []

    def start(controller):
        kind = type(controller).__name__
        if kind != "coroutine" and kind != "function":
            raise TypeError(f"aici.start() takes an async function or its coroutine, not {kind}")
        if mains:
            raise RuntimeError("aici.start() can be called once only")
        mains.append(controller)
        mains.append("")

    def test(controller):
        start(controller)
        mains[1] = "TEST OK"

    aici.start = start
    aici.test = test

    async def run():
        if not mains:
            return "not started"
        main = mains[0]
        if type(main).__name__ == "function":
            main = main()
        if type(main).__name__ != "coroutine":
            return "not async"
        await main
        if mains[1]:
            print(mains[1])

    aici.server_native = aici
    pyaici = Module()
    pyaici.server = aici
    aici_vllm = Module()
    aici_vllm.aici = aici
    return run, {"aici": aici, "pyaici": pyaici, "aici_vllm": aici_vllm}


_aici_run, _aici_modules = _aici_make_words(_aici_host)
_aici_modules
