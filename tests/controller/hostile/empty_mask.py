# error: ValueError: not a list of branches: sample_mask allows no token
import aici


async def main():
    await aici.fork([aici.Branch(sample_mask=aici.TokenSet())])


aici.start(main)
