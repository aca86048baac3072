"""A model, not a measurement: the time of a training step on many GPUs, from operations, bytes and messages.

Data parallelism: each GPU has the whole network and its own streams, whose states never leave it. A step exchanges the
gradients, which overlaps with backward, and each batch two small messages (its size; whether a signal came). Left out:
data, softmax, machines that are slower than others, and that the steps of a recurrence are sequential.
"""

import argparse
from dataclasses import dataclass

from benchmarks.timing import print_table

# Data sheet of the H100 SXM, and common networks.
MATRIX = 0.4 * 989e12  # FLOP/s of bfloat16 matrix products, at an efficiency of 40 %
MEMORY = 0.8 * 3.35e12  # bytes/s of elementwise work
LAUNCH = 4e-6  # seconds between small kernels
NVLINK = 0.7 * 450e9  # bytes/s of a GPU in one direction, within a machine
MACHINE = 8  # GPUs
NETWORKS = {"400 Gb/s a GPU": 0.7 * 50e9, "100 Gb/s a machine": 0.7 * 12.5e9 / MACHINE}
LATENCY = {"within": 3e-6, "between": 8e-6}  # seconds of a message, with the software around it
GRADIENT = 4  # bytes: float32, as with trainer.precision=bf16-mixed
OPTIMISER = 28  # bytes that Adam reads and writes for a parameter
GPUS = (1, 8, 64, 512)


@dataclass(frozen=True)
class Network:
    """The encoder of a language model; all figures are for one layer, training, and one token."""

    name: str
    layers: int
    weights: int  # in matrices
    attended: float  # multiplications of attention scores and sums
    elements: float  # that elementwise kernels read and write, in 2 bytes
    kernels: int  # launched in forward and backward

    @property
    def parameters(self) -> int:
        return self.layers * self.weights

    def compute(self, tokens: int) -> tuple[float, float]:
        """Seconds of forward with the optimiser, and of backward."""
        products = 2 * (self.weights + self.attended) * tokens * self.layers / MATRIX
        elementwise = 2 * self.elements * tokens * self.layers / MEMORY
        rest = (elementwise + LAUNCH * self.kernels * self.layers) / 3
        return products + rest + OPTIMISER * self.parameters / MEMORY, 2 * (products + rest)


def sru(layers: int, width: int) -> Network:
    # The recurrence moves 6 numbers forward and 10 backward (bench/NOTES.md).
    return Network(f"SRU, {layers} x {width}", layers, 3 * width**2, 0, 16 * width, 12)


def srupp(layers: int, width: int, proj: int, context: int) -> Network:
    weights = width * proj + 2 * proj**2 + 3 * width * proj
    return Network(f"SRU++, {layers} x {width}", layers, weights, 2 * proj * context, 16 * width + 40 * proj, 40)


def transformer_xl(layers: int, width: int, inner: int, context: int) -> Network:
    weights = 5 * width**2 + 2 * width * inner
    elements = 3 * (14 * width + 4 * inner)
    return Network(f"Transformer-XL, {layers} x {width}", layers, weights, 3 * width * context, elements, 70)


def ring(size: float, gpus: int, speed: float, latency: float) -> float:
    """Seconds to sum `size` bytes over a ring of GPUs."""
    return 0.0 if gpus == 1 else 2 * (gpus - 1) * (size / gpus / speed + latency)


def all_reduce(size: float, gpus: int, speed: float) -> float:
    """The same over machines: sums within each, then between them, each GPU with its part; sent by trees if small."""
    machines, local = max(1, gpus // MACHINE), min(gpus, MACHINE)
    within, between = LATENCY["within"], LATENCY["between"]
    if size < 1e5:
        return 2 * ((local - 1).bit_length() * within + (machines - 1).bit_length() * between)
    return ring(size, local, NVLINK, within) + ring(size / local, machines, speed, between)


def step(network: Network, tokens: int, gpus: int, speed: float, accumulated: int = 1) -> tuple[float, float]:
    """Seconds of computation, and of waiting for messages, of a step of `accumulated` batches."""
    forward, backward = network.compute(tokens)
    gradients = all_reduce(GRADIENT * network.parameters, gpus, speed)
    waiting = max(0.0, gradients - 0.9 * backward)  # the last layers' gradients come too late to overlap
    small = 2 * accumulated * all_reduce(8, gpus, speed) if gpus > 1 else 0.0
    return accumulated * (forward + backward), waiting + small


def needed_accumulation(network: Network, tokens: int, gpus: int, speed: float, share: float = 0.1) -> int:
    """The smallest trainer.accumulate_grad_batches with which messages take at most this share of a step."""
    for count in range(1, 1000):
        computing, waiting = step(network, tokens, gpus, speed, count)
        if waiting <= share * (computing + waiting):
            return count
    return 1000


def run(options: argparse.Namespace) -> None:
    context = 768  # steps that a step sees: the memory of 512 and half of the segment
    networks = (
        sru(6, 1536),
        srupp(10, 2048, 512, context),
        transformer_xl(12, 512, 2048, context),
        srupp(10, 4096, 1024, context),
    )
    tokens = options.tokens
    print(f"A model, not a measurement: {tokens} tokens a GPU and batch, bfloat16, H100 of the data sheet.\n")
    for place, speed in NETWORKS.items():
        print(f"Between machines: {place}.\n")
        rows = []
        for network in networks:
            cells = [network.name, f"{network.parameters / 1e6:.0f} M"]
            for gpus in GPUS:
                computing, waiting = step(network, tokens, gpus, speed)
                cells.append(f"{1e3 * (computing + waiting):.1f} ({100 * waiting / (computing + waiting):.0f} %)")
            rows.append([*cells, str(needed_accumulation(network, tokens, 512, speed))])
        names = [f"{gpus} GPU{'s' * (gpus > 1)}, ms (waiting)" for gpus in GPUS]
        print_table(["network", "matrices", *names, "batches for 10 %"], rows)
        print()
