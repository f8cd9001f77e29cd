"""What is measured: the models of the configs, the same networks of other packages, settings.

Nothing here is downloaded: weights and images are random.
"""

import copy
import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from measuring import ROOT, Bench
from torch import Tensor, nn

from ddim_pl.networks.unet import UNet
from ddim_pl.samplers import DDIM
from ddim_pl.schedules import ImprovedCosineSchedule, LinearSchedule
from ddim_pl.training import DDPM, DiffusionModule

CONFIGS = {"digits": "configs/digits/ddpm.yaml", "cifar10": "configs/cifar10/ddpm.yaml"}
TINY = {"image_size": 8, "channels": 8, "multipliers": [1, 2], "num_blocks": 1}
TINY |= {"attention": [4], "groups": 4}
# Settings that change what is computed, not how. All others with a choice of values are measured.
OF_THE_METHOD = {"prediction", "time_input", "clip", "loss_weight", "loss", "level_sampling"}
OF_THE_METHOD |= {"scale_shift", "resample", "initialisation", "null_class"}


# ---- models of the configs --------------------------------------------------------------------


def config_of(name: str) -> dict[str, Any]:
    """The config of an experiment, as it is in its file."""
    return yaml.safe_load((ROOT / CONFIGS[name]).read_text())


def build(node: Any) -> Any:
    """Objects from their description in a config."""
    if isinstance(node, dict) and "class_path" in node:
        arguments = {name: build(value) for name, value in node.get("init_args", {}).items()}
        return named(node["class_path"])(**arguments)
    if isinstance(node, str) and node.startswith("ddim_pl."):
        return named(node)
    return node


def named(path: str) -> Any:
    """Class or function of this name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def network_arguments(name: str, *, tiny: bool = False) -> dict[str, Any]:
    """Arguments of the network of a config, made small if `tiny`."""
    given = config_of(name)["model"]["init_args"]["network"]["init_args"]
    return given | TINY if tiny else given


def make_network(name: str, *, tiny: bool = False, **changes: Any) -> UNet:
    """The network of a config with random weights, which answers no zeros."""
    torch.manual_seed(0)
    network = UNet(**network_arguments(name, tiny=tiny) | changes)
    return randomised(network)


def randomised(network: nn.Module) -> nn.Module:
    """The network with weights about 0.02: new ones of most U-Nets answer zeros."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    return network


def make_model(name: str, *, tiny: bool = False, **changes: Any) -> DDPM:
    """The model of a config with random weights, drawn from by DDIM as diffusers' pipelines are.

    Args:
        name: Of the config.
        tiny: Whether its network is small.
        **changes: Arguments of `DDPM` or of `UNet` in place of the config's.
    """
    of_network = set(inspect.signature(UNet).parameters)
    network = make_network(
        name, tiny=tiny, **{key: value for key, value in changes.items() if key in of_network}
    )
    given = config_of(name)["model"]["init_args"]
    plain = {key: build(value) for key, value in given.items() if key not in FACTORIES}
    plain |= {key: factory(given[key]) for key in FACTORIES if key in given}
    if not isinstance(plain["sampler"], DDIM):
        plain["sampler"] = DDIM()
    plain |= {key: value for key, value in changes.items() if key not in of_network}
    return DDPM(**plain | {"network": network})


FACTORIES = ("optimizer", "lr_scheduler")


def factory(node: dict[str, Any]) -> Callable[..., Any]:
    """A class with some of its arguments."""
    return functools.partial(named(node["class_path"]), **node.get("init_args", {}))


# ---- settings that change the speed alone -----------------------------------------------------


def offered(*kinds: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Settings of constructors with a choice of values, each with a value that is not the default.

    They are read off the signatures: parameters that are annotated as bool or `Literal`, but for
    those of the method. A setting that is added later is measured without a change here.
    """
    found: dict[tuple[str, str], tuple[str, Any]] = {}
    for kind in kinds:
        hints = get_type_hints(kind.__init__ if inspect.isclass(kind) else kind)
        for name, parameter in inspect.signature(kind).parameters.items():
            if name in OF_THE_METHOD or name not in hints:
                continue
            for value in choices(hints[name]):
                if value != parameter.default or type(value) is not type(parameter.default):
                    found[name, repr(value)] = (name, value)
    return list(found.values())


def choices(hint: Any) -> tuple[Any, ...]:
    """The values of an annotation, if they can be counted."""
    if hint is bool:
        return (False, True)
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(value for part in get_args(hint) for value in choices(part))
    return ()


def settings(
    bench: Bench,
    precision: str,
    *,
    network: bool = True,
    without: Sequence[tuple[str, Any]] = (),
) -> list[tuple[str, Any]]:
    """Settings of the product that are measured at a precision, see `offered`.

    What compiles, or not, takes part only in bf16, and if the bench says so; the network's own
    settings only if `network`; those of `without`, which change nothing there, not at all.
    """
    every = offered(DDPM, DiffusionModule, *([UNet] if network else []))
    every = [each for each in every if each not in without]
    if bench.compile and precision == "bf16":
        return every
    if not bench.compile and any("compile" in name for name, _ in every):
        bench.note("what compiles is left out; `--compile` measures it")
    return [(name, value) for name, value in every if "compile" not in name]


def other_memory_format(network: nn.Module) -> tuple[str, torch.memory_format]:
    """The order of dimensions in memory that a network's convolutions do not have."""
    convolutions = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    # Where a kernel or the input has one element, both orders are the same.
    weight = next(c.weight for c in convolutions if min(c.kernel_size[0], c.in_channels) > 1)
    if weight.is_contiguous(memory_format=torch.channels_last):
        return "contiguous by hand", torch.contiguous_format
    return "channels_last by hand", torch.channels_last


# ---- precision --------------------------------------------------------------------------------


def precisions(device: str) -> Sequence[str]:
    """Precisions that are compared. On a GPU "float32" has TF32 where PyTorch ships it."""
    return ("float32", "bf16", *(("tf32", "ieee float32") if device == "cuda" else ()))


def shipped(bench: Bench) -> dict[str, Any]:
    """Arguments of a model as it is without settings: on a GPU a fit compiles by itself."""
    return {} if bench.compile or bench.device == "cpu" else {"compile": False}


@contextmanager
def in_precision(name: str) -> Iterator[None]:
    """Set what float32 means on a GPU: TF32 nowhere, in convolutions, or everywhere."""
    old = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name != "ieee float32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old[0])
        torch.backends.cudnn.allow_tf32 = old[1]


def autocast(device: str, precision: str) -> Any:
    """Autocast for training in bf16, else nothing."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


def converted(model: DDPM, precision: str) -> DDPM:
    """A copy of the model that samples in a precision, as `--trainer.precision bf16-true` does."""
    model = copy.deepcopy(model).eval()
    if precision == "bf16":
        model.average.module.to(torch.bfloat16)
    return model


# ---- other packages ---------------------------------------------------------------------------


def has(bench: Bench, package: str) -> bool:
    """Whether a package is installed; a note if it is not."""
    there = find_spec(package.replace("-", "_")) is not None
    if not there:
        bench.note(f"{package} is not installed: the comparison with it is left out")
    return there


def diffusers_network(arguments: dict[str, Any]) -> nn.Module:
    """Diffusers' U-Net that computes what our `UNet` with these arguments does."""
    from diffusers import UNet2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    args = UNet(**arguments).init_args
    widths = [args["channels"] * multiplier for multiplier in args["multipliers"]]
    attends = [args["image_size"] >> i in args["attention"] for i in range(len(widths))]
    plain = "Resnet{}sampleBlock2D" if args["resample"] == "block" else "{}Block2D"
    down = ["AttnDownBlock2D" if each else plain.format("Down") for each in attends]
    up = ["AttnUpBlock2D" if each else plain.format("Up") for each in reversed(attends)]
    resample = "resnet" if args["resample"] == "block" else "conv"
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=args["image_size"],
        in_channels=args["in_channels"],
        out_channels=args["out_channels"] or args["in_channels"],
        block_out_channels=tuple(widths),
        layers_per_block=args["num_blocks"],
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        downsample_padding=0,
        downsample_type=resample,
        upsample_type=resample,
        dropout=args["dropout"],
        resnet_time_scale_shift="scale_shift" if args["scale_shift"] else "default",
        attention_head_dim=None,  # one head
        norm_num_groups=args["groups"],
        attn_norm_num_groups=args["groups"],
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        num_class_embeds=args["num_classes"],
    )
    return randomised(network)


def diffusers_scheduler(model: DDPM, *, clip: bool) -> Any:
    """Diffusers' DDIM with the schedule and prediction of a model, at trailing levels."""
    from diffusers import DDIMScheduler

    betas = {LinearSchedule: "linear", ImprovedCosineSchedule: "squaredcos_cap_v2"}
    kinds = {"eps": "epsilon", "x": "sample", "v": "v_prediction"}
    return DDIMScheduler(
        num_train_timesteps=model.schedule.num_levels,
        beta_schedule=betas[type(model.schedule)],
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=kinds[model.prediction],
        clip_sample=clip,
        timestep_spacing="trailing",
        steps_offset=0,
    )


def diffusers_pipeline(model: DDPM, network: nn.Module, *, clip: bool) -> Any:
    """Diffusers' pipeline; image i of a batch has class i, as our models have it."""
    from diffusers import DDIMPipeline

    classes = model.num_classes
    if classes is not None:

        def labelled(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            labels = torch.arange(len(args[0]), device=args[0].device) % classes
            return args, {**kwargs, "class_labels": labels}

        network.register_forward_pre_hook(labelled, with_kwargs=True)
    pipeline = DDIMPipeline(unet=network, scheduler=diffusers_scheduler(model, clip=clip))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def lucidrains_diffusion(arguments: dict[str, Any], steps: int) -> nn.Module:
    """GaussianDiffusion of denoising-diffusion-pytorch with its own U-Net of the same widths.

    Another network: it has linear attention at all resolutions, and other blocks. Its number of
    parameters stands beside it.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    args = UNet(**arguments).init_args
    torch.manual_seed(0)
    network = Unet(
        args["channels"],
        dim_mults=tuple(args["multipliers"]),
        channels=args["in_channels"],
        flash_attn=True,  # as their README has it
    )
    return GaussianDiffusion(network, image_size=args["image_size"], sampling_timesteps=steps)


class Nothing(nn.Module):
    """A network that costs nothing: it answers its input."""

    init_args: ClassVar[dict[str, Any]] = {}

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the states `(B, ...)`."""
        return z
