#!/usr/bin/env bash
# Everything about one GPU, the most important first: [MINUTES=9.5] bash bench/gpu.sh OUTPUT_FOLDER [--dry]
# MINUTES are all that it takes, building included. Needs python3 with torch, triton, setuptools, cmake, ninja and
# pybind11, and nvcc for the native part. Run again with the same folder, it goes on. Where dynexec is not installed it
# installs it, editable, also into the system's Python.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
# Native code for the GPU that is here alone, which takes less time.
if capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null); then
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(echo "$capability" | head -1)}
fi
if ! "$python" -c "import dynexec._C" 2>/dev/null; then
  if ! PIP_BREAK_SYSTEM_PACKAGES=1 "$python" -m pip install -v --no-build-isolation --no-deps -e . \
    >"$out/info.txt" 2>&1; then
    tail -50 "$out/info.txt" >&2
    echo "pip did not install dynexec. It needs setuptools 77 or newer, torch, triton, cmake, ninja, pybind11." >&2
    # Without the native part most of it can run. kernels/ is installed as a part of the package.
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    [ -e dynexec/kernels ] || ln -s ../kernels dynexec/kernels
    "$python" -c "import dynexec, dynexec.kernels.offline" || exit 1
    echo "It goes on with what is in $PWD." >&2
  fi
fi
"$python" -m dynexec info >>"$out/info.txt"
exec "$python" bench/gpu.py "$out" --minutes "$(awk "BEGIN { print ${MINUTES:-9.5} - $SECONDS / 60 }")" "$@"
