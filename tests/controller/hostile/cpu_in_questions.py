# error: a script may compute for 0.1 s between two awaits
import aici


async def main():
    await aici.FixedTokens("a")
    while True:
        aici.tokenize("abc" * 100)


aici.start(main)
