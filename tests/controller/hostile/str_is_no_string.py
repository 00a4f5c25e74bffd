# error: .
import aici


class Trap:
    def __str__(self):
        return 3


async def main():
    await aici.FixedTokens("a")
    raise ValueError(str(Trap()))


aici.start(main)
