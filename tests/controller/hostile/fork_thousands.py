# error: arguments of one call|too many forks|may become|may compute
import aici


async def main():
    await aici.fork(1000)


aici.start(main)
