"""The attacks of tests/attack.py on a small scale: nothing different, nothing twice, no hang, no traceback."""

import attack
import damages
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("ctrl_c_works")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return attack.undisturbed(tmp_path_factory.mktemp("expected"))


def check(findings):
    assert sum(one.attempts for one in findings) > 0
    assert attack.tell(findings) == 0, "see the table above"


def test_runs_that_are_killed_in_every_way(tmp_path, expected):
    check(attack.kills(tmp_path, 28, 1, expected, jobs=2))


def test_a_store_that_is_freed_under_its_runs(tmp_path, expected):
    check([attack.free_while_computing(tmp_path, 1, 1, expected)])


def test_dashboards_that_come_and_go_beside_runs(tmp_path, expected):
    check([attack.dashboards(tmp_path, 2, 1, expected)])


def test_a_disk_that_fills_up_under_a_dashboard(tmp_path):
    found = attack.full_disk(tmp_path)
    if "skipped" in found.attack:
        pytest.skip(found.attack)
    check([found])


def test_nights_of_the_schedule_with_power_cuts(tmp_path):
    check([attack.week(tmp_path, 2, 1)])


def test_damaged_files_that_every_command_reads(tmp_path):
    check(damages.damage_files(tmp_path, 60, 1))
