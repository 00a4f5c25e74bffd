# error: ZeroDivisionError: division by zero
import aici


class Trap:
    def __str__(self):
        return 1 / 0

    def __repr__(self):
        return 1 / 0


async def main():
    await aici.FixedTokens("a")
    print(Trap())


aici.start(main)
