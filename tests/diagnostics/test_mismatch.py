import math

import pytest
import torch

from axpo.diagnostics.mismatch import Mismatch


def test_figures_by_hand():
    """Probabilities 0.2, 0.5, 0.4 of sampling and 0.3, 0.25, 0.4 of training: ratios 1.5, 0.5 and 1."""
    sampling = torch.tensor([0.2, 0.5, math.nan, 0.4]).log()
    training = torch.tensor([0.3, 0.25, 0.9, 0.4]).log().requires_grad_()
    figures = Mismatch.of(sampling, training).figures()
    assert figures == pytest.approx(
        {
            "mismatch_mean": (math.log(1.5) + math.log(2)) / 3,
            "mismatch_max": math.log(2),
            "mismatch_kl": ((0.5 - math.log(1.5)) + (-0.5 + math.log(2))) / 3,  # r − 1 − log r
        },
        rel=1e-6,
    )


def test_kl_is_that_of_sampling_to_training():
    """Over all tokens as often as they are sampled, k3 is the divergence itself, which is not symmetric."""
    sampling, training = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    expected = (sampling * (sampling / training).log()).sum().item()
    assert abs(expected - (training * (training / sampling).log()).sum().item()) > 0.01
    found = Mismatch.of(sampling.log()[drawn], training.log()[drawn]).figures()["mismatch_kl"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_parts_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    sampling, training = torch.randn(2, 10, generator=generator) - 3
    sampling[4] = math.nan
    parts = [Mismatch.of(sampling[part], training[part]) for part in (slice(0, 4), slice(4, 5), slice(5, 10))]
    whole = Mismatch.of(sampling, training)
    assert sum(parts, Mismatch()).figures() == pytest.approx(whole.figures())
    assert whole.tokens == 9


def test_without_tokens_there_are_no_figures():
    nothing = {"mismatch_mean": None, "mismatch_max": None, "mismatch_kl": None}
    assert Mismatch().figures() == nothing
    assert Mismatch.of(torch.tensor([math.nan]), torch.tensor([-1.0])).figures() == nothing
    assert Mismatch.of(torch.tensor([]), torch.tensor([])).figures() == nothing


def test_a_broken_model_shows():
    found = Mismatch.of(torch.tensor([-1.0, -1.0]), torch.tensor([math.nan, -1.0])).figures()
    assert math.isnan(found["mismatch_mean"] or 0.0)
    banned = Mismatch.of(torch.tensor([-1.0]), torch.tensor([-math.inf])).figures()
    assert banned["mismatch_mean"] == banned["mismatch_max"] == math.inf
    assert math.isfinite(banned["mismatch_kl"] or 0.0)
