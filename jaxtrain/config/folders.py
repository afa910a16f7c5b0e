"""Where jaxtrain keeps what later runs can use again."""

import os
import pathlib


def cache_folder() -> pathlib.Path:
    """`$JAXTRAIN_CACHE`, or `jaxtrain` in the user's cache folder."""
    if folder := os.environ.get("JAXTRAIN_CACHE"):
        return pathlib.Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "jaxtrain"


def bucket_cache() -> pathlib.Path:
    """Where copies of files in buckets are."""
    return cache_folder() / "buckets"
