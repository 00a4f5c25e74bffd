# error: too many forks \(a request may make 256 branches in all\)
import aici


async def main():
    await aici.fork([aici.Branch.noop()] * 3000)


aici.start(main)
