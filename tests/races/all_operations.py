"""All operations, shared out among threads, for check_races.py to watch."""

from operations import OPERATIONS, kernels, problem, run
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
