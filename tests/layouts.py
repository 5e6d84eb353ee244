"""Arrays in every memory layout that NumPy can make."""

import tempfile

import numpy as np

GAP = 77.0  # fills memory that no element of an array lies in: any use of it is far off


def arrange(values, layout, axis=1, dtype=np.float32):
    """An array of that layout with the shape and values of `values`; a broadcast one repeats the first."""
    return LAYOUTS[layout](np.asarray(values).astype(dtype), axis % values.ndim)


def contiguous(values, axis):
    return np.array(values, order="C")


def fortran(values, axis):
    return np.array(values, order="F")


def channels_last(values, axis):
    """A view with the channels on `axis` of memory that has them last."""
    return np.moveaxis(contiguous(np.moveaxis(values, axis, -1), -1), -1, axis)


def channels_first(values, axis):
    """A view with the channels on `axis` of memory that has them second."""
    return np.moveaxis(contiguous(np.moveaxis(values, axis, 1), 1), 1, axis)


def along(dimension, step=1, border=0):
    """Layouts that step through a larger array along one dimension, `border` away from its ends."""

    def layout(values, axis):
        i = dimension(values, axis)
        if i is None:
            return contiguous(values, axis)
        shape = list(values.shape)
        shape[i] = shape[i] * abs(step) + 2 * border
        index = [slice(None)] * values.ndim
        index[i] = slice(border, shape[i] - border)
        block = np.full(shape, GAP, values.dtype)[tuple(index)]
        index[i] = slice(None, None, step)
        view = block[tuple(index)]
        view[...] = values
        return view

    return layout


def batch(values, axis):
    return 0 if axis else None


def channels(values, axis):
    return axis


def height(values, axis):
    return next((i for i in range(1, values.ndim) if i != axis), None)


def width(values, axis):
    return next((i for i in range(values.ndim - 1, 0, -1) if i != axis), None)


def at_byte(offset):
    """Layouts that begin so many bytes after a cache line does."""

    def layout(values, axis):
        memory = np.zeros(values.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        view = np.ndarray(values.shape, values.dtype, buffer=memory, offset=start)
        view[...] = values
        return view

    return layout


def read_only(values, axis):
    array = contiguous(values, axis)
    array.setflags(write=False)
    return array


def memory_mapped(values, axis):
    if values.size == 0:
        return contiguous(values, axis)  # there is no empty map
    with tempfile.TemporaryFile() as file:
        file.write(contiguous(values, axis).tobytes())
        file.flush()
        return np.memmap(file, values.dtype, "r", shape=values.shape)


def broadcast(dimension):
    """Layouts whose stride along one dimension is 0."""

    def layout(values, axis):
        i = dimension(values, axis)
        if i is None or values.shape[i] == 0:
            return contiguous(values, axis)
        return np.broadcast_to(contiguous(np.take(values, [0], i), axis), values.shape)

    return layout


def broadcast_everywhere(values, axis):
    return np.broadcast_to(values.dtype.type(3.25), values.shape)


WRITABLE = {
    "contiguous": contiguous,
    "fortran": fortran,
    "channels_last": channels_last,
    "channels_first": channels_first,
    "sliced_batch": along(batch, step=2),
    "sliced_channels": along(channels, border=1),
    "sliced_height": along(height, border=1),
    "sliced_width": along(width, border=1),
    "stepped_channels": along(channels, step=2),
    "stepped_width": along(width, step=3),
    "reversed_batch": along(batch, step=-1),
    "reversed_channels": along(channels, step=-1),
    "reversed_width": along(width, step=-1),
    "second_float": at_byte(4),
    "misaligned": at_byte(1),
}
LAYOUTS = WRITABLE | {
    "read_only": read_only,
    "memory_mapped": memory_mapped,
    "broadcast_batch": broadcast(batch),
    "broadcast_channels": broadcast(channels),
    "broadcast_width": broadcast(width),
    "broadcast_everywhere": broadcast_everywhere,
}
