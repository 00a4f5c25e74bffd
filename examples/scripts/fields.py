"""Constraints of four kinds in a row; what they force is spliced, not sampled."""

from aici_vllm import aici


async def fields():
    print("before the first token")
    await aici.FixedTokens("A person: ")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    person = await aici.gen_text(json_schema=schema, max_tokens=60)
    aici.set_var("person", person)
    await aici.FixedTokens("\nShe pays in")
    await aici.gen_tokens(options=[" pounds", " euros", " dollars"], store_var="currency")
    await aici.FixedTokens("\nPhone: ")
    await aici.gen_tokens(regex=r"[0-9]{3}-[0-9]{4}", max_tokens=12, store_var="phone")
    await aici.FixedTokens('\nAs the book says, "')
    await aici.gen_tokens(substring="all is well that ends well", store_var="quote")


aici.start(fields())
