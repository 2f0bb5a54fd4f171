#!/usr/bin/env bash
# Everything about one GPU, the most important first, in ten minutes: bash bench/gpu.sh OUTPUT_FOLDER [--dry]
# Needs python3 with torch and triton, and nvcc for the native part. Run again with the same folder, it goes on.
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
  "$python" -m pip install -v --no-build-isolation --no-deps -e . >"$out/info.txt" 2>&1 ||
    tail -50 "$out/info.txt"
fi
"$python" -m dynexec info >>"$out/info.txt"
exec "$python" bench/gpu.py "$out" --minutes "$(awk "BEGIN { print 9.5 - $SECONDS / 60 }")" "$@"
