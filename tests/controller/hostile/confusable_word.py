# error: FixedTokens|NameError|AttributeError
import aici


async def main():
    await aici.FixedТokens("the T is Cyrillic")


aici.start(main)
