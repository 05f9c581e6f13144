"""The runbook shows faults as page, `status`, `doctor`, log and alerts really show them."""

import shutil

import pytest

from tests import screenshot
from tests.observe.rules import RUNBOOK
from tests.shown import FAULTS, documented, see

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chromium")]

DOCUMENTED = documented(RUNBOOK.read_text("utf-8"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.cause.__name__)
def test_a_fault_looks_as_the_runbook_says(fault):
    if screenshot.chromium() is None or shutil.which("promtool") is None:
        pytest.skip("chromium and promtool are needed (Debian: packages chromium, prometheus)")
    assert see(fault) == DOCUMENTED[fault.title]


def test_the_runbook_has_no_other():
    assert list(DOCUMENTED) == [fault.title for fault in FAULTS]
