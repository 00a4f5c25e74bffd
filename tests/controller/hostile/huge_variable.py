# error: LimitError|may hold 1048576
import aici


async def main():
    await aici.FixedTokens("a")
    while True:
        aici.append_var("v", "x" * 100000)


aici.start(main)
