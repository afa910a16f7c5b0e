#!/usr/bin/env bash
# Build the documentation site; a warning is an error.
#   bash docs/build.sh [folder, default out/site]
# PYTHON: an interpreter that has the extra `docs` (.venv's).
set -euo pipefail
target=$(realpath -m "${1:-$(dirname "$0")/../out/site}")
cd "$(dirname "$0")/.."

"${PYTHON:-.venv/bin/python}" -m sphinx --fail-on-warning --keep-going --quiet \
    -b html -c docs -d "$target/.doctrees" . "$target"
echo "built $target/index.html"
