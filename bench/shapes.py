"""The shapes on which batch norm is timed: (N, C, *spatial), channels second."""

# From single images to tensors beyond every cache: stages of ResNet-50, video, sequences, tables, tiny calls.
TABLE = [
    (1, 64, 112, 112),
    (1, 256, 56, 56),
    (1, 2048, 7, 7),
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 2048, 7, 7),
    (8, 96, 56, 56),
    (2, 64, 256, 256),
    (2, 64, 16, 56, 56),
    (32, 128, 100),
    (4096, 256),
    (64, 256),
    (1, 256),
    (1, 16, 8, 8),
]

# Sizes that no vector divides: few channels, an odd number of them, spatial blocks of 1, 49 and 169 values.
ODD = [
    (32, 3, 224, 224),
    (32, 17, 56, 56),
    (32, 17, 13, 13),
    (16, 192, 7, 7),
    (16, 192, 13, 13),
    (256, 512, 1, 1),
]

SHAPES = TABLE + ODD

# For peers that take long.
FEW = [(1, 256, 56, 56), (32, 256, 56, 56), (8, 96, 56, 56), (32, 2048, 7, 7), (32, 128, 100), (4096, 256)]

# Layers of networks at batch 8: arrays of 0.5 to 13 MB.
CHAIN = [
    (8, 64, 16, 16),
    (8, 96, 28, 28),
    (8, 64, 40, 40),
    (8, 256, 20, 20),
    (8, 128, 40, 40),
    (8, 256, 40, 40),
]
CHAIN_BYTES = 200 << 20  # of all arrays of a chain row


def channels_last(shape):
    """(N, *spatial, C) of (N, C, *spatial)."""
    n, c, *spatial = shape
    return (n, *spatial, c)


def values_per_channel(shape):
    """Over how many values a channel's statistics run; training needs two."""
    n, _, *spatial = shape
    for length in spatial:
        n *= length
    return n


def label(shape):
    """As the tables print it, such as 32x256x56x56."""
    return "x".join(map(str, shape))
