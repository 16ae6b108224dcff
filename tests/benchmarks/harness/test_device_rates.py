"""The floor of a trial: arithmetic and reading."""

import pytest

from benchmarks.harness.device_rates import TrialWork, floor_seconds, nearest_rows

WORK = TrialWork(
    prefill_tokens=100,
    prompts=4,
    decode_tokens=20,
    decode_steps=10,
    linear_parameters=1000,
    head_parameters=500,
    bytes_per_parameter=2,
)


def test_a_floor_counts_two_flop_per_weight_and_token():
    assert WORK.prefill_flop == 2 * (100 * 1000 + 4 * 500)
    assert WORK.decode_flop == 2 * 20 * 1500
    assert WORK.bytes == 11 * 3000


def test_a_floor_takes_arithmetic_or_reading_whichever_is_longer():
    computing = floor_seconds(WORK, prefill_rate=1e3, decode_rate=1e3, bandwidth=1e12)
    reading = floor_seconds(WORK, prefill_rate=1e12, decode_rate=1e12, bandwidth=1e3)
    assert computing == pytest.approx((204_000 + 60_000) / 1e3)
    assert reading == pytest.approx(33_000 / 1e3)


def test_trials_of_one_pass_share_the_reading_of_weights():
    pair = TrialWork(**{**vars(WORK), "trials": 2})
    rates = {"prefill_rate": 1e12, "decode_rate": 1e12, "bandwidth": 1e3}
    assert floor_seconds(pair, **rates) == pytest.approx(0.5 * floor_seconds(WORK, **rates))
    assert pair.decode_rows == 2 * WORK.decode_rows


def test_a_floor_uses_the_rate_at_the_nearest_number_of_rows():
    assert nearest_rows({64: 1.0, 256: 2.0, 2048: 3.0}, 200) == 256
