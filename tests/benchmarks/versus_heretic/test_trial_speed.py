"""One trial against one of the peer: options and the lines at the end."""

import pytest

from benchmarks.versus_heretic import trial_speed


def test_the_last_lines_have_the_best_ratio_and_the_smaller_model_for_float32():
    def measured(model, dtype, *ratios):
        per_pass = {str(k): {"ratio": r} for k, r in enumerate(ratios)}
        return {"model": model, "dtype": dtype, "per_pass": per_pass}

    lines = trial_speed.ratio_lines(
        [
            measured("answers", "bfloat16", 4.2, 7.3),
            measured("answers", "float32", 1.7, 2.9),
            measured("declines", "float32", 2.5),
        ]
    )
    assert lines == [
        "ratio bf16 answers: 7.30",
        "ratio bf16 declines: not measured",
        "ratio fp32: 2.50",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "6"], "a multiple of --trials-per-pass"),
        (["--models", "no-such-folder"], "no-such-folder: neither answers nor declines"),
    ],
)
def test_options_that_cannot_be_measured_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        trial_speed.read_options(arguments)
    assert message in capsys.readouterr().err
