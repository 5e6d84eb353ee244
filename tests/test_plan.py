"""Plans: of machines that nobody here has, by table; and that what is meant for a special path takes it."""

import numpy as np
import pytest
from operations import kernels, problem, run

from fastbn import _kernels

AVX512 = {"lanes": 16, "held": 8, "overlaps": 1}
AVX2 = {"lanes": 8, "held": 0, "overlaps": 1}
BIG, MIDDLE, SMALL = (32, 256, 56, 56), (8, 64, 28, 28), (1, 16, 8, 8)


def plan(shape, operation, layout="planes", threads=2, machine="zen5", dtype="float32", **facts):
    """Of a shape as (N, C, ...), its memory laid out as told."""
    n, c, *spatial = shape
    axis = 1 if layout == "planes" or not spatial else -1
    order = (n, c, *spatial) if axis == 1 else (n, *spatial, c)
    return _kernels.plan(
        order, operation, axis=axis, dtype=dtype, threads=threads, machine=machine, facts=facts or None
    )


# machine, threads, shape, operation, layout: way, stores, and some of the rest
TABLE = [
    ("zen5", 2, BIG, "training", "planes", "overlapped", "streamed", {"group": 4}),
    ("zen5", 16, BIG, "training", "planes", "overlapped", "streamed", {"groups": 16}),
    ("zen5", 1, BIG, "training", "planes", "overlapped", "streamed", {"groups": 1}),
    ("zen5", 2, BIG, "inference", "planes", "elementwise", "streamed", {"reversed": False}),
    ("zen5", 2, BIG, "training", "rows", "tiled", "streamed", {"from_memory": True, "reversed": True}),
    ("zen5", 2, MIDDLE, "training", "planes", "owned", "cached", {"from_memory": False}),
    ("zen5", 2, MIDDLE, "backward", "rows", "tiled", "cached", {"fold": 2}),
    ("zen5", 16, MIDDLE, "training", "planes", "owned", "cached", {"groups": 16}),
    ("zen5", 2, SMALL, "training", "planes", "owned", "cached", {"threads": 1}),
    # channels that no thread owns, in one tile each; rows of more columns than are summed at a time
    ("zen5", 32, (1, 17, 65, 63), "training", "planes", "tiled", "cached", {"by_columns": True, "owned": 0}),
    ("zen5", 2, (300, 4096), "backward", "rows", "tiled", "cached", {"columns": 4096}),
    # what is read fits the cache, but not beside what is written
    ("zen5", 2, (3, 256, 56, 56), "backward", "rows", "tiled", "streamed", {"from_memory": False}),
    # 96 MB stacked on a die are one cache; 300 MB in slices are the threads' own L2
    ("zen4-3d", 2, BIG, "inference", "planes", "elementwise", "streamed", {"class": "cores"}),
    ("zen4-3d", 2, (8, 256, 56, 56), "inference", "planes", "elementwise", "cached", {"class": "cores"}),
    ("zen5", 2, (8, 256, 56, 56), "inference", "planes", "elementwise", "streamed", {"class": "cores"}),
    ("granite-rapids", 2, (8, 64, 56, 56), "inference", "planes", "elementwise", "streamed", {}),
    ("granite-rapids", 16, (8, 64, 56, 56), "inference", "planes", "elementwise", "cached", {}),
    # no L3: the L2 that four cores share is the last level; and no stores that pass it by
    ("pi4", 4, (1, 64, 56, 56), "inference", "planes", "elementwise", "cached", {"class": "board"}),
    ("pi4", 4, BIG, "training", "planes", "owned", "cached", {"from_memory": True}),
    ("pi4", 4, BIG, "training", "rows", "tiled", "cached", {"from_memory": True}),
    ("atom", 4, (8, 64, 56, 56), "inference", "planes", "elementwise", "streamed", {"class": "cores"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "threads", "shape", "operation", "layout", "way", "store", "rest"), TABLE
)
def test_plans_by_table(machine, threads, shape, operation, layout, way, store, rest):
    found = plan(shape, operation, layout, threads, machine)
    assert (found["way"], found["apply"]["store"]) == (way, store)
    assert {name: found[name] for name in rest} == rest
    assert all(found["why"][part] for part in ("way", "store", "rows"))


def test_groups_are_whole_lines_and_fit_the_cache():
    for machine in _kernels.machines():
        for threads in (1, 2, 4, 16):
            for shape in BIG, (32, 512, 28, 28), (64, 100, 14, 14), (32, 2048, 7, 7), (4, 3, 500, 500):
                for operation in "training", "backward":
                    found = plan(shape, operation, "planes", threads, machine)
                    if not found["owned"]:
                        continue
                    assert found["group"] % found["unit"] == 0
                    assert 1 <= found["groups"] <= found["owned"]
                    # what is left over for all to share is less than a channel each, or little work
                    assert found["owned"] == shape[1] or shape[1] - found["owned"] < threads


@pytest.mark.parametrize("operation", ["inference", "stats", "training", "sums", "backward", "grad_input"])
def test_each_operation_has_the_passes_it_needs(operation):
    for layout in "planes", "rows":
        found = plan(MIDDLE, operation, layout)
        sums, apply = found["sums"] is not None, found["apply"] is not None
        assert sums == (operation in ("stats", "training", "sums", "backward"))
        assert apply == (operation not in ("stats", "sums"))
        assert found["reversed"] == (sums and apply)


def test_little_work_takes_one_thread():
    assert plan((1, 64, 31, 33), "training")["threads"] == 1
    assert plan((1, 64, 32, 32), "training")["threads"] == 2


def test_few_channels_stay_in_registers():
    assert plan((32, 64, 56, 56), "inference", "rows", **AVX512)["apply"]["period"] == 8
    assert plan((32, 64, 56, 56), "backward", "rows", **AVX512)["apply"]["period"] == 4
    assert plan((32, 96, 56, 56), "inference", "rows", **AVX512)["apply"]["period"] == 6
    assert plan((32, 64, 56, 56), "inference", "rows", **AVX2)["apply"]["period"] == 0


def test_prefetches_are_so_many_bytes_ahead():
    for dtype, size in ("float32", 4), ("float16", 2), ("float64", 8):
        assert plan(BIG, "training", dtype=dtype, **AVX512)["overlap"]["ahead"] * size == 2048


def test_statistics_of_halves_take_several_rows_from_memory_too():
    for machine, rows in (AVX512, 4), (AVX2, 8):
        assert plan(BIG, "training", "rows", dtype="bfloat16", **machine)["sums"]["rows"] == rows
        assert plan(BIG, "training", "rows", **machine)["sums"]["rows"] == 1


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"machine must be one of .*zen5.*, got 'pdp11'"):
        plan(BIG, "training", machine="pdp11")
    with pytest.raises(ValueError, match=r"operation must be one of inference, .*, got 'train'"):
        plan(BIG, "train")


# ---- what tests of special paths rely on: that these are taken


@pytest.fixture
def taken():
    """The plan of the latest call."""
    _kernels.watch_plans(True)
    yield _kernels.latest_plan
    _kernels.watch_plans(False)


OPERATIONS = ("training", "backward")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("threads", [1, 3])
def test_streamed_planes_overlap_where_that_is_built(isa, shared_out, taken, operation, threads):
    with kernels(streamed=True):
        run(operation, problem((3, 7, 70, 60)), num_threads=threads)
    overlaps = isa in ("avx2", "avx512")
    assert taken()["way"] == ("overlapped" if overlaps else "owned")
    assert taken()["apply"]["store"] == "streamed"
    assert (taken()["overlap"] is not None) == overlaps


@pytest.mark.parametrize("operation", OPERATIONS)
def test_short_planes_go_batch_by_batch(isa, shared_out, taken, operation):
    with kernels(streamed=True):
        run(operation, problem((30, 40, 7, 7)), num_threads=2)
    assert taken()["way"] == "owned"
    assert taken()["sums"]["by_batch"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_channels_that_do_not_divide_are_shared(isa, shared_out, taken, operation):
    run(operation, problem((4, 7, 60, 60)), num_threads=5)
    assert (taken()["owned"], taken()["way"]) == (5, "owned")
    run(operation, problem((4, 3, 60, 60)), num_threads=5)
    assert (taken()["owned"], taken()["way"]) == (0, "tiled")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_of_one_tile_are_shared_by_columns(isa, shared_out, taken, operation):
    run(operation, problem((9, 1024)), num_threads=3)
    assert taken()["by_columns"]
    run(operation, problem((600, 1024)), num_threads=3)
    assert not taken()["by_columns"]


@pytest.mark.parametrize(
    ("shape", "streamed", "rows"),
    [
        ((2000, 256), False, {"avx512": 2}),
        ((600, 1100), False, {}),
        ((600, 1104), True, {"baseline": 1}),  # more than two stores a line would not be combined
        ((600, 272), True, {"": 1}),
    ],
    ids=str,
)
def test_rows_go_several_at_a_time(isa, shared_out, taken, shape, streamed, rows):
    with kernels(streamed=streamed):
        run("training", problem(shape), num_threads=2)
    expected = rows.get("", rows.get(isa, 4))
    assert taken()["apply"]["rows"] == expected
    assert taken()["apply"]["store"] == ("streamed" if streamed and shape[1] % 16 == 0 else "cached")


def test_machines_are_told_apart_here():
    found = _kernels.plan((1, 64, 56, 56), "inference")
    assert found["class"] in ("cores", "sliced", "board")
    assert _kernels.plan((4, 3, 5), "training", facts={"llc": 300 << 20, "llc_cpus": 64})["class"] == "sliced"
    assert np.isfinite(found["scratch"])
