"""Named prompt templates: a registry of message lists with `{{placeholders}}`, and the ones that ship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aici_vllm.agents.errors import TemplateNotFound
from aici_vllm.agents.messages import MESSAGE_TYPES, Conversation, Message, SystemMessage, UserMessage


@dataclass(frozen=True)
class AITemplate:
    """A reference to a registered template by name, for use where a string would mean a prompt."""

    name: str


_FEEDBACK_FROM_EVALUATOR = "### Feedback from Evaluator\n{{feedback}}\n"

_CODE_FIXER_RCI = """\
Improve your Python code by critique and revision.

Work through these steps:
1. **Past Critique**: say in one or two sentences what your earlier critiques in this conversation asked for \
and whether the last version delivered it. Do not give the same critique twice; if something failed twice, \
try a different approach.
2. **Critique**: judge the last version as an expert reviewer would. Use the feedback below first, then look \
for wrong results, missed edge cases, missing imports and names that do not exist.
3. **Improve**: write the next version. Keep what works, change what the critique names, and check it with \
one or two small examples or assertions.

Answer in this format:

**Past Critique:** <what was asked before, and what came of it>

**Critique:** <what is wrong with the last version, as a short list>

**Improve:** <what you change and why, in one or two sentences>

```python
<the complete program, imports and checks included>
```

### Feedback from the User

{{feedback}}

Think step by step, and put all of the code into the single code block.
"""

_CODE_FIXER_RCI_AGAIN = """\
### Feedback from the User

{{feedback}}

Take this feedback through the Critique step and the Improve step again. Recall the past critiques and do \
not repeat them.
"""

_CODE_FIXER_SHORT = """\
Your Python code was executed. This is what came out:

```plaintext
{{feedback}}
```

Please do the following:
1. Read the feedback and name the cause of each problem.
2. If something failed before in the same way, choose another approach.
3. Rewrite the program so that every problem is solved.
4. Add one or two small checks that would have caught the problem.

Send the complete program in one message, inside one ```python code fence, imports included.
"""

_CODE_FIXER_TINY = """\
### Execution Results

```plaintext
{{feedback}}
```

Fix the errors and send the complete program in one ```python code fence.
"""

_TEMPLATES: dict[str, Conversation] = {
    "BlankSystemUser": [SystemMessage("{{system}}"), UserMessage("{{user}}")],
    "FeedbackFromEvaluator": [UserMessage(_FEEDBACK_FROM_EVALUATOR)],
    "CodeFixerRCI": [UserMessage(_CODE_FIXER_RCI), UserMessage(_CODE_FIXER_RCI_AGAIN)],
    "CodeFixerShort": [UserMessage(_CODE_FIXER_SHORT)],
    "CodeFixerTiny": [UserMessage(_CODE_FIXER_TINY)],
}


def template_names() -> list[str]:
    """The names of all registered templates, sorted."""
    return sorted(_TEMPLATES)


def register_template(name: str, messages: Sequence[Message]) -> None:
    """Register (or replace) the template `name`. Raises ValueError for an empty name or no messages."""
    if not name or not messages:
        raise ValueError("A template needs a name and at least one message.")
    for message in messages:
        if not isinstance(message, MESSAGE_TYPES):
            raise TypeError(f"A template holds messages, got {type(message).__name__}.")
    _TEMPLATES[name] = list(messages)


def template_messages(template: str | AITemplate) -> Conversation:
    """A copy of the template's messages, placeholders intact. Raises TemplateNotFound for an unknown name."""
    name = template.name if isinstance(template, AITemplate) else template
    if not isinstance(name, str):
        raise TypeError(f"A template is named by a string or an AITemplate, got {type(name).__name__}.")
    if name not in _TEMPLATES:
        raise TemplateNotFound(
            f"Template {name!r} does not exist; registered are {', '.join(template_names())}."
        )
    return list(_TEMPLATES[name])
