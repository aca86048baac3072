"""The recurrence's kernels: the reference against plain arithmetic, the compiled ones against the reference."""

import itertools
import math
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sru.kernels import cpu, recurrence

ROOT = Path(__file__).parent.parent
NAMES = ("u", "x", "v", "b", "c0")
# What fills the skip: x, the fourth row of u, or nothing; then scale is 0.
SKIPS = ("x", "u", "none")
SHAPES = [(1, 1, 1), (3, 2, 5), (7, 3, 33), (17, 5, 129), (40, 32, 128), (3, 70, 6), (5, 2, 1100), (2, 300, 4)]
EMPTY_SHAPES = [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)]


def draw(steps, batch, size, skip="x"):
    """The recurrence's tensors and the gradients (gh, gc) that come back, in float64 with values of float32."""
    shapes = {"u": (steps, batch, 4 if skip == "u" else 3, size), "v": (2, size), "b": (2, size), "c0": (batch, size)}
    if skip == "x":
        shapes["x"] = (steps, batch, size)
    shapes |= {"gh": (steps, batch, size), "gc": (batch, size)}
    return {"x": None} | {name: torch.randn(shape).double() for name, shape in shapes.items()}


def run(tensors, backend, dtype=torch.float64, needs=NAMES, **options):
    """h, c_last and the gradient of every input that needs one; zeros where none arrives."""
    leaves = {n: None if tensors[n] is None else tensors[n].detach().to(dtype) for n in NAMES}
    leaves = {n: t.clone(memory_format=torch.preserve_format) for n, t in leaves.items() if t is not None}
    for name in needs:
        if name in leaves:
            leaves[name].requires_grad_()
    options = {n: o.to(dtype) if n == "mask" and o is not None else o for n, o in options.items()}
    h, c_last = recurrence(**{"x": None, **leaves}, backend=backend, **options)
    results = {"h": h.detach(), "c_last": c_last.detach()}
    pairs = [(y, tensors[g].to(dtype)) for y, g in ((h, "gh"), (c_last, "gc")) if y.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    for name in needs:
        if name in leaves:
            leaf = leaves[name]
            results["gradient of " + name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return results


def assert_fused_follows_the_reference(tensors, **options):
    """In float32 four times the reference's own rounding is allowed, in float64 next to nothing."""
    true, rounded = (run(tensors, "reference", dtype, **options) for dtype in (torch.float64, torch.float32))
    fused, exact = (run(tensors, "cpu", dtype, **options) for dtype in (torch.float32, torch.float64))
    for name, expected in true.items():
        assert fused[name].shape == exact[name].shape == expected.shape, name
        torch.testing.assert_close(exact[name], expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        if expected.numel():
            allowed = 4 * (rounded[name] - expected).abs().max() + 1e-6 * max(1, expected.abs().max())
            worst = (fused[name] - expected).abs().max()
            assert worst <= allowed, f"{name} is off by {worst:.2g}, more than {allowed:.2g}"


def assert_same_bits(results, expected):
    for name in expected:
        assert torch.equal(results[name], expected[name]), name


def pads(kind, steps, batch):
    """A padding mask (T, B) of each kind; sequences have different lengths, the first has none."""
    step, length = torch.arange(steps)[:, None], torch.arange(batch) % steps
    return {
        "none": None,
        "right": step >= steps - length,
        "left": step < length,
        "scattered": torch.rand(steps, batch) < 0.4,
        "whole sequences": (torch.arange(batch) % 2 == 1).expand(steps, batch),
    }[kind]


@pytest.fixture
def shared_out(monkeypatch):
    """However small the work, it is shared out among three threads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "SERIAL_ELEMENTS", 0)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_two_steps_worked_by_hand(backend):
    def sigmoid(z):
        return 1 / (1 + math.exp(-z))

    u, x = [(0.5, -1.0, 2.0), (-0.3, 0.7, 0.1)], [1.5, -0.8]
    (vf, vr), (bf, br), c, mask, scale = (0.4, -0.6), (0.2, 0.3), 0.9, 2.0, 1.7
    expected = []
    for (u0, u1, u2), x_t in zip(u, x, strict=True):
        f, r = sigmoid(u1 + vf * c + bf), sigmoid(u2 + vr * c + br)
        c = f * c + (1 - f) * u0
        expected.append(scale * x_t + mask * r * (math.tanh(c) - scale * x_t))
    column = [torch.tensor(a, dtype=torch.float64) for a in (u, x, (vf, vr), (bf, br), 0.9, mask)]
    shapes = [(2, 1, 3, 1), (2, 1, 1), (2, 1), (2, 1), (1, 1), (1, 1)]
    *inputs, dropout = (a.reshape(shape) for a, shape in zip(column, shapes, strict=True))
    h, c_last = recurrence(*inputs, mask=dropout, scale=scale, activation="tanh", backend=backend)
    assert h.flatten().tolist() == pytest.approx(expected, rel=1e-14)
    assert c_last.item() == pytest.approx(c, rel=1e-14)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
def test_fused_follows_the_reference_at_every_shape(shape, skip):
    steps, batch, size = shape
    mask, pad = torch.bernoulli(torch.full((batch, size), 0.5)).double() * 2, torch.rand(steps, batch) < 0.3
    scale = 0.0 if skip == "none" else 1.7
    for bidirectional in (False, True)[: 1 + (size % 2 == 0)]:
        options = {"mask": mask, "pad": pad, "scale": scale, "activation": "tanh", "bidirectional": bidirectional}
        assert_fused_follows_the_reference(draw(*shape, skip), **options)


@pytest.mark.parametrize("kind", ["none", "right", "left", "scattered", "whole sequences"])
@pytest.mark.parametrize("activation", ["identity", "tanh", "relu"])
@pytest.mark.parametrize("skip", SKIPS)
def test_fused_follows_the_reference_with_every_option(skip, activation, kind):
    steps, batch, size = 6, 5, 18
    for scale, masked, bidirectional in itertools.product((0.0, 1.0, 1.7), (False, True), (False, True)):
        if skip == "none" and scale:
            continue
        mask = torch.bernoulli(torch.full((batch, size), 0.7)).double() / 0.7 if masked else None
        pad = pads(kind, steps, batch)
        options = {"mask": mask, "pad": pad, "scale": scale, "activation": activation, "bidirectional": bidirectional}
        assert_fused_follows_the_reference(draw(steps, batch, size, skip), **options)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("skip", SKIPS)
def test_gradients_agree_with_finite_differences(skip, backend):
    tensors = draw(4, 3, 6, skip)
    inputs = [None if tensors[n] is None else tensors[n].requires_grad_() for n in NAMES]
    options = {"mask": torch.full((3, 6), 2.0).double(), "pad": pads("left", 4, 3), "scale": float(skip != "none")}
    for activation in ("identity", "tanh"):
        for bidirectional in (False, True):
            options |= {"activation": activation, "bidirectional": bidirectional, "backend": backend}
            assert torch.autograd.gradcheck(lambda *a, o=dict(options): recurrence(*a, **o), inputs)


LAYOUTS = {
    "transposed batch and time": lambda a: a.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed columns": lambda a: a.transpose(0, -1).contiguous().transpose(0, -1),
    "every second column": lambda a: a.repeat_interleave(2, dim=-1)[..., ::2],
    "part of wider rows": lambda a: torch.cat([a, a, a], dim=-1)[..., a.shape[-1] : 2 * a.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_inputs_and_gradients_does_not_matter(layout):
    tensors, mask, pad = draw(5, 4, 6, "x"), torch.rand(4, 6).double(), pads("left", 5, 4)
    expected = run(tensors, "cpu", mask=mask, pad=pad, scale=1.7)
    assert not any(LAYOUTS[layout](t).is_contiguous() for t in (tensors["u"], tensors["x"], tensors["gh"]))
    # Leaves that own such a layout, rather than copies of it.
    leaves = {n: LAYOUTS[layout](t).detach().requires_grad_() for n, t in tensors.items()}
    h, c_last = recurrence(
        *(leaves[n] for n in NAMES), mask=LAYOUTS[layout](mask), pad=LAYOUTS[layout](pad), scale=1.7, backend="cpu"
    )
    torch.autograd.backward((h, c_last), (leaves["gh"].detach(), leaves["gc"].detach()))
    results = {"h": h, "c_last": c_last, **{"gradient of " + n: leaves[n].grad for n in NAMES}}
    assert_same_bits(results, expected)


def test_gradients_that_are_one_number_expanded_arrive():
    tensors = draw(5, 4, 6)
    leaves = [tensors[n].requires_grad_() for n in NAMES]
    h, c_last = recurrence(*leaves, backend="cpu")
    expanded = torch.autograd.grad(h.sum() + 2 * c_last.sum(), leaves, retain_graph=True)
    plain = torch.autograd.grad((h, c_last), leaves, (torch.ones_like(h), torch.full_like(c_last, 2)))
    for one, other in zip(expanded, plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("output", ["h", "c_last"])
def test_a_gradient_of_one_output_alone_arrives(output):
    tensors = draw(5, 4, 6)
    leaves = [tensors[n].requires_grad_() for n in NAMES]
    gradients = []
    for backend in ("reference", "cpu"):
        outputs = dict(zip(("h", "c_last"), recurrence(*leaves, backend=backend), strict=True))
        gradients.append(torch.autograd.grad(outputs[output].square().sum(), leaves, materialize_grads=True))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("needs", [[n] for n in NAMES] + [["v", "b"], ["u", "c0"]], ids="+".join)
def test_the_inputs_that_need_a_gradient_get_the_same_one_whoever_else_needs_it(needs):
    tensors = draw(5, 4, 6)
    expected = run(tensors, "cpu", scale=1.7)
    results = run(tensors, "cpu", needs=needs, scale=1.7)
    assert_same_bits(results, {name: expected[name] for name in results})


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("skip", SKIPS)
def test_no_result_reads_memory_that_nobody_wrote(skip, bidirectional, monkeypatch):
    tensors, pad = draw(5, 7, 6, skip), pads("scattered", 5, 7)
    options = {"pad": pad, "scale": float(skip != "none"), "bidirectional": bidirectional}
    expected = run(tensors, "cpu", **options)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.ones(1).new_empty(3).isnan().all()
        results = run(tensors, "cpu", **options)
        with torch.no_grad():
            h, c_last = recurrence(*(tensors[n] for n in NAMES), backend="cpu", **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(results, expected)
    assert_same_bits({"h": h, "c_last": c_last}, {n: expected[n] for n in ("h", "c_last")})


@pytest.mark.parametrize("shape", [(3, 70, 6), (4, 3, 700), (2, 260, 132)], ids=str)
def test_results_are_bitwise_the_same_for_any_number_of_threads(shape, shared_out):
    tensors = draw(*shape)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(tensors, "cpu", torch.float32, bidirectional=True))
    assert any(thread.name.startswith("sru") for thread in threading.enumerate())
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_many_threads_may_call_at_once(shared_out):
    tasks = [draw(6, 9 + i, 40) for i in range(8)]
    expected = [run(task, "cpu", torch.float32) for task in tasks]
    start = threading.Barrier(len(tasks))

    def repeat(task):
        start.wait(timeout=30)
        return [run(task, "cpu", torch.float32) for _ in range(20)]

    with ThreadPoolExecutor(len(tasks)) as callers:
        for results, one in zip(callers.map(repeat, tasks, timeout=60), expected, strict=True):
            for result in results:
                assert_same_bits(result, one)


def test_a_forked_worker_computes_the_same(shared_out):
    tensors = draw(4, 9, 6)
    inputs = [tensors[n].float() for n in NAMES]
    expected = recurrence(*inputs, backend="cpu")
    assert any(thread.name.startswith("sru") for thread in threading.enumerate())
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work():
        h, c_last = recurrence(*inputs, backend="cpu")
        sender.send((h.tolist(), c_last.tolist()))

    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    child.start()
    try:
        assert receiver.poll(30), "the forked worker hangs"
        h, c_last = receiver.recv()
    finally:
        child.kill()
        child.join()
    assert h == expected[0].tolist()
    assert c_last == expected[1].tolist()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_inference_computes_what_training_does(bidirectional):
    tensors, pad = draw(7, 5, 34), pads("scattered", 7, 5)
    expected = run(tensors, "cpu", torch.float32, pad=pad, bidirectional=bidirectional)
    inputs = [tensors[n].float().requires_grad_() for n in NAMES]
    with torch.no_grad():
        h, c_last = recurrence(*inputs, pad=pad, bidirectional=bidirectional, backend="cpu")
    assert not h.requires_grad
    assert_same_bits({"h": h, "c_last": c_last}, {n: expected[n] for n in ("h", "c_last")})


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["right", "left"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_padded_sequence_computes_what_it_does_alone(backend, kind, bidirectional):
    tensors, pad = draw(6, 5, 8), pads(kind, 6, 5)
    together = run(tensors, backend, pad=pad, bidirectional=bidirectional)
    for j in range(5):
        kept = ~pad[:, j]
        alone = {
            n: t if n in "vb" else t[j : j + 1] if n in ("c0", "gc") else t[kept, j : j + 1] for n, t in tensors.items()
        }
        expected = run(alone, backend, bidirectional=bidirectional)
        for name in ("h", "gradient of u", "gradient of x"):
            torch.testing.assert_close(together[name][kept, j : j + 1], expected[name])
            assert not together[name][~kept, j].any()
        for name in ("c_last", "gradient of c0"):
            torch.testing.assert_close(together[name][j : j + 1], expected[name])
