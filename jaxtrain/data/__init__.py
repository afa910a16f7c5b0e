"""Data: rows from files or the hub to static batches. No jax here.

`source.load_rows -> prepare.prepare -> pipeline.make_train_iterator`, with a tokenizer
from `tokenize.load_tokenizer`. Nothing is imported here, so that a worker process,
which needs only `pipeline`, starts without transformers.
"""
