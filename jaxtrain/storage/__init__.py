"""Files in buckets: addresses such as gs://bucket/run and s3://bucket/run.

`address` decides what is an address and what a folder on a disk; `checks` refuses, in
one line and before anything long, an address that cannot be used; `fetch` brings small
files to the local disk; `objects` writes under conditions, which locks need; `folders`
lists, uploads and removes. Nothing here imports jax.
"""
