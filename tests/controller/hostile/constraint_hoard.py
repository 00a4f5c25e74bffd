# error: ValueError: a script may make 256 constraints
import aici

hoard = []


async def main():
    for i in range(10000):
        hoard.append(aici.RegexConstraint(str(i)))
    await aici.FixedTokens("a")


aici.start(main)
