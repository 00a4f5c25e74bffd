# error: too many forks \(max=16\)
import aici


async def main():
    await aici.fork(256)
    await aici.gen_tokens(max_tokens=1)


aici.start(main)
