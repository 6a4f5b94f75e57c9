"""Ways to sample that are compared."""

from morse_tiny import ddim

from morse_diffusion.adapters.sampling_methods import build_solver, crowded_times


def test_a_respaced_run_takes_the_schedule_s_own_times_when_it_crowds_nothing() -> None:
    scheduler = build_solver("ddim", ddim().config)
    scheduler.set_timesteps(10)
    assert crowded_times(10, 1.0, 1000) == scheduler.timesteps.tolist()
    # 1000 (1 - (j / 4)^1.5) - 1 for j = 0 to 3.
    assert crowded_times(4, 1.5, 1000) == [999, 874, 645, 349]
