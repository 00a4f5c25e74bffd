"""Actions, observations and state have the documented defaults."""

from aici_vllm.recursive import CodeBlockResult, REPLAction, REPLObservation, REPLState


def test_defaults():
    assert REPLAction().model_dump(exclude={"metadata"}) == {
        "code": "",
        "is_final": False,
        "final_answer": None,
    }
    assert CodeBlockResult().model_dump() == {
        "stdout": "",
        "stderr": "",
        "locals_snapshot": {},
        "execution_time": 0.0,
        "success": True,
        "exception": None,
    }
    observation = REPLObservation()
    assert (observation.context_preview, observation.context_length, observation.max_iterations) == (
        None,
        0,
        30,
    )
    assert (observation.done, observation.reward, observation.available_variables) == (False, None, [])
    state = REPLState(episode_id="e", context="hello")
    assert (state.episode_id, state.context, state.step_count, state.final_answer) == ("e", "hello", 0, None)
    assert REPLObservation.model_validate(observation.model_dump()) == observation
