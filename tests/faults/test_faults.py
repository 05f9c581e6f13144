"""A few faults at random; `make test-faults` makes many. And what the suite itself must see."""

import pytest

from tests.faults.model import Model
from tests.faults.promises import NOT_YET, PROMISES
from tests.faults.run import run_seed

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]


@pytest.mark.parametrize("seed", [1, 2])
def test_the_list_report_and_metrics_are_right_after_every_fault(seed, fake_nvml_library):
    # How long each may take is for `make test-faults`, on a machine that does nothing else.
    result = run_seed(seed, 12, fake_nvml_library, patience=5)
    assert result.problem is None, result.problem
    assert sum(map(len, result.seconds.values())) == 15  # with the start and the end


def test_a_wrong_list_fails_with_the_steps_and_how_to_repeat_it(fake_nvml_library, monkeypatch):
    monkeypatch.setattr(Model, "devices", lambda _: {"GPU-x::0": "Healthy"})
    monkeypatch.setattr("tests.faults.run.START", 3)
    result = run_seed(1, 1, fake_nvml_library)
    assert "start: after 3 s: " in result.problem
    assert "GPU-x::0 None, in the end Healthy is right" in result.problem


def test_what_is_not_yet_promised_is_a_fault_of_the_table():
    assert {name.removesuffix(" during a hang") for name in NOT_YET} <= PROMISES.keys()
