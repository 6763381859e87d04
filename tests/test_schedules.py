"""Schedules: equal to torch's where torch has them, and to the published tables."""

from functools import partial

import pytest
import torch

from fleetflow.training import schedules


def of_torch(build, steps: int) -> list[float]:
    """The factors of a torch scheduler for a learning rate of 1."""
    update = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = build(update)
    found = []
    for _ in range(steps):
        found.append(update.param_groups[0]["lr"])
        update.step()
        schedule.step()
    return found


def factors(schedule, steps: int) -> list[float]:
    return [schedule(step, steps) for step in range(steps)]


def test_multi_step_is_that_of_torch():
    ours = partial(schedules.multi_step, milestones=(3, 7, 8), gamma=0.3)
    theirs = of_torch(lambda u: torch.optim.lr_scheduler.MultiStepLR(u, [3, 7, 8], 0.3), 12)
    assert factors(ours, 12) == pytest.approx(theirs)


def test_cosine_is_that_of_torch():
    theirs = of_torch(lambda u: torch.optim.lr_scheduler.CosineAnnealingLR(u, 20, eta_min=0.1), 20)
    assert factors(partial(schedules.cosine, end=0.1), 20) == pytest.approx(theirs)
    warm = factors(partial(schedules.cosine, warmup=4), 24)
    assert warm[:4] == [0.25, 0.5, 0.75, 1.0] and warm[4:] == pytest.approx(factors(schedules.cosine, 20))


@pytest.mark.parametrize("steps", [20, 400, 1_000])
def test_one_cycle_is_that_of_raft(steps):
    theirs = of_torch(
        lambda u: torch.optim.lr_scheduler.OneCycleLR(
            u, 1.0, total_steps=steps + 100, pct_start=0.05, cycle_momentum=False, anneal_strategy="linear"
        ),
        steps,
    )
    assert factors(schedules.one_cycle, steps) == pytest.approx(theirs)


def test_one_cycle_without_extra_steps_ends_at_the_end():
    ours = factors(partial(schedules.one_cycle, extra=0, warm=0.3), 50)
    theirs = of_torch(
        lambda u: torch.optim.lr_scheduler.OneCycleLR(
            u, 1.0, total_steps=50, pct_start=0.3, cycle_momentum=False, anneal_strategy="linear"
        ),
        50,
    )
    assert ours == pytest.approx(theirs) and ours[-1] == pytest.approx(4e-6)


def test_flownet2():
    rates = [1e-4 * schedules.s_long(step, 1_200_000) for step in (0, 399_999, 400_000, 700_000, 999_999, 1_000_000)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 2.5e-5, 1.25e-5, 6.25e-6])
    assert [schedules.s_fine(1_000 * k, 500_000) for k in (199, 200, 300, 499)] == [1, 1 / 2, 1 / 4, 1 / 8]


@pytest.mark.parametrize("schedule", [schedules.s_long, schedules.lightflow, schedules.pwcnet_sintel])
def test_a_shorter_run_shrinks_the_table(schedule):
    of = schedule.keywords["of"]
    assert factors(schedule, 600) == [schedule(int(k * of), int(600 * of)) for k in range(600)]


def test_lightflow():
    """The rates at the epochs of the published table, and just before them."""
    per_epoch = 174
    rate = lambda epoch, step=0: 1e-3 * schedules.lightflow(epoch * per_epoch + step, 403 * per_epoch)  # noqa: E731
    firsts, rates = (0, 58, 174, 232, 289, 347), (1e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5, 3.125e-5)
    assert [rate(epoch) for epoch in firsts] == pytest.approx(rates)
    assert [rate(epoch, -1) for epoch in (*firsts[1:], 403)] == pytest.approx(rates)


def test_liteflownet2_and_pwcnet():
    assert [schedules.liteflownet2_pre(1_000 * k, 300_000) for k in (119, 120, 299)] == [1, 1 / 2, 1 / 16]
    assert schedules.liteflownet2_sintel(599_999, 600_000) == schedules.liteflownet2_kitti(499_999, 500_000) / 2
    ends = [3e-5 * schedules.pwcnet_sintel(step, 300_000) for step in (0, 149_999, 150_000, 299_999)]
    assert ends == pytest.approx([3e-5, 3e-5 / 1024, 2e-5, 2e-5 / 1024])


def test_warm_flat_cool():
    factor = partial(schedules.warm_flat_cool, warmup=10, cooldown=0.2)
    assert [factor(step, 100) for step in (0, 9, 50, 79)] == [0.1, 1, 1, 1]
    assert [factor(step, 100) for step in (90, 99, 100)] == pytest.approx([0.5, 0.05, 0])
    assert factors(partial(schedules.warm_flat_cool, warmup=0, cooldown=0.0), 3) == [1, 1, 1]
    assert factors(schedules.constant, 3) == [1, 1, 1]


SCHEDULES = [
    schedules.constant,
    schedules.cosine,
    schedules.one_cycle,
    *(value for value in vars(schedules).values() if isinstance(value, partial)),
]


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1_000_000])
def test_factors_are_sane(steps):
    for schedule in SCHEDULES:
        for step in {0, steps // 2, steps - 1}:
            assert 0 <= schedule(step, steps) <= 1
