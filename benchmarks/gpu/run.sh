#!/usr/bin/env bash
# Prove and measure on a machine with an NVIDIA GPU and no network, from a copy of the repository:
#
#     benchmarks/gpu/run.sh FOLDER [OPTION ...]
#
# The options are those of `python -m benchmarks.gpu`. WHEELS names a folder of wheels of what the
# machine lacks (default: wheels), of which none need be there; PYTHON names another interpreter than python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
wheels=$(realpath --canonicalize-missing "${WHEELS:-wheels}")
out=$(realpath --canonicalize-missing "${1:?usage: benchmarks/gpu/run.sh FOLDER [OPTION ...]}")
shift

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$wheels/*.whl" > /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
        "$wheels"/*.whl || echo "no wheel is installed: what needs one is left out" >&2
fi

cd "$root"
# The repository comes first: a wheel of the project may be older.
export PYTHONPATH="$root:$root/adapters:$root/conformance:$site${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m benchmarks.gpu --out "$out" "$@"
