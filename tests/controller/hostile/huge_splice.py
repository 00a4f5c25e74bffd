# error: a splice of 50000 tokens does not fit: the context holds 200
import aici


async def main():
    await aici.fork([aici.Branch(splices=[aici.Splice(ff_tokens=[97] * 50000)])])


aici.start(main)
