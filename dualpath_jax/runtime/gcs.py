"""Cloud Storage ("gs://..."): what it needs, and its errors in words.

Public: `check_gcs_installed`, `gcs_errors`.

Files there are read and written by the calls that local files have (etils.epath, array_record,
orbax); only what goes wrong is different.
"""

import contextlib
from collections.abc import Iterator


def check_gcs_installed(path: str, option: str) -> None:
    """ValueError if `path` is in Cloud Storage and orbax would miss its client library there.

    Args:
      path: where checkpoints are to be.
      option: what names it on the command line, for the message.
    """
    if not str(path).startswith("gs://"):
        return
    try:
        import google.cloud.storage  # noqa: F401 (orbax asks it about the bucket)
    except ImportError:
        raise ValueError(
            f"{option}={path} is in Cloud Storage, which needs google-cloud-storage: "
            "pip install -r requirements-gcs.txt"
        ) from None


@contextlib.contextmanager
def gcs_errors(path: str) -> Iterator[None]:
    """Around the first use of `path`: OSError with the remedy where Cloud Storage refuses it."""
    if not str(path).startswith("gs://"):
        yield
        return
    import tensorflow as tf  # what etils.epath reads Cloud Storage by

    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(
            f"cannot reach {path}: {' '.join(error.message.split())[:300]}. Check its name, and "
            "that this machine's account may use the bucket (gcloud storage ls says so)"
        ) from None
