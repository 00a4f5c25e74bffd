# error: TypeError
import aici


async def main():
    mask = aici.TokenSet()
    mask.bits = b"1234"
    await aici.fork([aici.Branch(sample_mask=mask)])


aici.start(main)
