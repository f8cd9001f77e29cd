"""A study of minutes' work in seconds: networks that know nothing, a handful of images."""

from dataclasses import replace

from studies import DIGITS, Fit

NETWORK = tuple(
    f"--model.init_args.network.init_args.{name}={value}"
    for name, value in {"channels": 8, "groups": 4, "attention": "[]"}.items()
)
QUICK = (
    "--trainer.max_epochs=1",
    "--data.init_args.steps_per_epoch=4",
    "--data.init_args.batch_size=16",
    "--trainer.limit_val_batches=1",
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=2",
)
TEACHER = ("--model.init_args.num_steps=4", *QUICK, *NETWORK)
LADDER = (
    "--model.init_args.rounds=[[4,2],[2,2],[1,2]]",
    "--data.init_args.batch_size=16",
    "--trainer.limit_val_batches=1",
)
FOLDER = "configs/digits"


def gamma(theta):
    return (f"--model.init_args.noise.init_args.theta_0={theta}", *TEACHER)


TINY = replace(
    DIGITS,
    fits={
        "eps": Fit(f"{FOLDER}/ddpm_linear.yaml", TEACHER),
        "teacher": Fit(f"{FOLDER}/teacher.yaml", TEACHER),
        "ladder": Fit(f"{FOLDER}/progressive.yaml", LADDER, teacher="teacher"),
        "luhman": Fit(
            f"{FOLDER}/luhman.yaml",
            (
                "--model.init_args.teacher_num_steps=2",
                "--data.init_args.num_pairs=64",
                "--data.init_args.num_validation=16",
                "--data.init_args.shard_size=64",
                *QUICK,
            ),
            teacher="teacher",
            pairs=True,
        ),
        "short": Fit(f"{FOLDER}/teacher.yaml", TEACHER),
        "gamma-0.1": Fit(f"{FOLDER}/gamma_ddpm.yaml", gamma(0.1)),
        "short-ladder": Fit(f"{FOLDER}/progressive.yaml", LADDER, teacher="short"),
        "gamma-ladder": Fit(f"{FOLDER}/gamma_progressive.yaml", LADDER, teacher="gamma-0.1"),
    },
    thetas=(0.1,),
    num_samples=48,
    num_shown=3,
    batch_size=48,
    steps=(2, 3, 5, 6),
    full=8,
    adaptive_steps=(2, 6),
    num_latents=20,
    num_reconstructed=2,
    reconstruct_steps=(2, 4),
    diverse_steps=2,
    num_halves=2,
    teacher_steps=(8, 4, 2, 1),
    pair_steps=2,
    gamma_steps=(2, 3),
    deq_steps=(3,),
    deq_batch=4,
    invert_steps={3: 0.1},
    invert_rates={3: (0.1, 0.1)},
    num_inverted=2,
    cost_images=2,
    cost_rounds=2,
)
