# error: tokens of fixed text do not fit
import aici


async def main():
    await aici.FixedTokens("a" * 5000)


aici.start(main)
