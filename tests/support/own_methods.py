"""Direction methods as another package would have them; those of docs/extending.md."""

from ray_abliterate.directions.methods.inputs import needs


def trimmed_difference(behaviour, neutral, share: float = 0.1):
    """Says nothing of what it needs, so gets every residual of one layer."""

    def centre(values):
        ordered, cut = values.double().sort(dim=0).values, int(share * len(values))
        return ordered[cut : len(ordered) - cut].mean(dim=0)

    return centre(behaviour.values) - centre(neutral.values)


@needs("variances")
def signal_to_noise(behaviour, neutral):
    noise = (behaviour.variance + neutral.variance + 1e-6).sqrt()
    return (behaviour.mean - neutral.mean) / noise


def of_another_width(behaviour, neutral):
    return behaviour.values.double().mean(0)[:5]


def not_a_number(behaviour, neutral):
    return behaviour.values.double().mean(0) * float("nan")
