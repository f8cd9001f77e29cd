"""How near a forward pass comes to what the machine can do.

Three limits: the rate of a large matrix product; the time of the network's own convolutions and
linear maps, each alone with the input it has in the network; and what these layers must take by
count, each the longer of its operations at the rate of the matrix product and its bytes (input,
weights and output, once) at the rate of a copy. What is between is memory: norms, activations.
"""

import copy
from functools import partial

import torch
from measuring import MIB, Bench, Row
from subjects import (
    diffusers_network,
    has,
    in_precision,
    make_network,
    network_arguments,
    other_memory_format,
    precisions,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Inputs = list[tuple[nn.Module, Tensor]]


def limits(bench: Bench) -> None:
    """The rate of matrix products, and the share of it that the networks reach."""
    size = 64 if bench.tiny else 8192 if bench.device == "cuda" else 2048
    batches = {"digits": 64, "cifar10": 256 if bench.device == "cuda" else 8}
    bench.case("copy", partial(_copy, bench))
    for precision in precisions(bench.device):
        bench.case(f"matrix {size}, {precision}", partial(_matrix, bench, size, precision))
    for name, batch in batches.items():
        for precision in precisions(bench.device):
            rows = {row["case"]: row for row in bench.results.rows("limits")}
            found = rows.get(f"matrix {size}, {precision}"), rows.get("copy")
            if None not in found:
                rates = found[0]["GFLOP/s"], found[1]["GB/s"]
                bench.case(
                    f"{name}, batch {batch}, {precision}",
                    partial(_forward, bench, name, 2 if bench.tiny else batch, precision, rates),
                )


def count_flops(network: nn.Module, z: Tensor, *rest: Tensor) -> int:
    """Floating-point operations of a forward pass: two for a product and a sum."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(z, *rest)
    return counter.get_total_flops()


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _copy(bench: Bench) -> list[Row]:
    """Bytes read and written in a second, of blocks that no cache holds."""
    size = MIB * (1 if bench.tiny else 2048 if bench.device == "cuda" else 256)
    a = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    b = torch.ones_like(a)
    rows = bench.in_turn({"copy": lambda: a.copy_(b)}, work=2 * size / 1e9, unit="GB")
    return [{k: v for k, v in row.items() if k not in ("speed", "quartiles")} for row in rows]


def _matrix(bench: Bench, size: int, precision: str) -> list[Row]:
    a = torch.randn(size, size, device=bench.device, dtype=_dtype(precision))
    with in_precision(precision):
        rows = bench.in_turn(
            {"matrix product": lambda: a @ a}, work=2 * size**3 / 1e9, unit="GFLOP"
        )
    return [{k: v for k, v in row.items() if k not in ("speed", "quartiles")} for row in rows]


@torch.no_grad()
def _forward(
    bench: Bench, name: str, batch: int, precision: str, rates: tuple[float, float]
) -> list[Row]:
    """The network as it is, in the other memory format, its layers alone, and diffusers'."""
    network = make_network(name, tiny=bench.tiny).eval().to(bench.device, _dtype(precision))
    inputs = example(network, batch)
    word, layout = other_memory_format(network)
    other = copy.deepcopy(network).to(memory_format=layout)
    flops = count_flops(network, *(x[:1] for x in inputs)) * batch
    layers = inputs_of_layers(network, inputs)
    contenders = {
        "forward": lambda: network(*inputs),
        f"forward, {word}": lambda: other(inputs[0].to(memory_format=layout), *inputs[1:]),
        "its layers alone": partial(run_layers, layers),
        f"its layers alone, {word}": partial(
            run_layers, inputs_of_layers(other, [inputs[0].to(memory_format=layout), *inputs[1:]])
        ),
    }
    if has(bench, "diffusers"):
        theirs = diffusers_network(network_arguments(name, tiny=bench.tiny)).eval()
        theirs = theirs.to(bench.device, _dtype(precision))
        contenders["diffusers' forward"] = lambda: theirs(*inputs)
    with in_precision(precision):
        rows = bench.in_turn(contenders, work=flops / 1e9, unit="GFLOP")
    least, moved = counted(layers, *rates)
    for row in rows:
        row["GFLOP an image"] = flops / batch / 1e9
        row["GB of the layers"] = moved
        row["share of the matrix rate"] = row["GFLOP/s"] / rates[0]
        row["share of the count"] = least / row["seconds"]
    alone = {row["contender"]: row["seconds"] for row in rows}
    for row, layer in ((rows[0], "its layers alone"), (rows[1], f"its layers alone, {word}")):
        row["share of the layers' rate"] = alone[layer] / row["seconds"]
    return rows


def example(network: nn.Module, batch: int) -> list[Tensor]:
    """Arguments of a forward pass: states, times and, if there are classes, labels."""
    weight = next(network.parameters())
    shape = (batch, network.in_channels, *[network.image_size] * 2)
    z = torch.randn(shape, device=weight.device, dtype=weight.dtype)
    inputs = [z, torch.full((batch,), 500.0, device=weight.device)]
    classes = network.num_classes
    if classes:
        inputs.append(torch.arange(batch, device=weight.device) % classes)
    return inputs


def inputs_of_layers(network: nn.Module, inputs: list[Tensor]) -> Inputs:
    """Every convolution and linear map, with the input it gets."""
    found: Inputs = []
    kinds = (nn.Conv2d, nn.Linear)
    hooks = [
        module.register_forward_pre_hook(lambda m, args: found.append((m, args[0])))
        for module in network.modules()
        if isinstance(module, kinds)
    ]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def counted(layers: Inputs, gflops: float, gigabytes: float) -> tuple[float, float]:
    """Seconds that the layers must take, and the gigabytes that they move.

    Args:
        layers: With their inputs.
        gflops: GFLOP in a second.
        gigabytes: GB in a second.
    """
    least = moved = 0.0
    for layer, x in layers:
        tensors = (x, layer(x), *layer.parameters())
        size = sum(each.numel() * each.element_size() for each in tensors) / 1e9
        least += max(count_flops(layer, x) / 1e9 / gflops, size / gigabytes)
        moved += size
    return least, moved


def run_layers(layers: Inputs) -> None:
    """Call each layer with its own input."""
    for layer, x in layers:
        layer(x)
