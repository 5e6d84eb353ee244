"""recalibrate: statistics of whole data sets, of one layer and of what calls several; all or nothing."""

import os
import re
import subprocess
import sys
import threading
import types
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbn
from fastbn import BatchNorm, BatchNorm1d, BatchNorm2d, BatchStats, recalibrate
from fastbn.stand_ins import stand_ins

# Programs find this fastbn, wherever they run.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(fastbn.__file__).resolve().parents[1]),
    "OPENBLAS_NUM_THREADS": "1",  # on a busy machine more wait for each other
}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "dataset_statistics.md"
STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


@pytest.fixture(autouse=True)
def nothing_stands_in_afterwards():
    yield
    assert not stand_ins


def cut(x, size=64):
    return [x[start : start + size] for start in range(0, len(x), size)]


def images(rng, offset=0.0, channels=5):
    """515 images of ten classes, whose means differ, class after class: eight batches of 64 and one of 3."""
    classes = np.sort(rng.integers(0, 10, 515))
    means = rng.normal(0, 2, (10, channels))[classes]
    x = rng.standard_normal((515, channels, 3, 2)) + means[:, :, None, None] + offset
    return x.astype(np.float32)


class Network:
    """Three linear layers with a batch norm each; the first two with ReLU."""

    def __init__(self, rng, **options):
        widths = 12, 10, 8, 6
        self.weights = [rng.normal(0, n**-0.5, (n, m)).astype(np.float32) for n, m in pairwise(widths)]
        self.layers = [
            BatchNorm1d(width, activation=activation, **options)
            for width, activation in zip(widths[1:], ("relu", "relu", None), strict=True)
        ]
        for layer in self.layers:
            for name in STATE[:4]:
                array = getattr(layer, name)
                array[:] = rng.uniform(0.5, 1.5, array.shape)
        self.reached = [0, 0, 0]  # how many batches have come out of each layer

    def __call__(self, x):
        for i, (weight, layer) in enumerate(zip(self.weights, self.layers, strict=True)):
            x = layer(x @ weight)
            self.reached[i] += 1
        return x

    def states(self):
        return [layer.state_dict() for layer in self.layers]

    def in_float64(self, batches, sequential):
        """BatchStats of each layer's input; all in float64."""
        batches = [batch.astype(np.float64) for batch in batches]
        found = []
        for weight, layer in zip(self.weights, self.layers, strict=True):
            batches = [batch @ weight for batch in batches]
            found.append(BatchStats(*reference.batch_stats(np.concatenate(batches))))
            n = found[-1].count
            whole = found[-1].mean, found[-1].var * n / (n - 1)
            for i, batch in enumerate(batches):
                by = whole if sequential else reference.batch_stats(batch)[:2]
                batches[i] = reference.forward(
                    batch, *by, layer.weight, layer.bias, layer.eps, activation=layer.activation
                )
        return found


def rows(rng):
    """515 rows in order of their class."""
    return images(rng, channels=2).reshape(515, 12)


def distance(stats, expected):
    """How far off a mean is, in deviations, or a variance is, as a share of it."""
    deviation = np.sqrt(expected.var)
    return max(
        np.abs((stats.mean - expected.mean) / deviation).max(), np.abs(stats.var / expected.var - 1).max()
    )


def assert_states_equal(states, others):
    for state, other in zip(states, others, strict=True):
        assert state.keys() == other.keys()
        for name in state:
            assert np.array_equal(state[name], other[name]), name


# One layer


@pytest.mark.parametrize("offset", [0, 100, 1e4])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("method", ["one_pass", "sequential"])
def test_one_layer(rng, offset, shuffled, method):
    x = images(rng, offset)
    if shuffled:
        rng.shuffle(x)
    layer = BatchNorm2d(5)
    stats = recalibrate(layer, iter(cut(x)), method=method)
    expected = BatchStats(*reference.batch_stats(x))
    assert isinstance(stats, BatchStats)
    assert stats.count == 515 * 6
    assert distance(stats, expected) < 1e-6
    np.testing.assert_array_equal(layer.running_mean, stats.mean.astype(np.float32))
    np.testing.assert_array_equal(layer.running_var, (stats.var * 3090 / 3089).astype(np.float32))
    assert layer.num_batches_tracked == 9


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("training", [True, False])
def test_modes_and_options_of_the_layer(rng, axis, training):
    x = np.moveaxis(images(rng), 1, axis)
    layer = BatchNorm(5, momentum=None, unbiased=False, axis=axis, virtual_batch_size=7).train(training)
    stats = recalibrate(layer, (np.ascontiguousarray(part) for part in cut(x, 100)))
    np.testing.assert_array_equal(layer.running_var, stats.var.astype(np.float32))
    assert layer.training is training
    assert layer.momentum is None
    assert layer.num_batches_tracked == 6
    assert distance(stats, BatchStats(*reference.batch_stats(x, axis))) < 1e-6


def test_evaluation_takes_what_float32_averages_have_lost(rng):
    x = (rng.standard_normal((500, 3)) * 1e-2 + 1e6).astype(np.float32)  # float32 has steps of 0.06 there
    x[:] += np.float32([0, 0.5, 1])
    layer = BatchNorm1d(3, eps=0).eval()
    recalibrate(layer, cut(x))
    mean, var, count = reference.batch_stats(x)
    expected = reference.normalize(x, mean, var * count / (count - 1), 0)
    np.testing.assert_allclose(layer(x), expected, atol=2e-6 * np.abs(expected).max())


@given(
    ends=st.lists(st.integers(0, 40), max_size=8),
    seed=st.integers(0, 9),
    offset=st.sampled_from([0, 1e3, -1e5]),
    unbiased=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_cut_and_order_do_not_matter(ends, seed, offset, unbiased):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((40, 3, 2)) + offset).astype(np.float32)
    parts = np.split(x, sorted(ends))
    rng.shuffle(parts)
    whole, cut = BatchNorm1d(3, unbiased=unbiased), BatchNorm1d(3, unbiased=unbiased)
    expected, stats = recalibrate(whole, [x]), recalibrate(cut, parts)
    assert stats.count == expected.count == 80
    assert distance(stats, expected) < 1e-6
    np.testing.assert_allclose(cut.running_mean, whole.running_mean, rtol=2e-7, atol=1e-6)
    np.testing.assert_allclose(cut.running_var, whole.running_var, rtol=1e-6)


def test_empty_batches_and_single_rows(rng):
    x = rng.standard_normal((401, 4), np.float32)
    layer = BatchNorm1d(4)
    stats = recalibrate(layer, [x[:0], x[:200], x[:0], x[200:400], x[400:]])
    assert distance(stats, BatchStats(*reference.batch_stats(x))) < 1e-6
    assert layer.num_batches_tracked == 3


def test_many_batches_are_not_rounded_many_times(rng):
    x = (rng.standard_normal((5000, 2, 3)) + 1e5).astype(np.float32)
    stats = recalibrate(BatchNorm1d(3), iter(x))
    shards = [fastbn.batch_stats(batch) for batch in x]
    expected = shards[0].merge(*shards[1:])
    np.testing.assert_allclose(stats.mean, expected.mean, rtol=1e-15)
    np.testing.assert_allclose(stats.var, expected.var, rtol=1e-13)
    one_by_one = shards[0]
    for shard in shards[1:]:
        one_by_one += shard
    assert not np.array_equal(one_by_one.mean, stats.mean)  # which the tree is there for


def test_one_batch_is_in_memory_at_a_time(rng):
    alive = []

    def batches():
        for _ in range(4):
            assert not any(ref() is not None for ref in alive)
            x = rng.standard_normal((6, 12), np.float32)
            alive.append(weakref.ref(x))
            yield x
            del x

    recalibrate(BatchNorm1d(12), batches())
    alive.clear()
    recalibrate(Network(rng), batches())
    assert len(alive) == 4


# Several layers


@pytest.mark.parametrize("unbiased", [True, False])
def test_one_pass_is_exact_for_the_first_layer_only(rng, unbiased):
    network, batches = Network(rng, unbiased=unbiased), cut(rows(rng))
    found = recalibrate(network, iter(batches))
    assert list(found) == network.layers
    expected = network.in_float64(batches, sequential=False)
    for layer, stats in zip(network.layers, expected, strict=True):
        assert distance(found[layer], stats) < 2e-6
    layer_by_layer = network.in_float64(batches, sequential=True)
    assert distance(found[network.layers[0]], layer_by_layer[0]) < 2e-6
    assert distance(found[network.layers[1]], layer_by_layer[1]) > 0.3
    assert distance(found[network.layers[2]], layer_by_layer[2]) > 0.3


def test_sequential_is_exact_for_all(rng):
    network, batches = Network(rng), cut(rows(rng))
    found = recalibrate(network, batches, method="sequential")
    assert list(found) == network.layers
    for layer, stats in zip(network.layers, network.in_float64(batches, sequential=True), strict=True):
        assert distance(found[layer], stats) < 1e-6
        np.testing.assert_array_equal(layer.running_mean, found[layer].mean.astype(np.float32))
        assert layer.num_batches_tracked == 9
    for layer in network.layers:
        layer.eval()
    out = network(np.concatenate(batches))
    mean, var, _ = reference.batch_stats((out - network.layers[2].bias) / network.layers[2].weight)
    np.testing.assert_allclose(mean, 0, atol=1e-5)  # of the whole data set, as the averages promise
    np.testing.assert_allclose(var, 1, rtol=3e-3)


def test_sequential_goes_no_further_than_it_must(rng):
    network, batches = Network(rng), cut(rows(rng))

    def stubborn(x):
        try:
            return network(x)
        except Exception:
            raise AssertionError("a model may catch any exception") from None

    recalibrate(stubborn, batches, method="sequential")
    assert network.reached == [27, 18, 9]


def test_a_list_of_layers_and_functions(rng):
    network, batches = Network(rng), cut(rows(rng))
    expected = recalibrate(network, batches)
    states = network.states()
    for layer in network.layers:
        layer.reset_running_stats()
    (a, b, c), (one, two, three) = network.weights, network.layers
    chain = [lambda x: x @ a, one, lambda x: x @ b, two, lambda x: x @ c, three]
    assert recalibrate(chain, batches) == expected
    assert_states_equal(network.states(), states)
    assert recalibrate(tuple(chain), iter(batches)) == expected


@pytest.mark.parametrize("method", ["one_pass", "sequential"])
def test_calls_of_one_layer_are_pooled(rng, method):
    first, shared, last = BatchNorm1d(4), BatchNorm1d(4), BatchNorm1d(4)
    x = rng.standard_normal((50, 4), np.float32)

    def siamese(x):
        y = first(x)
        return last(shared(y) - shared(3 * y + 1))

    found = recalibrate(siamese, cut(x, 20), method=method)
    assert [stats.count for stats in found.values()] == [50, 100, 50]
    assert first.num_batches_tracked == shared.num_batches_tracked == last.num_batches_tracked == 3
    if method == "sequential":
        y = first.eval()(x)
        both = np.concatenate([y, 3 * y + 1])
        assert distance(found[shared], BatchStats(*reference.batch_stats(both))) < 1e-6


def test_a_layer_that_is_called_again_behind_another(rng):
    shared, between = BatchNorm1d(4), BatchNorm1d(4)
    x = rng.standard_normal((50, 4), np.float32)
    found = recalibrate(lambda x: shared(between(shared(x))), [x[:30], x[30:]], method="sequential")
    assert [found[shared].count, found[between].count] == [100, 50]


def test_layers_in_evaluation_and_training_alike(rng):
    batches = cut(rows(rng))
    found = []
    for training in True, False:
        network = Network(np.random.default_rng(1))
        for layer in network.layers:
            layer.train(training)
        found.append(list(recalibrate(network, batches).values()))
        assert [layer.training for layer in network.layers] == [training] * 3
    assert found[0] == found[1]


def test_layers_that_are_left_alone(rng):
    x = rng.standard_normal((50, 4), np.float32)
    seen, unused, empty, plain = BatchNorm1d(4), BatchNorm1d(4), BatchNorm1d(4), BatchNorm1d(4)
    plain = BatchNorm1d(4, track_running_stats=False)
    frozen = BatchNorm1d(4).freeze()

    def model(x):
        empty(x[:0])
        return plain(frozen(seen(x)))

    assert list(recalibrate(model, [x])) == [seen]
    for layer in unused, empty:
        assert_states_equal([layer.state_dict()], [BatchNorm1d(4).state_dict()])


def test_a_batch_of_one_row_goes_by_what_is_pooled(rng):
    x = rng.standard_normal((41, 4), np.float32)
    one, two = BatchNorm1d(4), BatchNorm1d(4)
    found = recalibrate([one, two], [x[:40], x[40:]])
    by_batch = reference.normalize(x[:40], *reference.batch_stats(x[:40])[:2])
    pooled = reference.normalize(x[40:], *reference.batch_stats(x)[:2])
    expected = BatchStats(*reference.batch_stats(np.concatenate([by_batch, pooled])))
    assert distance(found[two], expected) < 2e-6


def test_what_a_call_has_besides_x(rng):
    x = rng.standard_normal((50, 4), np.float32)
    one, two = BatchNorm1d(4, activation="relu"), BatchNorm1d(4)
    found = recalibrate(lambda x: two(one(x, x, out=np.empty_like(x), num_threads=1)), [x])
    expected = np.maximum(reference.normalize(x, *reference.batch_stats(x)[:2]) + x, 0)
    assert distance(found[two], BatchStats(*reference.batch_stats(expected))) < 2e-6


# Who is concerned


def test_calls_in_other_threads_are_calls(rng):
    layer = BatchNorm1d(4).eval()
    x, other = rng.standard_normal((2, 50, 4), np.float32)
    expected, seen = layer(other), []

    def model(x):
        thread = threading.Thread(target=lambda: seen.append(layer(other)))
        thread.start()
        thread.join()
        return layer(x)

    assert recalibrate(model, [x])[layer].count == 50
    assert np.array_equal(seen[0], expected)


def test_what_makes_the_batches_may_call_layers(rng):
    first, second = BatchNorm1d(4).eval(), BatchNorm1d(4)
    x = rng.standard_normal((3, 50, 4), np.float32)
    before = first.state_dict()
    found = recalibrate([second], (first(batch) for batch in x))
    assert list(found) == [second]
    assert_states_equal([first.state_dict()], [before])
    assert distance(found[second], BatchStats(*reference.batch_stats(x.reshape(150, 4)))) < 3e-5  # eps


def test_the_latest_call_stays_for_backward(rng):
    layer, twin = BatchNorm1d(4), BatchNorm1d(4)
    x, grad_output = rng.standard_normal((2, 50, 4), np.float32)
    for each in layer, twin:
        each(x)
    recalibrate(layer, [x + 1])
    for ours, theirs in zip(layer.backward(grad_output)[:3], twin.backward(grad_output)[:3], strict=True):
        assert np.array_equal(ours, theirs)


def test_within_adapt(rng):
    x = rng.standard_normal((50, 4), np.float32)
    layer = BatchNorm1d(4)
    with fastbn.adapt(layer):
        stats = recalibrate(layer, [x])
    assert distance(stats, BatchStats(*reference.batch_stats(x))) < 1e-6


# Nothing or all


@pytest.mark.parametrize("method", ["one_pass", "sequential"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("where", ["batches", "model"])
def test_an_exception_leaves_all_as_it_was(rng, method, error, where):
    network, batches = Network(rng), cut(rows(rng))
    before = network.states()
    turns = iter(range(100))

    class Batches:
        def __iter__(self):
            for batch in batches:
                if where == "batches" and next(turns) == 12 - 9 * (method == "one_pass"):
                    raise error
                yield batch

    def model(x):
        y = network(x)
        if where == "model" and next(turns) == 3:
            raise error
        return y

    with pytest.raises(error):
        recalibrate(model, Batches(), method=method)
    assert_states_equal(network.states(), before)
    assert not stand_ins
    for layer in network.layers:
        assert layer.training
        layer.eval()
    assert np.isfinite(network(batches[0])).all()


@pytest.mark.parametrize("name", STATE[2:])
def test_what_cannot_be_written_is_told_before_the_first_batch_is_through(rng, name):
    network, batches = Network(rng), cut(rows(rng))
    before = network.states()
    getattr(network.layers[1], name).setflags(write=False)
    with pytest.raises(ValueError, match=f"{name} of the layer is read-only"):
        recalibrate(network, batches)
    assert network.reached == [1, 0, 0]
    assert_states_equal(network.states(), before)


def test_what_became_read_only_meanwhile(rng):
    network, batches = Network(rng), cut(rows(rng))
    before = network.states()

    def model(x):
        network(x)
        network.layers[2].running_var.setflags(write=False)

    with pytest.raises(ValueError, match="running_var of the layer is read-only"):
        recalibrate(model, batches)
    assert_states_equal(network.states(), before)


def test_a_bad_batch(rng):
    layer = BatchNorm1d(4)
    x = rng.standard_normal((50, 4), np.float32)
    before = layer.state_dict()
    with pytest.raises(ValueError, match="x must have 4 channels"):
        recalibrate(layer, [x, x[:, :3]])
    with pytest.raises(TypeError, match=r"x must have dtype float32.*float64"):
        recalibrate([layer], [x, x.astype(np.float64)])
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        recalibrate(layer, [x, x[None, None]])
    assert_states_equal([layer.state_dict()], [before])


@pytest.mark.parametrize(
    "given", [BatchNorm1d(3), [BatchNorm1d(3)], lambda x: x], ids=["layer", "list", "none"]
)
@pytest.mark.parametrize("batches", [[], [np.empty((0, 3), np.float32)]], ids=["none", "empty"])
def test_no_values(given, batches):
    with pytest.raises(ValueError, match="there are no values to take statistics of"):
        recalibrate(given, batches)


def test_one_value_has_no_variance(rng):
    layer = BatchNorm1d(3)
    with pytest.raises(ValueError, match="1 value per channel"):
        recalibrate(layer, [np.ones((1, 3), np.float32)])
    assert layer.num_batches_tracked == 0


def test_bad_arguments(rng):
    x = rng.standard_normal((50, 4), np.float32)
    layer = BatchNorm1d(4)
    with pytest.raises(TypeError, match=r"batches must be an iterable of batches, got one array; pass \[x\]"):
        recalibrate(layer, x)
    with pytest.raises(ValueError, match='method must be "one_pass" or "sequential", got \'two\''):
        recalibrate(layer, [x], method="two")
    with pytest.raises(TypeError, match=r"layer_or_callable must be .*, got ndarray"):
        recalibrate([layer, x], [x])
    with pytest.raises(TypeError, match=r"layer_or_callable must be .*, got NoneType"):
        recalibrate(None, [x])
    with pytest.raises(ValueError, match=r"once for each layer, but a generator can be gone over only once"):
        recalibrate([layer], (x for _ in range(2)), method="sequential")
    with pytest.raises(ValueError, match=r"recalibrate\(\) needs running averages"):
        recalibrate(BatchNorm1d(4, track_running_stats=False), [x])
    with pytest.raises(ValueError, match="not frozen ones"):
        recalibrate(layer.freeze(), [x])
    assert layer.num_batches_tracked == 0


def test_batches_that_are_others_in_the_second_pass(rng):
    one, two = BatchNorm1d(4), BatchNorm1d(4)
    x = rng.standard_normal((50, 4), np.float32)
    turns = iter(range(100))
    before = one.state_dict()
    with pytest.raises(ValueError, match="batches must be the same each time"):
        recalibrate(lambda x: two(one(x)) if next(turns) < 1 else one(x), [x], method="sequential")
    assert_states_equal([one.state_dict()], [before])


# Values that are not finite (case 44)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_bad_values_enter_as_in_training(rng, value):
    x = rng.standard_normal((50, 4), np.float32)
    x[3, 1] = value
    layer = BatchNorm1d(4)
    stats = recalibrate(layer, [x[:20], x[20:]])
    assert not np.isfinite(layer.running_var[1])
    good = [0, 2, 3]
    assert np.isfinite(layer.running_var[good]).all()
    np.testing.assert_allclose(stats.var[good], reference.batch_stats(x[:, good])[1], rtol=2e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_skip_nonfinite(rng, value):
    x = rng.standard_normal((50, 4), np.float32)
    layer, twin = BatchNorm1d(4, skip_nonfinite=True), BatchNorm1d(4)
    layer.running_mean[:] = layer.running_var[:] = 7
    recalibrate(twin, [x[:20], x[20:]])
    x[3, 1] = value
    with pytest.warns(RuntimeWarning, match="not finite in 1 of 4 channels, channel 1") as told:
        recalibrate(layer, [x[:20], x[20:]])
    assert told[0].filename == __file__
    assert layer.running_mean[1] == layer.running_var[1] == 7
    good = [0, 2, 3]
    assert np.array_equal(layer.running_var[good], twin.running_var[good])
    assert layer.num_batches_tracked == 2
    recalibrate(layer, [x])  # said once


# Progress


def test_progress(rng, monkeypatch):
    bars = []

    def tqdm(batches, desc, unit):
        bars.append((desc, len(batches)))
        return batches

    module = types.ModuleType("tqdm.auto")
    module.tqdm = tqdm
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", module)
    network, batches = Network(rng), cut(rows(rng))
    recalibrate(network, batches)
    assert not bars
    recalibrate(network, batches, progress=True, method="sequential")
    assert bars == [("statistics", 9), ("layer 2 of 3", 9), ("layer 3 of 3", 9)]
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # not installed
    recalibrate(network, batches, progress=True)


def test_progress_by_tqdm_itself(rng, capsys):
    pytest.importorskip("tqdm")
    recalibrate(BatchNorm1d(4), [rng.standard_normal((50, 4), np.float32)] * 3, progress=True)
    assert re.search(r"statistics: 100%.* 3/3 ", capsys.readouterr().err)


# A file that memory has no room for

LIMITED = """
import resource, sys
import numpy as np
import fastbn

x = np.load(sys.argv[1], mmap_mode="r")
bn = fastbn.BatchNorm2d(x.shape[1])
in_use = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (in_use + x.nbytes // 4,) * 2)
try:
    np.array(x)
except MemoryError:
    print("no room for all")
stats = fastbn.recalibrate(bn, (x[start : start + 64] for start in range(0, len(x), 64)))
np.save(sys.argv[2], [bn.running_mean, bn.running_var])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux'")
def test_a_file_larger_than_memory(rng, tmp_path):
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (1000, 16, 64, 64))  # 262 MB
    block = rng.standard_normal((100, 16, 64, 64), np.float32)
    for i in range(10):
        x[100 * i : 100 * i + 100] = block + i
    x.flush()
    del x
    command = [sys.executable, "-W", "error", "-c", LIMITED, tmp_path / "x.npy", tmp_path / "averages.npy"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no room for all\n"
    (tmp_path / "x.npy").unlink()
    mean, var, count = reference.batch_stats(block)
    n = 10 * count
    averages = np.load(tmp_path / "averages.npy")
    np.testing.assert_allclose(averages[0], mean + 4.5, rtol=1e-6)
    np.testing.assert_allclose(averages[1], (var + 8.25) * n / (n - 1), rtol=2e-6)


# The page


@pytest.mark.slow
def test_page(tmp_path):
    """Its programs run, one after the other, as they stand there."""
    if not PAGE.exists():
        pytest.skip("the tests were copied without docs/")
    pytest.importorskip("dask.array", reason="the page needs the extra [dask]")
    pytest.importorskip("distributed")
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) >= 3
    for i, program in enumerate(programs):
        (tmp_path / f"program{i}.py").write_text(program)
        done = subprocess.run(
            [sys.executable, "-W", "error", f"program{i}.py"],
            cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{program}\n{done.stderr}"
