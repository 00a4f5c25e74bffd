"""Which tokens may come next: vocabularies, token sets, and constraints on text.

A constraint answers for one position of one sequence; masks that were computed once are shared by all.
"""

from constraints.constraint import AnyText, Constraint
from constraints.errors import ConstraintError
from constraints.guidance import lark
from constraints.identifiers import DynamicLexer
from constraints.json_constraint import json_schema
from constraints.literals import options, substring
from constraints.regex_constraint import prepare, regex
from constraints.token_set import TokenSet
from constraints.vocabulary import Vocabulary
from constraints.yacc_constraint import yacc

__all__ = [
    "AnyText",
    "Constraint",
    "ConstraintError",
    "DynamicLexer",
    "TokenSet",
    "Vocabulary",
    "json_schema",
    "lark",
    "options",
    "prepare",
    "regex",
    "substring",
    "yacc",
]
