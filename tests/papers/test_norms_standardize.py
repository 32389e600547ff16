"""The observation norm of SimBa: the statistics of a whole stream, however it was cut into batches."""

import numpy as np
import pytest
import torch

from etude import norms


@pytest.mark.parametrize("cuts", [[100], [1] * 100, [3, 40, 7, 50]])
def test_rs_norm_after_a_stream_is_numpys_standardisation_of_all_of_it(cuts):
    rows = np.random.default_rng(0).normal(3, [0.1, 5, 2], (100, 3))
    norm = norms.rs_norm(3).double()
    for part in torch.split(torch.tensor(rows), cuts):
        norm(part)
    assert norm.num_rows_tracked == 100
    got = norm.eval()(torch.tensor(rows)).numpy()
    # The start, mean 0 and variance 1, weighs 1e-4 rows: 1e-6 of the whole.
    np.testing.assert_allclose(got, (rows - rows.mean(0)) / rows.std(0), rtol=1e-3, atol=1e-3)


def test_rs_norm_standardises_by_what_it_has_just_seen_and_keeps_still_in_eval():
    norm = norms.rs_norm(2).double()
    first = torch.tensor([[1.0, -4.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(norm(first), first.sign() * torch.tensor([[-1.0, 1], [1, 1]]), rtol=0, atol=1e-3)
    kept = {k: v.clone() for k, v in norm.state_dict().items()}
    norm.eval()(100 * first)
    assert all(torch.equal(v, norm.state_dict()[k]) for k, v in kept.items())


def test_rs_norm_starts_at_mean_zero_and_variance_one():
    x = torch.randn(4, 3)
    torch.testing.assert_close(norms.rs_norm(3).eval()(x), x)
