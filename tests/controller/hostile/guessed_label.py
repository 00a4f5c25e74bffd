# error: ValueError: this label is gone
import aici


class Label:
    def __init__(self):
        self.mark = 99


async def main():
    await aici.FixedTokens("a", following=Label())


aici.start(main)
