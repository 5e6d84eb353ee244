"""Properties that hold for arbitrary shapes, strides, axes and overlaps, searched by hypothesis."""

import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations import (
    ACTIVATIONS,
    DTYPES,
    OPERATIONS,
    UNFUSED,
    Problem,
    assert_same_bits,
    call,
    check,
    kernels,
    problem,
    run,
)
from test_statistics import assert_pooled_exactly, shards_of

import fastbn
from fastbn import _kernels


def search(examples):
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )


SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130])


@st.composite
def shapes(draw, max_size=20000):
    """Of 2 to 5 dimensions; mostly small, with one or two that reach over the edges of vectors and tiles."""
    shape = draw(st.lists(SIZES, min_size=2, max_size=5))
    while np.prod(shape) > max_size:
        shape[int(np.argmax(shape))] //= 3
    return tuple(shape)


@st.composite
def views(draw, shape, values, dtype=DTYPES["float32"]):
    """An array of that shape, and of those values where no stride is 0: with its axes in any order in memory,
    with steps, reversals, broadcasting and an odd address."""
    order = draw(st.permutations(range(len(shape))))
    steps = draw(
        st.lists(st.sampled_from([1, 1, 1, 1, 2, -1, -2, 0]), min_size=len(shape), max_size=len(shape))
    )
    offset = draw(st.sampled_from([0, 0, 0, 4, 1, 6]))
    sizes = [shape[i] * abs(steps[i]) if steps[i] else min(1, shape[i]) for i in order]
    memory = np.zeros(int(np.prod(sizes)) * dtype.itemsize + 8, np.uint8)
    block = np.ndarray(sizes, dtype, buffer=memory, offset=offset)
    block = block.transpose(np.argsort(order))
    view = block[tuple(slice(None, None, step or 1) for step in steps)]
    view[...] = values[tuple(slice(None) if step else slice(0, 1) for step in steps)]
    return np.broadcast_to(view, shape) if 0 in steps else view


@st.composite
def masks(draw, positions, rng):
    """None, or a mask that can be broadcast: of few values or many, in any memory order."""
    share = draw(st.sampled_from([None, None, 0, 0.02, 0.5, 0.95, 1]))
    if share is None:
        return None
    shape = [draw(st.sampled_from([n, n, n, 1])) for n in positions]
    mask = np.asarray(rng.random(shape[draw(st.sampled_from([0, 0, 0, len(shape)])) :]) < share)
    return draw(st.sampled_from([mask, np.asfortranarray(mask), mask[..., ::-1] if mask.ndim else mask]))


@st.composite
def problems(draw):
    shape = draw(shapes())
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    C = shape[axis]
    dtype = DTYPES[draw(st.sampled_from(["float32", *DTYPES]))]
    real = np.float64 if dtype == np.float64 else np.float32
    offset = draw(st.sampled_from([0, 0, 3, 0 if dtype == np.float64 else 100]))
    mask = draw(masks([n for i, n in enumerate(shape) if i != axis % len(shape)], rng))
    return Problem(
        *(draw(views(shape, rng.standard_normal(shape) + o, dtype)) for o in (offset, 0, 0)),
        weight=rng.uniform(0.5, 1.5, C).astype(real),
        bias=rng.uniform(-1, 1, C).astype(real),
        running_mean=(rng.uniform(-0.5, 0.5, C) + offset).astype(real),
        running_var=rng.uniform(0.5, 2, C).astype(real),
        axis=axis,
        mask=mask,
        mask_output=mask is not None and draw(st.booleans()),
    )


@search(400)
@given(
    problems(),
    st.sampled_from(OPERATIONS),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.sampled_from(_kernels.supported_isas()),
    st.sampled_from([1, 2, 3, 7]),
    st.booleans(),
    st.sets(st.sampled_from(["input", "weight", "bias", "residual"])),
)
def test_the_oracle_agrees(p, operation, activation, add, isa, threads, streamed, needs):
    real = reference.everywhere(p.mask, p.x, p.axis)
    count = np.count_nonzero(real) // max(1, p.x.shape[p.axis])
    if operation in UNFUSED:
        activation, add = None, False
    if operation in ("training", "forward", "backward", "backward_by_sums") and count == 1 and p.x.size:
        if "backward" not in operation:  # which no forward pass can have gone before
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                run(operation, p, activation, add)
        return
    with kernels(isa, shared_out=True, streamed=streamed):
        results = check(operation, p, activation, add, num_threads=threads)
        assert_same_bits(run(operation, p, activation, add, num_threads=1), results)
        if "backward" in operation:
            some = run(operation, p, activation, add, num_threads=threads, needs=tuple(needs))
            wanted = {name: grad for name, grad in results.items() if name.removeprefix("grad_") in needs}
            assert_same_bits(some, wanted, f"needs={needs}")


@search(200)
@given(
    st.integers(1, 6), st.integers(1, 9), st.integers(0, 40), st.integers(0, 40),
    st.sampled_from([1, 2, -1]), st.sampled_from([1, 2, -1]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_out_is_right_or_refused(n, c, x_start, out_start, x_step, out_step, transposed, training):
    """x and out in one block of memory: in place is right, apart is right, any other overlap is refused."""
    memory = np.random.default_rng(0).standard_normal(200).astype(np.float32)

    def window(start, step):
        values = memory[start : start + n * c * abs(step)][::step].reshape(-1)[: n * c]
        return values.reshape(c, n).T if transposed else values.reshape(n, c)

    x, out = window(x_start, x_step), window(out_start, out_step)
    stats = np.zeros(c, np.float32), np.ones(c, np.float32)
    if training and n == 1:
        return
    expected = fastbn.batch_norm(x.copy(), *[s.copy() for s in stats], training=training, activation="relu")
    in_place = x.ctypes.data == out.ctypes.data and (x.strides == out.strides or x.size == 1)
    writes = stats if training else ()
    options = {"training": training, "activation": "relu", "out": out, "writes": writes}
    if np.shares_memory(x, out) and not in_place:
        with pytest.raises(ValueError, match="out overlaps x"):
            call(fastbn.batch_norm, x, *stats, **options)
        return
    call(fastbn.batch_norm, x, *stats, **options)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@search(100)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
    st.sampled_from([0, 1, -1]),
    st.floats(1e-3, 1e3),
    st.randoms(use_true_random=False),
)
def test_merging_is_associative_and_commutative(sizes, offset, scale, random):
    values = np.random.default_rng(len(sizes)).standard_normal((sum(sizes), 3)) * scale + offset
    shards = shards_of(values, sizes)
    merged = shards.copy()
    while len(merged) > 1:  # in any order and grouping
        random.shuffle(merged)
        taken = [merged.pop() for _ in range(random.randint(2, len(merged)))]
        merged.append(taken[0].merge(*taken[1:]))
    assert_pooled_exactly(merged[0], shards)


@search(100)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 300), st.sampled_from([1, -1]))
def test_output_has_the_moments_of_the_parameters(n, c, s, axis):
    p = problem((n + 1, c, s), axis, offset=5)
    y = run("training", p)["y"]
    stats = fastbn.batch_stats(y, axis=axis)
    before = fastbn.batch_stats(p.x, axis=axis)
    np.testing.assert_allclose(stats.mean, p.bias, rtol=0, atol=2e-6 * 4)
    np.testing.assert_allclose(stats.var, p.weight**2 * before.var / (before.var + 1e-5), rtol=1e-5)
