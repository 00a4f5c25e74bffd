"""The low-level answers of a `NextToken`: masks, splices, branches. A script calls `BranchDecision` `Branch`.

Rules: section 1.5 of AICI's controller interface. `backtrack` counts the sampled token when
`when_sampled` matched it.
"""

from dataclasses import dataclass, field

from constraints import TokenSet


def _check_tokens(tokens: list[int], what: str) -> None:
    if not isinstance(tokens, list) or not all(isinstance(t, int) and t >= 0 for t in tokens):
        raise TypeError(f"{what} must be a list of token ids, not {tokens!r}")


def _check_items(items: object, kind: type, what: str) -> None:
    if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
        raise TypeError(f"{what} must be a list of {kind.__name__.removesuffix('Decision')}, not {items!r}")


@dataclass(slots=True, kw_only=True)
class Splice:
    """Drop `backtrack` tokens, then append `ff_tokens`; only if `when_sampled` is empty or matches.

    Raises:
        TypeError, ValueError: tokens are not a list of ids, or `backtrack` is negative.
    """

    when_sampled: list[int] = field(default_factory=list)
    backtrack: int = 0
    ff_tokens: list[int]

    def __post_init__(self) -> None:
        _check_tokens(self.when_sampled, "when_sampled")
        _check_tokens(self.ff_tokens, "ff_tokens")
        if not isinstance(self.backtrack, int) or self.backtrack < 0:
            raise ValueError(f"backtrack must be 0 or more, not {self.backtrack!r}")

    def add_splice(self, other: "Splice") -> None:
        """Do `other`, which is unconditional, after this splice."""
        if other.when_sampled:
            raise ValueError("only an unconditional splice can be added to another")
        kept = len(self.ff_tokens) - other.backtrack
        if kept >= 0:
            del self.ff_tokens[kept:]
        else:
            self.backtrack -= kept
            self.ff_tokens.clear()
        self.ff_tokens.extend(other.ff_tokens)


@dataclass(slots=True, kw_only=True)
class BranchDecision:
    """One future of a sequence: sample under `sample_mask`, or splice without sampling."""

    splices: list[Splice] = field(default_factory=list)
    sample_mask: TokenSet | None = None

    def __post_init__(self) -> None:
        _check_items(self.splices, Splice, "splices")
        if not isinstance(self.sample_mask, (TokenSet, type(None))):
            raise TypeError(f"sample_mask must be a TokenSet, not {type(self.sample_mask).__name__}")
        if self.sample_mask is None and not self.is_splice():
            raise ValueError("a branch without sample_mask needs exactly one splice with empty when_sampled")

    def is_splice(self) -> bool:
        """True when the branch is one unconditional splice."""
        return self.sample_mask is None and len(self.splices) == 1 and not self.splices[0].when_sampled

    @classmethod
    def noop(cls) -> "BranchDecision":
        return cls(splices=[Splice(ff_tokens=[])])


@dataclass(slots=True)
class MidProcessResult:
    """The branches that follow: none stops, one goes on, more fork."""

    branches: list[BranchDecision]
    skip_me: bool = False

    def __post_init__(self) -> None:
        _check_items(self.branches, BranchDecision, "branches")

    def is_splice(self) -> bool:
        return len(self.branches) == 1 and self.branches[0].is_splice()

    @classmethod
    def bias(cls, mask: TokenSet) -> "MidProcessResult":
        return cls([BranchDecision(sample_mask=mask)])

    @classmethod
    def splice(cls, backtrack: int, ff_tokens: list[int]) -> "MidProcessResult":
        return cls([BranchDecision(splices=[Splice(backtrack=backtrack, ff_tokens=ff_tokens)])])

    @classmethod
    def stop(cls) -> "MidProcessResult":
        return cls([])

    @classmethod
    def noop(cls) -> "MidProcessResult":
        return cls([BranchDecision.noop()])

    @classmethod
    def skip(cls) -> "MidProcessResult":
        """Do nothing and go on to the next await within the same step."""
        return cls([], skip_me=True)


def checked(branches: list[BranchDecision], size: int) -> list[BranchDecision]:
    """A copy of `branches` for the engine, of which the script holds no part.

    Args:
        size: of the vocabulary.

    Raises:
        TypeError, ValueError: the script has put something wrong into one of them.
    """
    return [_checked(branch, size) for branch in MidProcessResult(branches).branches]


def _checked(branch: BranchDecision, size: int) -> BranchDecision:
    splices = [
        Splice(when_sampled=list(s.when_sampled), backtrack=s.backtrack, ff_tokens=list(s.ff_tokens))
        for s in branch.splices
    ]
    mask = branch.sample_mask
    copy = BranchDecision(splices=splices, sample_mask=mask.copy() if mask is not None else None)
    if any(token >= size for splice in splices for token in splice.ff_tokens):
        raise ValueError(f"ff_tokens holds a token id over the vocabulary's {size}")
    if mask is not None and len(mask) != size:
        raise ValueError(f"sample_mask is over {len(mask)} tokens and the vocabulary has {size}")
    if mask is not None and not mask.num_set():
        raise ValueError("sample_mask allows no token")
    return copy
