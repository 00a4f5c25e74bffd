# error: ValueError: the arguments of one call may hold 1048576 characters, not 3000003 \(line 6\)
import aici


async def main():
    await aici.FixedTokens("a" * 3000000)


aici.start(main)
