"""What a request may ask for in ``SamplingParams.extra_args``, and how wrong values are refused."""

import pytest
from vllm import SamplingParams

from vllm_r3_plugin.options import R3Options
from vllm_r3_plugin.request_options import RequestOptions


def _options(extra_args=None, defaults=None, prompt_start=0):
    params = SamplingParams(extra_args=extra_args, routed_experts_prompt_start=prompt_start)
    return RequestOptions.of(params, defaults or R3Options())


def test_a_request_that_says_nothing_gets_what_vllm_gives():
    assert _options() == RequestOptions("on", 0, "native", "response", "omit")
    assert _options({"kv_transfer_params": {}}, prompt_start=7).start == 7


def test_a_request_overrides_the_servers_defaults_one_by_one():
    defaults = R3Options(encoding="r3", delivery="fetch", routing="off")
    asked = _options({"r3_routing": "on", "r3_delivery": "response", "r3_start": 3}, defaults)
    assert asked == RequestOptions("on", 3, "r3", "response", "omit")


@pytest.mark.parametrize(
    ("extra_args", "prompt_start", "said"),
    [
        ({"r3_encoding": "zip"}, 0, "r3_encoding is 'zip', expected 'native' or 'r3'"),
        ({"r3_routing": 1}, 0, "r3_routing is 1, expected 'on' or 'off'"),
        ({"r3_delivery": ["fetch"]}, 0, r"r3_delivery is \['fetch'\]"),
        ({"r3_unrecorded": "zeros"}, 0, "r3_unrecorded is 'zeros'"),
        ({"r3_start": -1}, 0, "r3_start is -1, expected an integer from 0"),
        ({"r3_start": "3"}, 0, "r3_start is '3'"),
        ({"r3_start": 3.0}, 0, r"r3_start is 3\.0"),
        ({"r3_start": True}, 0, "r3_start is True"),
        ({"r3_start": 3}, 4, "r3_start is 3 with routed_experts_prompt_start 4"),
        ({"r3_strat": 3}, 0, "unknown key 'r3_strat', expected only r3_delivery, r3_encoding"),
    ],
)
def test_a_wrong_option_is_one_clear_sentence(extra_args, prompt_start, said):
    with pytest.raises(ValueError, match=said) as error:
        _options(extra_args, prompt_start=prompt_start)
    _assert_one_sentence(error)


def test_rows_start_within_the_prompt_or_right_after_it():
    _options({"r3_start": 5}).require_start_within(5)
    with pytest.raises(ValueError, match="r3_start is 5, expected 0 to 4") as error:
        _options({"r3_start": 5}).require_start_within(4)
    _assert_one_sentence(error)


def test_options_written_out_read_back_the_same_under_other_defaults():
    shared = {"r3_start": 2, "r3_encoding": "r3", "mine": 1}
    params = SamplingParams(extra_args=shared)
    options = RequestOptions.of(params, R3Options(unrecorded="sentinel"))
    options.write_to(params)
    assert RequestOptions.of(params, R3Options(routing="off")) == options
    assert params.extra_args["mine"] == 1
    assert params.routed_experts_prompt_start == 2
    assert shared == {"r3_start": 2, "r3_encoding": "r3", "mine": 1}


def _assert_one_sentence(error):
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert "expected" in message
