"""What `aici_vllm.agents` exports, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import aici_vllm.agents as agents

REPOSITORY = Path(__file__).parents[2]

NAMES_BY_TOPIC = """
SystemMessage UserMessage AIMessage DataMessage AITemplate
AICall AIGenerate AIExtract AIClassify AIScan AIEmbed run is_valid last_message last_output
extract_config unwrap_aicall_args RetryConfig SampleNode
UCT ThompsonSampling AbstractScoringMethod score select_best beta_sample gamma_sample
expand backpropagate find_node reset_success collect_all_feedback PreOrderDFS PostOrderDFS
airetry retry evaluate_condition add_feedback split_multi_samples truncate_conversation remove_used_kwargs
print_samples samples_tree samples_html
AICode AICodeFixer aicodefixer_feedback error_feedback
CodeEmpty CodeFailedParse CodeFailedEval CodeFailedTimeout CodeSuccess
OpenAIModel AsyncOpenAIModel VLLMModel AsyncVLLMModel ScriptedModel
EngineSampler AsyncEngineSampler PrefixCondition PrefixChecked
run_async airetry_async RetryBudgetExceeded TemplateNotFound ModelCallError
"""


def test_public_names() -> None:
    assert set(NAMES_BY_TOPIC.split()) <= set(agents.__all__)
    assert all(hasattr(agents, name) for name in agents.__all__)
    assert len(set(agents.__all__)) == len(agents.__all__)


def test_the_import_loads_nothing_heavy_and_no_engine() -> None:
    code = (
        "import sys, aici_vllm.agents\n"
        "heavy = {'vllm', 'torch', 'openai', 'httpx', 'rich', 'pydantic', 'numpy'}\n"
        "print(sorted(n for n in sys.modules if n in heavy or n.startswith('aici_vllm.engine')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
