# error: ValueError: cannot backtrack 100 tokens
import aici


async def main():
    await aici.fork([aici.Branch(splices=[aici.Splice(backtrack=100, ff_tokens=[])])])


aici.start(main)
