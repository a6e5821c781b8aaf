"""Ray Tune: a trial is a Ray Train run, and its checkpoints are Tune's without being copied.

    from ray import tune
    from ray_accel_ckpt.integrations.tune import trainable

    tune.Tuner(
        trainable(train_loop_per_worker, scaling_config=ScalingConfig(num_workers=2)),
        param_space={"lr": tune.loguniform(1e-4, 1e-1)},
        run_config=tune.RunConfig(name="search", storage_path="/mnt/shared"),
    ).fit()

Each save of the loop is one report to Tune: its metrics, and a reference of a few
hundred bytes that stands for the checkpoint, which stays where Ray Train has
it. `open_checkpoint(result.checkpoint)` follows it, schedulers pass it on.
See docs/tune.md.
"""

from ray_accel_ckpt.integrations.tune.trial import trainable

__all__ = ["trainable"]
