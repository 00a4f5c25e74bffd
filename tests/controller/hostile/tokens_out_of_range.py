# error: ValueError: not a list of branches: token 1000000000 is not in 0\.\.259
import aici


async def main():
    await aici.fork([aici.Branch(splices=[aici.Splice(ff_tokens=[10**9])])])


aici.start(main)
