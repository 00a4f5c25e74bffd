# error: .
import aici

nest = []
for _ in range(200000):
    nest = [nest]


async def main():
    await aici.FixedTokens(nest)


aici.start(main)
