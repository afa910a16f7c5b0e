#!/bin/bash
# The step of a LoRA 3B with the head's gradient taken backward, and with the forward.
#
#     bash benchmarks/frozen_head.sh [steps]
#
# It needs the history: the tree before the change is written into a folder of its own.
set -e
steps=${1:-6}
change=$(git log --format=%H -1 --grep="the head's gradient is taken with the forward")
before=$(mktemp -d)
git archive "$change^" | tar -x -C "$before"
for tree in "$before" . "$before" .; do
    echo "# $tree"
    (cd "$tree" && PYTHONPATH=. python benchmarks/train_step.py \
        --cases lora_3b --unroll --steps "$steps")
done
