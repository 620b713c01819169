"""Over a thousand wrong arguments of the public names: each a ``MechError``, none after a forward, none accepted.

Derandomised: the same values on every machine. What runs a model fails here, down to the Hugging Face model inside.
"""

import inspect
from collections import Counter

import pytest
from bad_arguments import wrong
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from right_calls import Given, calls

import mech

EXAMPLES = 5  # wrong values of each argument; fewer where a kind has fewer
UNCHECKED = {"KL", "MechError", "__version__"}  # take nothing, or only words for a message
# Said by other tests: what goes through to Hugging Face, and the parts of values that only the package makes.
ELSEWHERE = {
    "HookedMLLM": {"hf_model", "processor", "name"},
    "Ablate": {"heads", "layers", "positions"},
    "Knockout": {"query", "key", "layers", "heads"},
    "Patch": {"heads", "layers", "positions"},
    "Scale": {"heads", "positions"},
    "Redirect": {"heads", "to", "bias", "query", "phase"},
    "Policy": {"dense_heads"},
    "Ranking": {"per_example", "layers", "weights"},
    "Sample": {"distractors"},
    "Circuit": {"n_examples"},
    "HeadRecord": {"scores", "n_top", "data", "version"},
    "TokenLayout": {"tokens", "spans", "images"},
    "Frames": {"indices"},
    "Pages": {"indices"},
    "ablation": {"necessary"},
    "attention_maps": {"deciding"},
    "view": {"on", "options"},
}
done: Counter[str] = Counter()


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    model = mech.HookedMLLM.from_pretrained("reference:llava-s")
    found = calls(Given(model, tmp_path_factory.mktemp("bad")))
    with pytest.MonkeyPatch.context() as patch:
        for module in (model.hf_model, model.hf_model.model, model.hf_model.model.vision_tower):
            patch.setattr(module, "forward", lambda *_, **__: pytest.fail("a forward was run"))
        patch.setattr(model.hf_model, "generate", lambda *_, **__: pytest.fail("a generation was run"))
        yield found


def test_every_public_name_and_argument_is_tried(known):
    for name in set(mech.__all__) - UNCHECKED:
        tried = {key for one, call in known.items() if one.split(",")[0] == name for key in call.kinds}
        if inspect.isclass(getattr(mech, name)) and not tried:
            tried = {one for one in known if one.startswith(f"{name}.")} and ELSEWHERE[name]
        parameters = set(inspect.signature(getattr(mech, name)).parameters) - {"specs", "index"}
        assert parameters <= tried | ELSEWHERE.get(name, set()), (name, parameters - tried)


@settings(derandomize=True, max_examples=EXAMPLES, deadline=None, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.data())
def refused(name, call, argument, data):
    value = data.draw(wrong(call.kinds[argument]))
    done[name] += 1
    try:
        call.function(**{**call.right, argument: value})
    except mech.MechError as error:
        assert error.given and error.expected, f"{name}({argument}={value!r}): {error}"
    else:
        pytest.fail(f"{name}({argument}={value!r}) was accepted")


def test_wrong_arguments_are_refused_before_any_forward(known, subtests):
    for name, call in known.items():
        for argument in call.kinds:
            with subtests.test(name=name, argument=argument):
                refused(name, call, argument)
    assert sum(done.values()) >= 1000 and set(done) == set(known)
