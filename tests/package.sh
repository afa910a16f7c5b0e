#!/usr/bin/env bash
# Build the sdist, the wheel out of it, install that into an environment of its own
# outside the checkout, and run the README's first command from an empty folder.
#   bash tests/package.sh
# PYTHON: interpreter (python3). BUILDER: one that has the package `build` (.venv's).
# TAG: a release's tag, which must be v and the package's version.
# DIST: a folder to copy the sdist and the wheel to when all went well.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
BUILDER=${BUILDER:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$BUILDER" -m build --outdir "$folder/dist" . > "$folder/build.log" ||
    { cat "$folder/build.log" >&2; exit 1; }
version=$(basename "$folder"/dist/*.whl | cut -d- -f2)
if [[ -n "${TAG:-}" && "$TAG" != "v$version" ]]; then
    echo "the tag is $TAG, but the package's version is $version" >&2
    exit 1
fi
# Users' type checkers read this file.
"$BUILDER" -m zipfile --list "$folder"/dist/*.whl | grep jaxtrain/py.typed > /dev/null
# What follows the installation in the README: .venv/bin/jaxtrain ...
command=$(grep -m 1 '^python3 -m venv' README.md | sed 's/.*&& //')
[[ $command == .venv/bin/jaxtrain* ]] || { echo "README: $command" >&2; exit 1; }

checkout=$PWD
mkdir "$folder/empty"
cd "$folder/empty"
"$PYTHON" -m venv .venv
# As in run.sh: an import compiles what it needs.
unset PYTHONDONTWRITEBYTECODE
.venv/bin/pip install --quiet --no-compile "$folder"/dist/*.whl
# No torch, and nothing of the checkout.
.venv/bin/python -c "
import importlib.util, jaxtrain
assert importlib.util.find_spec('torch') is None
assert 'site-packages' in jaxtrain.__file__"
.venv/bin/jaxtrain configs
.venv/bin/jaxtrain recipes qwen3-4b-dpo-lora | grep -q Qwen/Qwen3-4B
echo "$command"
JAXTRAIN_CACHE=$folder/cache bash -c "$command"
test -f out/dpo/model/model.safetensors
if [ -n "${DIST:-}" ]; then
    cd "$checkout"
    mkdir -p "$DIST"
    cp "$folder"/dist/* "$DIST"
fi
