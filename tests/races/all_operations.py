"""All operations, shared out among threads, for check_races.py to watch."""

from operations import OPERATIONS, UNFUSED, kernels, output_at, problem, run
from test_determinism import SHAPES, THREADS, fusing

from fastbn import _kernels

print(_kernels.openmp_library())
for shape in SHAPES:
    for axis in 1, -1:
        p = problem(shape, axis)
        for operation in OPERATIONS:
            for streamed in False, True:
                with kernels(shared_out=True, streamed=streamed):
                    for num_threads in THREADS:
                        run(operation, p, *fusing(operation), num_threads=num_threads)

p = problem((15, 4096), 1)
for operation in OPERATIONS:
    if operation not in UNFUSED:
        with kernels(shared_out=True):  # columns that go on in the next row
            run(operation, p, *fusing(operation), out=output_at(16, p), num_threads=2)
