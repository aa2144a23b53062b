"""Checks what Cloud Storage ("gs://...") needs, and turns its errors into readable ones.

Files in Cloud Storage are read and written with the same calls as local files (etils.epath,
array_record, orbax). Only their errors differ.
"""

import contextlib
from collections.abc import Iterator


def check_gcs_installed(path: str, option: str) -> None:
    """Check that orbax's client library is installed if `path` is in Cloud Storage.

    Args:
      path: the folder for checkpoints.
      option: the command line option that names it, for the message.

    Raises:
      ValueError: the library is missing.
    """
    if not str(path).startswith("gs://"):
        return
    try:
        import google.cloud.storage  # noqa: F401 (orbax asks it about the bucket)
    except ImportError:
        raise ValueError(
            f"{option}={path} is in Cloud Storage, which needs google-cloud-storage: "
            'pip install ".[gcs]"'
        ) from None


@contextlib.contextmanager
def gcs_errors(path: str) -> Iterator[None]:
    """Report errors of Cloud Storage with a remedy; wraps the first use of `path`.

    Raises:
      OSError: Cloud Storage refuses `path`.
    """
    if not str(path).startswith("gs://"):
        yield
        return
    import tensorflow as tf  # etils.epath reads Cloud Storage through it

    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(
            f"cannot reach {path}: {' '.join(error.message.split())[:300]}. Check its name, and "
            "that this machine's account may use the bucket (test it with gcloud storage ls)"
        ) from None
