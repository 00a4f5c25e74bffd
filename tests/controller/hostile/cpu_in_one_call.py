# error: a script may compute for 0.2 s before its first await
import aici

total = sum(range(10**12))


async def main():
    await aici.FixedTokens(str(total))


aici.start(main)
