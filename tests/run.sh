#!/usr/bin/env bash
# Set up a virtual environment and pass the tests: format, lint, types, pytest.
#   bash tests/run.sh [pytest arguments]
#   bash tests/run.sh fast [pytest arguments]     the tests for every day, minutes
# PYTHON: interpreter (python3). VENV: environment to make or reuse (.venv).
# PEERS=0: without torch, transformers' models, peft and trl; their parity tests skip.
# DOCS=0: without what builds the docs as a site; the tests of the site skip.
# TPU=1: with libtpu (200 MB), which compiles for TPUs that are not here.
# JAXTRAIN_TEST_ALL=1: the longest tests too (10 minutes more), and with libtpu.
# TYPES=0: without mypy, as where another run checks the types.
# JAXTRAIN_TEST_EXAMPLES=5: so many examples of each property (20).
# STEP=install, STEP=check: one half only.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=metrics,test
# Else every process that a test starts compiles all modules of the package anew.
unset PYTHONDONTWRITEBYTECODE
if [ "${DOCS:=1}" = 1 ]; then EXTRAS+=,docs; fi
if [ "${PEERS:=1}" = 1 ]; then EXTRAS+=,peers; fi
if [ -n "${TPU:-}${JAXTRAIN_TEST_ALL:-}" ]; then EXTRAS+=,tpu; fi

if [ "${STEP:=all}" != check ]; then
    "$PYTHON" -m venv "$VENV"
    # Of 20,000 modules the tests import a quarter. To compile all takes pip a minute;
    # what is not compiled yet, the first import compiles.
    if [ "$PEERS" = 1 ]; then
        # First and by exact version: other requests for torch pull gigabytes of CUDA.
        "$VENV/bin/pip" install --quiet --no-compile torch==2.13.0
    fi
    "$VENV/bin/pip" install --quiet --no-compile -e ".[$EXTRAS]"
fi
if [ "$STEP" = install ]; then exit; fi

if [ "${1:-}" = fast ]; then
    shift
    set -- -m fast "$@"
fi
"$VENV/bin/ruff" format --check .
"$VENV/bin/ruff" check .
# Beside the tests and behind them, for mypy takes a minute of one core.
types=
if [ "${TYPES:=1}" = 1 ]; then
    nice "$VENV/bin/mypy" &
    types=$!
fi
status=0
# Two workers for two cores; a file stays on one, with what its tests share.
"$VENV/bin/python" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder \
    --durations=40 "$@" || status=$?
if [ -n "$types" ] && ! wait "$types"; then
    echo "mypy found errors: see above" >&2
    status=1
fi
exit "$status"
