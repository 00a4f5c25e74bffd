# error: TypeError: FixedTokens takes str or bytes, not int
import aici


async def main():
    await aici.FixedTokens(10**100000)


aici.start(main)
