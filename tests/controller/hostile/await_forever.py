# error: out of fuel
import aici


async def main():
    while True:
        await aici.FixedTokens("")


aici.start(main)
