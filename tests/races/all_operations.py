"""All operations, shared out among threads, for check_races.py to watch."""

from operations import OPERATIONS, UNFUSED, kernels, problem, run

from fastbn import _kernels

# Channels with owners, odd ones without, and both; planes and rows, short and long; one tile and many
SHAPES = [
    (2, 1, 90, 100),
    (3, 3, 50, 41),
    (84, 17, 7, 7),
    (5, 130, 14, 14),
    (4, 300, 10, 10),
    (1, 1030, 3, 3),
    (1, 70, 50, 50),
    (6000, 20),
    (300, 700),
]
THREADS = (2, 5, 64)

print(_kernels.openmp_library())
for shape in SHAPES:
    for axis in 1, -1:
        p = problem(shape, axis)
        for operation in OPERATIONS:
            fused = () if operation in UNFUSED else ("leaky_relu", True)
            for streamed in False, True:
                with kernels(shared_out=True, streamed=streamed):
                    for num_threads in THREADS:
                        run(operation, p, *fused, num_threads=num_threads)
