"""The word `Label`, for scripts that name it; run after `prelude.py`."""
# ruff: noqa: F821
# mypy: ignore-errors
# ---


def _aici_make_label(new_label, tokens_after, text_after):
    class Label:
        def __init__(self, *args):
            self.mark, self.ptr = new_label(*args)

        def tokens_since(self):
            return tokens_after(self.mark)

        def text_since(self):
            return text_after(self.mark)

    return Label


_aici.Label = _aici_make_label(_aici.Label, _aici.tokens_since, _aici.text_since)
