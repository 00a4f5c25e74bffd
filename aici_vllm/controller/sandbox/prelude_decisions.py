"""Words for scripts that make constraints and token sets or decide by themselves; run after the others.

Only scripts that name one of these words get them: what a script is given is part of each of its dumps.
`every_byte` is each byte once, as the sandbox cannot make one of a number.
"""
# ruff: noqa: F821
# mypy: ignore-errors
# ---


def _aici_make_decisions(aici, every_byte):
    # Token sets: the packed bits as bytes, so that they are copied when the script forks.

    ask_empty = aici.empty_set
    ask_full = aici.full_set

    class TokenSet:
        def __init__(self, *args):
            self.size, self.bits = ask_empty(*args)

        def __getitem__(self, token):
            if not 0 <= token < self.size:
                raise IndexError(f"token {token} is not in 0..{self.size - 1}")
            return self.bits[token >> 3] >> (token & 7) & 1 == 1

        def __setitem__(self, token, value):
            if value is not True and value is not False:
                raise TypeError("a token is in the set or not: assign True or False")
            if self[token] != value:
                at = token >> 3
                byte = self.bits[at] ^ (1 << (token & 7))
                self.bits = self.bits[:at] + every_byte[byte : byte + 1] + self.bits[at + 1 :]

        def set_all(self, value):
            self.bits = (ask_full() if value else ask_empty())[1]

        def num_set(self):
            return bin(int(self.bits.hex(), 16)).count("1")

        def __repr__(self):
            return f"TokenSet: {self.num_set()}/{self.size}"

    def all_tokens():
        tokens = TokenSet()
        tokens.set_all(True)
        return tokens

    aici.TokenSet = TokenSet
    aici.all_tokens = all_tokens

    # Constraints live on the host; a script holds their number.

    ask_new_constraint = aici.new_constraint
    ask_constraint = aici.ask_constraint
    ask_add_identifier = aici.add_identifier
    ask_new_lexer = aici.new_lexer

    class Constraint:
        def __init__(self, kind, *args):
            self.handle = ask_new_constraint(kind, *args) if kind else args[0]

        def eos_allowed(self):
            return ask_constraint(self.handle, "eos_allowed")

        def eos_forced(self):
            return ask_constraint(self.handle, "eos_forced")

        def token_allowed(self, token):
            return ask_constraint(self.handle, "token_allowed", token)

        def append_token(self, token):
            ask_constraint(self.handle, "append_token", token)

        def allow_tokens(self, tokens):
            tokens.bits = ask_constraint(self.handle, "allow_tokens")

    class DynamicLexer:
        def __init__(self, *args):
            self.handle = ask_new_lexer(*args)

        def add(self, *args):
            ask_add_identifier(self.handle, *args)

        def constraint(self):
            return Constraint(None, self.handle)

    aici.Constraint = lambda *args: Constraint("any text", *args)
    aici.RegexConstraint = lambda *args: Constraint("regex", *args)
    aici.CfgConstraint = lambda *args: Constraint("yacc", *args)
    aici.LarkConstraint = lambda *args: Constraint("lark", *args)
    aici.SubStrConstraint = lambda *args: Constraint("substring", *args)
    aici.ChooseConstraint = lambda *args: Constraint("options", *args)
    aici.DynamicLexer = DynamicLexer

    # What a controller decides by itself.

    class Splice:
        def __init__(self, *, when_sampled=None, backtrack=0, ff_tokens):
            self.when_sampled = when_sampled or []
            self.backtrack = backtrack
            self.ff_tokens = ff_tokens

        def add_splice(self, other):
            if other.when_sampled:
                raise ValueError("only an unconditional splice can be added to another")
            kept = len(self.ff_tokens) - other.backtrack
            self.backtrack += max(-kept, 0)
            self.ff_tokens = self.ff_tokens[: max(kept, 0)] + other.ff_tokens

    class Branch:
        def __init__(self, *, splices=None, sample_mask=None):
            self.splices = splices or []
            self.sample_mask = sample_mask
            if sample_mask is None and not self.is_splice():
                raise ValueError("a branch without sample_mask needs one splice with empty when_sampled")

        def is_splice(self):
            return self.sample_mask is None and len(self.splices) == 1 and not self.splices[0].when_sampled

    class MidProcessResult:
        def __init__(self, branches, skip_me=False):
            self.branches = branches
            self.skip_me = skip_me

        def is_splice(self):
            return len(self.branches) == 1 and self.branches[0].is_splice()

    def splice(backtrack, ff_tokens):
        return MidProcessResult([Branch(splices=[Splice(backtrack=backtrack, ff_tokens=ff_tokens)])])

    Branch.noop = lambda: Branch(splices=[Splice(ff_tokens=[])])
    MidProcessResult.bias = lambda mask: MidProcessResult([Branch(sample_mask=mask)])
    MidProcessResult.splice = splice
    MidProcessResult.stop = lambda: MidProcessResult([])
    MidProcessResult.noop = lambda: splice(0, [])
    MidProcessResult.skip = lambda: MidProcessResult([], True)
    aici.Splice = Splice
    aici.Branch = Branch
    aici.MidProcessResult = MidProcessResult

    def encode(branches):
        return [
            (
                None if branch.sample_mask is None else branch.sample_mask.bits,
                [(s.when_sampled, s.backtrack, s.ff_tokens) for s in branch.splices],
            )
            for branch in branches
        ]

    plain_fork = aici.fork
    ask_decide = aici.decide

    async def fork(branches):
        return await plain_fork(encode(branches) if type(branches) is list else branches)

    aici.fork = fork

    async def next_token(decider):
        result = decider.mid_process()
        decider.value = decider.curr_tokens = []
        decider.finished = False
        if result.skip_me:
            return decider.value
        backtrack, tokens, decider.finished = await ask_decide(encode(result.branches))
        decider.value = decider.curr_tokens = tokens
        if hasattr(decider, "post_process"):
            decider.post_process(backtrack, tokens)
        return decider.value

    def awaited(thing):
        return next_token(thing) if hasattr(thing, "mid_process") else thing

    class NextToken:
        def mid_process(self):
            return MidProcessResult.bias(all_tokens())

    class ConstrainedToken:
        def __init__(self, mk_constraint):
            self.mk_constraint = mk_constraint
            self.its_constraint = None

        def mid_process(self):
            if self.its_constraint is None:
                self.its_constraint = self.mk_constraint()
            allowed = TokenSet()
            self.its_constraint.allow_tokens(allowed)
            if allowed.num_set() == 0:
                print("Constraint doesn't allow any tokens; adding EOS")
                allowed[aici.eos_token()] = True
            return MidProcessResult.bias(allowed)

        def post_process(self, backtrack, tokens):
            for token in tokens:
                self.its_constraint.append_token(token)
            self.finished = self.finished or self.its_constraint.eos_forced()

    aici.NextToken = NextToken
    aici.ConstrainedToken = ConstrainedToken
    return awaited


_aici_await = _aici_make_decisions(_aici_modules["aici"], _aici_bytes)
