# error: TypeError: following= takes a Label
import aici


class Label:
    def __init__(self):
        self.mark = "0"


async def main():
    await aici.FixedTokens("a", following=Label())


aici.start(main)
