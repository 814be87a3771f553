"""Paired differences: scipy's paired t statistic, several runs of the same queries, and what cannot be paired."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lora_training.paired import paired


def test_mean_over_error_is_scipys_paired_t() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 300))
    names = [f"q{i}" for i in range(300)]
    found = paired([dict(zip(names, a, strict=True))], [dict(zip(reversed(names), b[::-1], strict=True))])
    assert found.error is not None and found.queries == 300
    assert found.mean / found.error == pytest.approx(ttest_rel(a, b).statistic)
    assert found.mean == pytest.approx(a.mean() - b.mean()) == found.runs[0]


def test_a_query_of_several_runs_is_one_observation() -> None:
    """The same answers three times over are no more certain than once."""
    rng = np.random.default_rng(1)
    first, second = ({f"q{i}": value for i, value in enumerate(rng.random(50))} for _ in range(2))
    once, thrice = paired([first], [second]), paired([first] * 3, [second] * 3)
    assert thrice.error == pytest.approx(once.error) and thrice.queries == 50 and len(thrice.runs) == 3
    opposed = paired([first, second], [second, first])
    assert opposed.mean == pytest.approx(0) and opposed.error == pytest.approx(0, abs=1e-12)
    assert opposed.runs == pytest.approx([once.mean, -once.mean])
    other = {f"p{i}": value for i, value in enumerate(first.values())}
    assert paired([first, other], [second, dict(zip(other, second.values(), strict=True))]).queries == 100


def test_other_queries_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="2 are in one set only, such as a"):
        paired([{"a": 1.0, "b": 0.5}], [{"c": 1.0, "b": 0.5}])
    with pytest.raises(ValueError, match="there are none"):
        paired([{}], [{}])
    with pytest.raises(ValueError, match="shorter"):
        paired([{"a": 1.0}], [])
    assert paired([{"a": 1.0}], [{"a": 0.5}]).error is None
    assert str(paired([{"a": 1.0}], [{"a": 0.5}])) == "+0.5000"
