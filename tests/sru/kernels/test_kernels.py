"""The compiled recurrence against the equations in float64, and what must hold of both."""

import itertools
import math

import pytest
import torch

import sru.kernels
from sru.kernels import recurrence

NAMES = ("h", "c_last", "u", "x", "v", "b", "c0")
SHAPES = [(1, 1, 1), (3, 2, 5), (7, 3, 33), (17, 5, 129), (40, 32, 128)]


COMPILED = pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def _put_tensors_where_the_backend_runs(request):
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    with torch.device("cuda" if parameters.get("backend") == "cuda" else "cpu"):
        yield


@pytest.fixture(autouse=True)
def _fill_new_memory_with_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(steps, batch, size, skip="x"):
    """u, x, v, b, c0 in float32; the skip is x, the fourth part of u, or nothing."""
    u = torch.randn(steps, batch, 4 if skip == "u" else 3, size)
    x = torch.randn(steps, batch, size) if skip == "x" else None
    # Beyond about 1, v makes some columns swing between two states, and every error with them.
    return u, x, torch.randn(2, size) / 2, torch.randn(2, size), torch.randn(batch, size)


def left(steps, batch):
    """Padding of sequence i: its first i steps, up to all of them."""
    return torch.arange(steps)[:, None] < torch.arange(batch) % (steps + 1)


def scattered(steps, batch):
    pad = torch.rand(steps, batch) < 0.4
    pad[:, -1] = True
    return pad


PADS = {"none": lambda *_: None, "left": left, "right": lambda *s: left(*s).flip(0), "scattered": scattered}


def run(arguments, backend, dtype=torch.float32, grads=None, **options):
    """h, c_last and, where gradients of the two are given, the gradient of every argument; all in float64."""
    arguments = [None if a is None else a.detach().to(dtype).requires_grad_() for a in arguments]
    if options.get("mask") is not None:
        options["mask"] = options["mask"].to(dtype)
    h, c = recurrence(*arguments, backend=backend, **options)
    assert h.dtype == c.dtype == dtype
    results = [h.detach(), c.detach()]
    if grads:
        given = [a for a in arguments if a is not None]
        found = iter(torch.autograd.grad([h, c], given, [g.to(dtype) for g in grads], materialize_grads=True))
        results += [None if a is None else next(found) for a in arguments]
    return [None if r is None else r.double() for r in results]


def assert_as_exact_as_float32_allows(backend, arguments, **options):
    """Every output and gradient of the compiled kernel lies as near to the truth as plain float32 does, times 4."""
    steps, batch, _, size = arguments[0].shape
    grads = torch.randn(steps, batch, size), torch.randn(batch, size)
    truth = run(arguments, "reference", torch.float64, grads, **options)
    plain = run(arguments, "reference", torch.float32, grads, **options)
    found = run(arguments, backend, torch.float32, grads, **options)
    exact = run(arguments, backend, torch.float64, grads, **options)
    for name, t, p, f, e in zip(NAMES, truth, plain, found, exact, strict=True):
        if t is None:
            assert f is None
            continue
        assert f.shape == t.shape, name
        if t.numel():
            size_of_t = max(1.0, t.abs().max().item())
            allowed = 4 * (p - t).abs().max().item() + 1e-6 * size_of_t
            # Written so that a NaN fails.
            assert (f - t).abs().max().item() <= allowed, name
            assert (e - t).abs().max().item() <= 1e-12 * size_of_t, name


def test_reference_agrees_with_a_case_worked_by_hand():
    def sigmoid(z):
        return 1 / (1 + math.exp(-z))

    u = torch.tensor([[[[0.5], [1.0], [-1.0]]], [[[-2.0], [0.25], [0.75]]]], dtype=torch.float64)
    x = torch.tensor([[[3.0]], [[-1.0]]], dtype=torch.float64)
    v, b = torch.tensor([[[0.5], [-0.5]], [[0.1], [0.2]]], dtype=torch.float64)
    c0 = torch.tensor([[2.0]], dtype=torch.float64)
    f1, r1 = sigmoid(1.0 + 0.5 * 2.0 + 0.1), sigmoid(-1.0 - 0.5 * 2.0 + 0.2)
    c1 = f1 * 2.0 + (1 - f1) * 0.5
    h1 = r1 * c1 + (1 - r1) * 1.5 * 3.0
    f2, r2 = sigmoid(0.25 + 0.5 * c1 + 0.1), sigmoid(0.75 - 0.5 * c1 + 0.2)
    c2 = f2 * c1 + (1 - f2) * -2.0
    h2 = r2 * c2 + (1 - r2) * 1.5 * -1.0
    for backend in ("reference", "cpu"):
        h, c = recurrence(u, x, v, b, c0, scale=1.5, backend=backend)
        torch.testing.assert_close(h.flatten().tolist(), [h1, h2], rtol=0, atol=1e-14)
        torch.testing.assert_close(c.item(), c2, rtol=0, atol=1e-14)


@COMPILED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("skip", ["x", "u", "none"])
def test_kernel_agrees_with_the_equations_at_odd_shapes(backend, shape, skip):
    assert_as_exact_as_float32_allows(backend, inputs(*shape, skip), scale=0.0 if skip == "none" else 1.3)


@COMPILED
@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("activation", ["identity", "tanh", "relu"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
def test_kernel_agrees_with_the_equations_under_every_option(backend, pad, activation, bidirectional):
    # One batch of whole tiles, and one that ends in a part of a tile and of a vector.
    shapes, scales = [(9, 8, 64), (7, 5, 38)], [0.0, 1.0, math.sqrt(3)]
    for (steps, batch, size), skip, scale in itertools.product(shapes, ["x", "u"], scales):
        mask = torch.bernoulli(torch.full((batch, size), 0.5)) * 2
        assert_as_exact_as_float32_allows(
            backend,
            inputs(steps, batch, size, skip),
            mask=mask,
            pad=PADS[pad](steps, batch),
            scale=scale,
            activation=activation,
            bidirectional=bidirectional,
        )


@COMPILED
def test_kernel_agrees_with_the_equations_over_several_tiles_of_columns(backend):
    for batch, size in ((3, 2 * 300), (33, 2 * 700)):
        assert_as_exact_as_float32_allows(backend, inputs(5, batch, size), pad=scattered(5, batch), bidirectional=True)
    # So many sequences that a tile takes more of them.
    assert_as_exact_as_float32_allows(backend, inputs(2, 300, 6))


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 2, 0)], ids=str)
def test_no_steps_return_the_initial_state_and_no_sequences_return_nothing(backend, shape):
    steps, batch, size = shape
    arguments = inputs(*shape)
    grads = torch.randn(shape), torch.randn(batch, size)
    h, c, u, x, v, b, c0 = run(arguments, backend, grads=grads, bidirectional=True)
    assert h.shape == x.shape == shape
    assert u.shape == (steps, batch, 3, size)
    assert not v.any()
    assert not b.any()
    if steps == 0:
        torch.testing.assert_close(c, arguments[4].double())
        torch.testing.assert_close(c0, grads[1].double())


@COMPILED
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
def test_memory_layout_changes_nothing(backend, bidirectional):
    u, x, v, b, c0 = inputs(6, 5, 34)
    pad, mask = scattered(6, 5), torch.rand(5, 34)
    grads = torch.randn(6, 5, 34), torch.randn(5, 34)
    options = {"bidirectional": bidirectional, "scale": 1.2}

    def layouts(a):
        # Columns apart; rows and steps apart; the first two dimensions swapped; a row for all.
        yield a.mT.contiguous().mT
        yield torch.cat([a, a.new_full((*a.shape[:-1], 3), math.nan)], -1)[..., :-3]
        yield a.transpose(0, 1).contiguous().transpose(0, 1)

    def differentiate(u, x, v, b, c0, mask, pad, grads):
        leaves = [a.detach().requires_grad_() for a in (u, x, v, b, c0)]
        h, c = recurrence(*leaves, mask=mask, pad=pad, backend=backend, **options)
        return [h, c, *torch.autograd.grad([h, c], leaves, grads)]

    expected = differentiate(u, x, v, b, c0, mask, pad, grads)
    every = (u, x, v, b, c0, mask, pad.float(), *grads)
    for u_, x_, v_, b_, c0_, mask_, pad_, gh, gc in zip(*map(layouts, every), strict=True):
        found = differentiate(u_, x_, v_, b_, c0_, mask_, pad_ == 1, (gh, gc))
        for name, e, f in zip(NAMES, expected, found, strict=True):
            assert torch.equal(e, f), name


@COMPILED
def test_expanded_gradients_are_accepted(backend):
    arguments = [a.requires_grad_() for a in inputs(4, 3, 8)]
    for reduce in (lambda h, c: h.sum() + c.sum(), lambda h, c: h.sum(), lambda h, c: c.sum()):
        compiled, plain = (
            torch.autograd.grad(reduce(*recurrence(*arguments, backend=b)), arguments, materialize_grads=True)
            for b in (backend, "reference")
        )
        for name, p, q in zip(NAMES[2:], compiled, plain, strict=True):
            torch.testing.assert_close(p, q, msg=name)


@EVERY_BACKEND
@pytest.mark.parametrize("skip", ["x", "u", "none"])
def test_gradients_agree_with_finite_differences(backend, skip):
    arguments = [None if a is None else a.double().requires_grad_() for a in inputs(4, 3, 6, skip)]
    given = [i for i, a in enumerate(arguments) if a is not None]

    def function(*values):
        full = list(arguments)
        for i, value in zip(given, values, strict=True):
            full[i] = value
        options = {"pad": left(4, 3), "scale": 0.0 if skip == "none" else 0.7, "activation": "tanh"}
        return recurrence(*full, bidirectional=True, backend=backend, **options)

    assert torch.autograd.gradcheck(function, [arguments[i] for i in given])


@COMPILED
def test_gradients_that_are_not_needed_are_not_computed(backend):
    arguments = inputs(5, 3, 8)
    full = [a.clone().requires_grad_() for a in arguments]
    expected = torch.autograd.grad(recurrence(*full, backend=backend)[0].square().sum(), full)
    for i in range(5):
        one = [a.clone().requires_grad_(i == j) for j, a in enumerate(arguments)]
        recurrence(*one, backend=backend)[0].square().sum().backward()
        assert [a.grad is not None for a in one] == [i == j for j in range(5)]
        assert torch.equal(one[i].grad, expected[i]), NAMES[2 + i]


@COMPILED
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
def test_inference_equals_training(backend, bidirectional):
    arguments, pad = inputs(7, 3, 20), scattered(7, 3)
    h, c = recurrence(*arguments, pad=pad, bidirectional=bidirectional, backend=backend)
    trained = run(arguments, backend, pad=pad, bidirectional=bidirectional)
    assert torch.equal(h.double(), trained[0])
    assert torch.equal(c.double(), trained[1])


@EVERY_BACKEND
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
def test_a_padded_batch_equals_each_sequence_alone(backend, side, bidirectional):
    steps, batch, size = 8, 5, 12
    u, x, v, b, c0 = inputs(steps, batch, size)
    pad = PADS[side](steps, batch)
    # What stands at padded steps must not matter.
    u[pad], x[pad] = math.nan, math.inf
    h, c = recurrence(u, x, v, b, c0, pad=pad, bidirectional=bidirectional, backend=backend)
    assert not h[pad].any()
    for i in range(batch):
        real = ~pad[:, i]
        one = slice(i, i + 1)
        alone, c_alone = recurrence(
            u[real, one], x[real, one], v, b, c0[one], bidirectional=bidirectional, backend=backend
        )
        torch.testing.assert_close(h[real, one], alone)
        torch.testing.assert_close(c[one], c_alone)


@COMPILED
def test_padding_stops_every_gradient(backend):
    arguments = inputs(6, 4, 10)
    pad = scattered(6, 4)
    arguments[0][pad], arguments[1][pad] = math.nan, math.inf
    grads = torch.randn(6, 4, 10), torch.randn(4, 10)
    _, _, u, x, v, b, c0 = run(arguments, backend, grads=grads, pad=pad)
    assert not u[pad].any()
    assert not x[pad].any()
    assert torch.isfinite(torch.cat([g.flatten() for g in (u, x, v, b, c0)])).all()
    # The last sequence is padding throughout: its state goes through.
    torch.testing.assert_close(c0[-1], grads[1][-1].double())


@COMPILED
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
def test_without_v_the_state_does_not_reach_the_gates(backend, bidirectional):
    u, x, _, b, c0 = inputs(6, 3, 8)
    assert_as_exact_as_float32_allows(backend, (u, x, torch.zeros(2, 8), b, c0), bidirectional=bidirectional)


@EVERY_BACKEND
@pytest.mark.parametrize("skip", ["x", "u"])
def test_scale_0_leaves_out_whatever_the_skip_holds(skip, backend):
    u, x, v, b, c0 = inputs(4, 3, 8, skip)
    (u[:, :, 3] if skip == "u" else x).fill_(math.inf)
    h, _ = recurrence(u, x, v, b, c0, scale=0.0, backend=backend)
    assert torch.equal(h, recurrence(u[:, :, :3], None, v, b, c0, scale=0.0, backend=backend)[0])


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gates_saturate_cleanly(backend, dtype):
    huge = [1e4, -1e4, math.inf, -math.inf, 88.8, -88.8, 127.9, -127.9]
    z = torch.tensor(huge, dtype=dtype)
    n = len(huge)
    u = torch.stack([torch.full_like(z, 3.0), z, z]).view(1, 1, 3, n)
    x, c0 = torch.full((1, 1, n), 7.0, dtype=dtype), torch.full((1, n), 5.0, dtype=dtype)
    zeros = torch.zeros(2, n, dtype=dtype)
    h, c = recurrence(u, x, zeros, zeros, c0, backend=backend)
    assert c.flatten().tolist() == [5.0, 3.0] * 4
    assert h.flatten().tolist() == [5.0, 7.0] * 4
    found = run((u, x, zeros, zeros, c0), backend, dtype, grads=(torch.ones_like(h), torch.ones_like(c)))
    assert all(torch.isfinite(f).all() for f in found)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_sigmoid_is_exact_to_a_few_units_in_the_last_place(backend, dtype):
    z = torch.linspace(-80, 80, 20001, dtype=dtype)
    u = torch.stack([torch.zeros_like(z), z, torch.zeros_like(z)]).view(1, 1, 3, -1)
    zeros = torch.zeros(2, len(z), dtype=dtype)
    f = recurrence(u, None, zeros, zeros, torch.ones(1, len(z), dtype=dtype), scale=0.0, backend=backend)[1].flatten()
    # The exponent's rounding grows with z: a gate of 1e-30 need not be exact to the last digits.
    truth = torch.sigmoid(z.to(torch.float64))
    eps = torch.finfo(dtype).eps
    assert ((f - truth).abs() <= truth * eps * (6 + 2 * z.abs())).all()
    assert ((f - truth).abs() <= 2 * eps).all()


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["identity", "tanh", "relu"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_nan_stays_in_its_column(backend, part, activation, dtype):
    u, x, v, b, c0 = inputs(5, 3, 20)
    clean = recurrence(u, x, v, b, c0, activation=activation, backend=backend)[0]
    u[2, 1, part, 7] = math.nan
    grads = torch.randn(5, 3, 20), torch.randn(3, 20)
    expected, found = (
        run((u, x, v, b, c0), name, dtype, grads, activation=activation) for name in ("reference", backend)
    )
    # A reset gate that is NaN spoils its own step only.
    spoilt = torch.zeros(5, 3, 20, dtype=torch.bool)
    spoilt[2 : 3 if part == 2 else None, 1, 7] = True
    assert found[0][spoilt].isnan().all()
    torch.testing.assert_close(found[0][~spoilt].float(), clean[~spoilt])
    for name, e, f in zip(NAMES, expected, found, strict=True):
        assert f[e.isnan()].isnan().all(), name


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_at_the_end_only(dtype, backend):
    arguments = [a.to(dtype) for a in inputs(200, 2, 8)]
    arguments[0][:, :, 1] += 4  # a long memory, where rounding the state at every step would show
    mask = torch.full((2, 8), 1 / 0.9, dtype=dtype)
    h, c = recurrence(*arguments, mask=mask, scale=1.7, backend=backend)
    wide = recurrence(*(a.float() for a in arguments), mask=mask.float(), scale=1.7, backend=backend)
    assert torch.equal(h, wide[0].to(dtype))
    assert torch.equal(c, wide[1])


@EVERY_BACKEND
def test_mixed_dtypes_compute_in_the_dtype_of_u(backend):
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float64, torch.float16]
    mixed = [a.to(kind).requires_grad_() for a, kind in zip(inputs(4, 2, 6), kinds, strict=True)]
    alike = [a.detach().float().requires_grad_() for a in mixed]
    mask, results = torch.full((2, 6), 1 / 0.9), []
    for arguments, one in ((mixed, mask.double()), (alike, mask)):
        h, c = recurrence(*arguments, mask=one, scale=1.7, backend=backend)
        assert h.dtype == c.dtype == torch.float32
        results.append([h, c, *torch.autograd.grad(h.square().sum() + c.sum(), arguments)])
    for name, found, expected in zip(NAMES, *results, strict=True):
        assert torch.equal(found, expected.to(found.dtype)), name


@COMPILED
def test_the_second_derivative_is_the_references(backend):
    found = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        arguments = [a.double().requires_grad_() for a in inputs(3, 2, 4)]
        h, _ = recurrence(*arguments, backend=name)
        (first,) = torch.autograd.grad(h.square().sum(), arguments[0], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), arguments))
    torch.testing.assert_close(*found)


@COMPILED
def test_an_argument_changed_before_backward_is_noticed(backend):
    u, *others = (a.requires_grad_() for a in inputs(3, 2, 4))
    u = u * 1
    h, _ = recurrence(u, *others, backend=backend)
    u.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def changed(**changes):
    names = ("u", "x", "v", "b", "c0")
    arguments = dict(zip(names, inputs(3, 2, 4), strict=True)) | changes
    return [arguments.pop(name) for name in names], arguments


BAD = {
    "u of three dimensions": ({"u": torch.zeros(3, 2, 4)}, ValueError, r"u must be \(T, B, K, D\).*\(3, 2, 4\)"),
    "u of two parts": ({"u": torch.zeros(3, 2, 2, 4)}, ValueError, r"K 3 or 4, not \(3, 2, 2, 4\)"),
    "u of integers": ({"u": torch.zeros(3, 2, 3, 4).long()}, TypeError, "u must be of a floating dtype.*int64"),
    "x": ({"x": torch.zeros(3, 2, 5)}, ValueError, r"x must be \(3, 2, 4\).*not \(3, 2, 5\)"),
    "x missing": ({"x": None}, ValueError, "scale must be the number 0, not 1.0"),
    "x beside a skip": ({"u": torch.zeros(3, 2, 4, 4)}, ValueError, "x must be None"),
    "v": ({"v": torch.zeros(3, 4)}, ValueError, r"v must be \(2, 4\).*not \(3, 4\)"),
    "b": ({"b": torch.zeros(2, 4, 1)}, ValueError, r"b must be \(8,\).*not \(2, 4, 1\)"),
    "c0": ({"c0": torch.zeros(4, 2)}, ValueError, r"c0 must be \(2, 4\).*not \(4, 2\)"),
    "c0 of integers": ({"c0": torch.zeros(2, 4).int()}, TypeError, "c0 must be of a floating dtype.*int32"),
    "c0 elsewhere": ({"c0": torch.zeros(2, 4, device="meta")}, ValueError, "c0 is on meta, u on cpu"),
    "mask": ({"mask": torch.zeros(3, 2, 4)}, ValueError, r"mask must be \(2, 4\)"),
    "mask that learns": ({"mask": torch.ones(2, 4, requires_grad=True)}, ValueError, r"pass mask.detach\(\)"),
    "pad": ({"pad": torch.zeros(2, 3).bool()}, ValueError, r"pad must be \(3, 2\).*not \(2, 3\)"),
    "pad of numbers": ({"pad": torch.zeros(3, 2)}, TypeError, "pad must be torch.bool, not torch.float32"),
    "activation": ({"activation": "gelu"}, ValueError, "identity, tanh, relu, not 'gelu'"),
    "backend": ({"backend": "gpu"}, ValueError, "auto, cpu, cuda, reference, not 'gpu'"),
    "an odd size": (
        {"u": torch.zeros(3, 2, 3, 3), "scale": 0.0, "x": None, "bidirectional": True}
        | {"v": torch.zeros(2, 3), "b": torch.zeros(2, 3), "c0": torch.zeros(2, 3)},
        ValueError,
        "even number of columns, not 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named_with_its_value_and_the_right_one(case):
    changes, error, message = BAD[case]
    arguments, options = changed(**changes)
    with pytest.raises(error, match=message):
        recurrence(*arguments, **options)


def test_a_backend_by_name_says_why_it_cannot_run(monkeypatch):
    arguments = inputs(3, 2, 4)
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: the tensors are on cpu"):
        recurrence(*arguments, backend="cuda")
    with pytest.raises(RuntimeError, match=r"torch.float8_e5m2; the kernels take torch.float32, torch.float64"):
        recurrence(*(a.to(torch.float8_e5m2) for a in arguments), backend="cpu")
    monkeypatch.setattr(sru.kernels, "HAS_NUMBA", False)
    with pytest.raises(RuntimeError, match="pip install numba"):
        recurrence(*arguments, backend="cpu")
