# error: RuntimeError: a script may hold 1024 labels
import aici

hoard = []


async def main():
    await aici.FixedTokens("a")
    while True:
        hoard.append(aici.Label())


aici.start(main)
