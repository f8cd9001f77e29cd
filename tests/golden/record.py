"""Every number the project produces, in small: what a change that moves no number must repeat.

    python tests/golden/record.py            # compare with tests/golden/numbers.json
    python tests/golden/record.py --record   # write it anew, where numbers are meant to move
    python tests/golden/record.py --add      # write those that are new

Fits of every training method, images of every sampler, and the tables of the commands, each as a
digest of its bits and a few of its numbers. On the machine and torch version that recorded them
the bits must be the same; elsewhere the numbers, to 5e-5 of the largest. `test_golden.py` runs it.
"""

import argparse
import csv
import hashlib
import inspect
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
NUMBERS = Path(__file__).with_name("numbers.json")
TOLERANCE = 5e-5  # `invert` follows signs of gradients: 2e-5 from one processor to another
KEPT = 6

UNET = {
    "class_path": "ddim_pl.networks.unet.UNet",
    "init_args": {
        "image_size": 8,
        "in_channels": 1,
        "channels": 8,
        "multipliers": [1, 2],
        "num_blocks": 1,
        "attention": [4],
        "dropout": 0.1,
        "groups": 4,
        "num_classes": 10,
    },
}
ADAM = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-2, "eps": 1e-3}}
DIGITS = {
    "class_path": "ddim_pl.data.digits.DigitsDataModule",
    "init_args": {"batch_size": 16, "steps_per_epoch": 4, "num_predict": 6},
}
FRECHET = {
    "class_path": "callbacks.FrechetDistance",
    "init_args": {
        "features": "ddim_pl.metrics.digits.DigitsFeatures",
        "num_samples": 40,
        "batch_size": 16,
        "every_n_validations": 1,
    },
}
BITS = {
    "class_path": "callbacks.BitsPerDim",
    "init_args": {"num_images": 8, "num_terms": 4, "ode": True, "ode_steps": 3},
}
STUDENTS = {"class_path": "callbacks.Students", "init_args": {"num_images": 4}}


def config(folder: Path, name: str, model: str, callbacks: list[Any], **arguments: Any) -> str:
    """Write the config of a run of 8 updates, and return its path."""
    data = arguments.pop("data", DIGITS)
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"save_last": True, "every_n_train_steps": 4},
    }
    content = {
        "seed_everything": 3,
        "model": {
            "class_path": f"ddim_pl.training.{model}",
            "init_args": {"optimizer": ADAM, "ema_decay": 0.9, **arguments},
        },
        "data": data,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "gradient_clip_val": 1.0,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 2,
            "limit_test_batches": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": name, "version": 0},
            },
            "callbacks": [*callbacks, checkpoint],
        },
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in one, those of the network and those of its average."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    parts = {"network": [], "average": [], "teacher": []}
    for name in sorted(state):
        kind = name.partition(".")[0]
        if kind in parts and torch.is_tensor(state[name]):
            parts[kind].append(state[name].double().flatten())
    return {kind: torch.cat(found) for kind, found in parts.items() if found}


def table(file: Path, without: tuple[str, ...] = ()) -> torch.Tensor:
    """All numbers of a CSV file."""
    rows = list(csv.DictReader(file.read_text().splitlines()))
    found = []
    for row in rows:
        for name, value in row.items():
            try:
                if name not in without:
                    found.append(float(value))
            except ValueError:  # a name
                continue
    return torch.tensor(found, dtype=torch.float64)


def fits(folder: Path) -> Iterator[tuple[str, Any]]:
    """Weights after a few updates of every training method, and what their runs wrote."""
    from ddim_pl.cli import main

    teacher_args = {"network": UNET, "num_steps": 4, "level_sampling": "antithetic"}
    cosine = {"class_path": "ddim_pl.schedules.CosineLogSNRSchedule"}
    main(
        [
            "fit",
            "--config",
            config(
                folder,
                "ddpm",
                "DDPM",
                [FRECHET, BITS],
                **teacher_args,
                warmup_steps=3,
                lr_scheduler={
                    "class_path": "torch.optim.lr_scheduler.StepLR",
                    "init_args": {"step_size": 3},
                },
            ),
        ]
    )
    main(
        [
            "fit",
            "--config",
            config(
                folder,
                "teacher",
                "DDPM",
                [],
                **teacher_args,
                schedule=cosine,
                time_input="log_snr",
                prediction="v",
                loss_weight="truncated_snr",
                timesteps="linear",
            ),
        ]
    )
    gamma = {"class_path": "ddim_pl.noise.GammaNoise", "init_args": {"theta_0": 0.1}}
    main(
        [
            "fit",
            "--config",
            config(
                folder,
                "gamma",
                "DDPM",
                [],
                **teacher_args,
                schedule=cosine,
                noise=gamma,
                time_input="log_snr",
                prediction="v",
                loss_weight="snr_plus_one",
                loss="l1",
                timesteps="linear",
            ),
        ]
    )
    for name in ("teacher", "gamma"):
        main(
            [
                "fit",
                "--config",
                config(
                    folder,
                    f"{name}-progressive",
                    "ProgressiveDistillation",
                    [FRECHET, STUDENTS],
                    teacher=str(last(folder, name)),
                    rounds=[[2, 4], [1, 4]],
                    conversion_updates=0,
                    warmup_steps=1,
                ),
            ]
        )
    main(
        [
            "fit",
            "--config",
            config(
                folder,
                "eps-progressive",
                "ProgressiveDistillation",
                [STUDENTS],
                teacher=str(last(folder, "ddpm")),
                rounds=[[2, 3], [1, 3]],
                conversion_updates=2,
            ),
        ]
    )
    pairs = {
        "class_path": "ddim_pl.data.teacher_pairs.TeacherPairsDataModule",
        "init_args": {
            "images": {"class_path": "ddim_pl.data.digits.DigitsDataModule"},
            "folder": str(folder / "pairs"),
            "num_pairs": 64,
            "num_validation": 16,
            "shard_size": 32,
            "batch_size": 16,
            "steps_per_epoch": 4,
        },
    }
    main(
        [
            "fit",
            "--config",
            config(
                folder,
                "luhman",
                "LuhmanDistillation",
                [FRECHET],
                data=pairs,
                teacher=str(last(folder, "ddpm")),
                loss="l1",
                teacher_timesteps="quadratic",
                teacher_num_steps=4,
                warmup_steps=2,
            ),
        ]
    )
    for run in ("ddpm", "teacher", "gamma", "luhman"):
        yield from prefixed(f"fit/{run}", weights(last(folder, run)))
    for run in ("teacher-progressive", "gamma-progressive", "eps-progressive"):
        yield from prefixed(f"fit/{run}", weights(last(folder, run)))
        students = folder / run / "version_0" / "students" / "students.csv"
        yield f"fit/{run}/students", table(students)
    store = folder / "pairs"
    from safetensors.torch import load_file

    for shard in sorted(store.glob("*.safetensors")):
        yield f"pairs/{shard.stem}", load_file(shard)["images"]


def last(folder: Path, run: str) -> Path:
    """The last checkpoint of a run."""
    return folder / run / "version_0" / "checkpoints" / "last.ckpt"


def images(folder: Path) -> Iterator[tuple[str, Any]]:
    """Images of every sampler and every strategy of levels."""
    from ddim_pl import samplers, timesteps
    from ddim_pl.training import DDPM

    models = {
        name: DDPM.load_from_checkpoint(last(folder, name), weights_only=True)
        for name in ("ddpm", "teacher", "gamma")
    }
    for model in models.values():  # after a few updates a network answers almost nothing yet
        generator = torch.Generator().manual_seed(0)
        for values in model.average.module.parameters():
            values.data += 0.1 * torch.randn(values.shape, generator=generator)
    kinds = {
        name: kind
        for name, kind in inspect.getmembers(samplers, inspect.isclass)
        if issubclass(kind, samplers.Sampler) and not inspect.isabstract(kind)
    }
    changes: dict[str, list[dict[str, Any]]] = {
        "DDIM": [{"eta": 0.5}, {"eta": 1.0}],
        "DDPM": [{"variance": "large"}],
        "Ancestral": [{"variance": "large"}],
        "PNDM": [{"warmup": "prk"}],
        "GammaMoment": [{"eta": 0.5}],
        "DPMSolverPP": [{"order": 1}],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kind in sorted(kinds.items()):
            of_gamma = name.startswith("Gamma")
            common = {"theta_0": 0.1} if of_gamma else {}
            label = "Ancestral" if name == "DDPM" else name
            for change in [{}, *changes.get(name, [])]:
                sampler = kind(**common, **change)
                text = ",".join(f"{key}={value}" for key, value in change.items())
                for model in ("gamma",) if of_gamma else ("ddpm", "teacher"):
                    drawn = models[model].sample(range(3), sampler=sampler)
                    yield f"sample/{model}/{label}({text})", drawn
        repaint = samplers.RePaint(jump_length=2, num_resamples=2)
        model = models["ddpm"]
        z, generators = model.latents(range(2), 1000.0)
        label = model.label_of(range(2))
        known = torch.zeros(2, 1, 8, 8)
        drawn = repaint(
            model.conditioned(label),
            z,
            model.levels,
            image=known,
            mask=torch.arange(8) < 4,
            generator=generators,
        )
        yield "sample/ddpm/RePaint", drawn
        for name, strategy in sorted(timesteps.strategies().items()):
            for model in ("ddpm", "teacher"):
                yield f"levels/{model}/{name}", strategy(models[model].schedule, 7)


def commands(folder: Path) -> Iterator[tuple[str, Any]]:
    """What the command line writes."""
    from safetensors.torch import load_file

    from ddim_pl.cli import main

    run = folder / "ddpm" / "version_0"
    at = ["--ckpt_path", str(last(folder, "ddpm"))]
    main(["test", *at])
    results = json.loads((run / "test-results.json").read_text())
    values = [v for k, v in sorted(results.items()) if k.startswith("test/") and "second" not in k]
    yield "test", torch.tensor(values, dtype=torch.float64)
    main(["sample", *at, "--num_images", "5", "--npz", "true"])
    yield "command/sample", torch.from_numpy(np.load(run / "sample" / "samples.npz")["arr_0"])
    main(["sweep", *at, "--timesteps", "[linear,adaptive]", "--num_steps", "[3]"])
    yield "command/sweep", table(run / "sweep" / "sweep.csv", ("images per second",))
    levels = next((run / "sweep" / "cells").glob("adaptive-*.json"))
    found = json.loads(levels.read_text())["levels"]["3"]
    yield "command/levels", torch.tensor(found, dtype=torch.float64)
    main(["reconstruct", *at, "--num_steps", "[2,4]", "--num_images", "4"])
    yield "command/reconstruct", table(run / "reconstruct" / "reconstruct.csv")
    main(["invert", *at, "--num_images", "2", "--num_steps", "4", "--num_updates", "3"])
    yield "command/invert", load_file(run / "invert" / "latents.safetensors")["latents"]
    main(["interpolate", *at, "--num_pairs", "2", "--num_points", "3"])
    picture = (run / "interpolate" / "grid.png").read_bytes()
    yield "command/interpolate", torch.frombuffer(bytearray(pixels(picture)), dtype=torch.uint8)
    ladder = folder / "teacher-progressive" / "version_0"
    at = ["--ckpt_path", str(last(folder, "teacher"))]
    few = ["--num_steps", "[2]", "--num_samples", "40"]
    few += ["--features", "ddim_pl.metrics.digits.DigitsFeatures"]
    main(["compare", *at, "--students", f"[{ladder}]", *few])
    compared = folder / "teacher" / "version_0" / "distillation" / "distillation.csv"
    yield "command/compare", table(compared)


def pixels(png: bytes) -> bytes:
    """What a PNG shows, whatever wrote it."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return image.tobytes()


def prefixed(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield f"{prefix}/{name}", value


def summary(value: torch.Tensor) -> dict[str, Any]:
    """The digest of all bits, some of the numbers, and the largest."""
    array = np.ascontiguousarray(value.detach().cpu().numpy())
    flat = array.reshape(-1).astype(np.float64)
    places = np.linspace(0, max(len(flat) - 1, 0), min(KEPT, len(flat))).round().astype(int)
    return {
        "digest": hashlib.sha256(array.tobytes()).hexdigest()[:16],
        "shape": list(array.shape),
        "norm": float(np.linalg.norm(flat)),
        "most": float(np.abs(flat).max(initial=0)),
        "some": [float(flat[i]) for i in places],
    }


def machine() -> dict[str, str]:
    """What decides of the last bits."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = " ".join(
            line.partition(":")[2].strip()
            for line in lines
            if line.startswith(("cpu family", "model\t", "model name", "stepping"))
        )[:200]
    return {
        "processor": processor,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def collect(folder: Path) -> dict[str, Any]:
    """All numbers, by name."""
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            name: summary(value)
            for part in (fits, images, commands)
            for name, value in part(folder)
        }


def differences(found: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """What is not as it was recorded, in words."""
    numbers, same_machine = recorded["numbers"], recorded["machine"] == machine()
    problems = [f"{name} is missing" for name in numbers.keys() - found.keys()]
    problems += [f"{name} is not recorded" for name in found.keys() - numbers.keys()]
    for name in numbers.keys() & found.keys():
        old, new = numbers[name], found[name]
        if old["shape"] != new["shape"]:
            problems.append(f"{name} has shape {new['shape']}, recorded {old['shape']}")
            continue
        size = max(old["most"], 1e-12)
        far = max(
            (abs(a - b) / size for a, b in zip(old["some"], new["some"], strict=True)), default=0
        )
        far = max(far, abs(old["norm"] - new["norm"]) / max(old["norm"], 1e-12))
        if same_machine and old["digest"] not in (None, new["digest"]):
            problems.append(f"{name} has other bits (kept numbers differ by {far:.1e})")
        elif not far <= TOLERANCE:
            problems.append(f"{name} differs by {far:.1e} of its largest")
    return sorted(problems)


def main() -> None:
    """Compare, or record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="record all of them")
    parser.add_argument("--add", action="store_true", help="record those that are new")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = collect(Path(folder))
    if given.add:
        content = json.loads(NUMBERS.read_text())
        new = {name: found[name] for name in found.keys() - content["numbers"].keys()}
        if content["machine"] != machine():  # whose bits are unknown
            new = {name: {**entry, "digest": None} for name, entry in new.items()}
        content["numbers"] |= new
        NUMBERS.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        print(f"{len(new)} added")
        return
    if given.record:
        content = {"machine": machine(), "numbers": found}
        NUMBERS.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        print(f"{len(found)} recorded")
        return
    problems = differences(found, json.loads(NUMBERS.read_text()))
    print("\n".join(problems) or f"all {len(found)} as recorded")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
