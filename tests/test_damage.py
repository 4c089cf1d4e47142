"""Every claim can fail: each damage listed under tests/damage breaks the very claim that it is about.

`--full` runs them all, each on a copy of the lesson, with its short training unless the claim needs the full
one. A single one by name: `--full -k 02a_autograd-cpu-3`.
"""

import course
import play
import pytest

DAMAGES = course.each(
    [(script, "cpu", number) for script in course.LESSONS for number in range(len(course.damages(script)))]
)


@pytest.mark.parametrize(("script", "device", "number"), DAMAGES)
def test_damage_is_caught(script, device, number, only_full, tmp_path):
    damage = course.damages(script)[number]
    copy, full = course.damaged(script, damage, tmp_path), damage["claim"] in script.full_claims
    course.check_caught(play.run(copy, tmp_path, device=device, full=full, fresh=False), damage)
