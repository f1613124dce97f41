"""Files behind URLs of fsspec (`s3://`, `gs://`, `https://`, ...): whole ones and crops of arrays.

A file system is asked for anew at each access, which costs nothing after the first one in a
process: one that was used before a fork would not work in the worker processes of a loader.
Credentials and options of a file system are those of its package and of fsspec's configuration,
such as `FSSPEC_S3_ANON=true` in the environment.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from fsspec.core import url_to_fs

from gvsl_lightning.data.find import is_url
from gvsl_lightning.errors import InputError, cause_of

_HEADER_BYTES = 4096
"""More than NumPy writes before four axes."""


def read_file(path: str) -> bytes:
    """Content of a file, local or behind a URL.

    Raises:
        FileNotFoundError: It is not there.
        InputError: It is behind a URL that cannot be read.
    """
    if not is_url(path):
        with open(path, "rb") as file:
            return file.read()
    with _reading(path):
        files, inner = url_to_fs(path)
        content: bytes = files.cat_file(inner)
    return content


class RemoteArray:
    """A .npy file behind a URL, of which only the requested part is read.

    A crop [:, a:b, ...] takes one request for each channel, which reads [a:b] along the first
    spatial axis with all of the other axes, one run of bytes. For a patch of 96^3 from 256^3 voxels
    of float16 that is 12.6 MB of 33.6 MB. Exact rows would be 1.8 MB in 9,216 requests, and the
    time and price of requests count for more.

    Args:
        url: A file (C, D, H, W), in C order.

    Attributes:
        shape: (C, D, H, W).
        dtype: Type of the stored numbers.

    Raises:
        FileNotFoundError: It is not there.
        InputError: It cannot be read, or is not such a file.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with _reading(url):
            files, path = url_to_fs(url)
            start = io.BytesIO(files.cat_file(path, 0, _HEADER_BYTES))
        try:
            version = np.lib.format.read_magic(start)
            read = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
            self.shape, is_fortran, self.dtype = read(start)
        except (ValueError, AttributeError) as error:
            raise InputError(
                f"{url} is no .npy file ({cause_of(error)}); copy the prepared folder again."
            ) from error
        if is_fortran or len(self.shape) != 4 or self.dtype.hasobject:
            raise InputError(f"{url} is no array (C, D, H, W); copy the prepared folder again.")
        self._offset = start.tell()

    def __getitem__(self, region: tuple[slice, slice, slice, slice]) -> np.ndarray:
        """Read a crop, given by four slices without steps.

        Raises:
            InputError: It cannot be read, or the server serves whole files only.
        """
        begin, end, _ = region[1].indices(self.shape[1])
        plane = math.prod(self.shape[2:]) * self.dtype.itemsize
        size = max(0, end - begin) * plane
        channels = range(*region[0].indices(self.shape[0]))
        starts = [self._offset + (c * self.shape[1] + begin) * plane for c in channels]
        with _reading(self.url):
            files, path = url_to_fs(self.url)
            runs = files.cat_ranges(
                [path] * len(starts), starts, [start + size for start in starts], on_error="raise"
            )
        if any(len(run) != size for run in runs):
            raise InputError(
                f"{self.url} is shorter than its header says, or its server does not serve ranges "
                "of bytes; copy it anew, use another server or set cache_folder."
            )
        slab = np.frombuffer(b"".join(runs), self.dtype)
        slab = slab.reshape(len(channels), max(0, end - begin), *self.shape[2:])
        return slab[:, :, region[2], region[3]]


@contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except ImportError as error:
        raise InputError(
            f"{url} cannot be read without another package ({error}); install it."
        ) from error
    except Exception as error:  # each file system has its own
        raise InputError(
            f"{url} cannot be read ({type(error).__name__}: {cause_of(error)}); check the URL, "
            "your credentials and the network."
        ) from error
