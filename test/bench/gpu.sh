#!/usr/bin/env bash
# Correctness, then figures, on a bare machine with NVIDIA GPUs: no internet, no Redis, no root.
#
#   NODE=/opt/c/node CARAVAN_ORT_LIBRARY=/opt/c/ort/libonnxruntime.so.1.30.0 \
#     CUDA_LIB=/usr/local/cuda-13.0/targets/x86_64-linux/lib test/bench/gpu.sh [--gpus N] [--only check,7b,70b] [--seconds 150] …
#
# What must be there: this repository with `dist/` built, `node_modules` (or a link to one) beside it, and what the
# variables name. Their defaults: node on the PATH, the library beside CARAVAN_CARRY, CUDA in /usr/local/cuda. SHARED names the
# folder with models/stories260k and data/golden; without it those checks are skipped by name. JSON goes to $OUT
# (default: ./gpu-results). All GPUs are used unless --gpus says otherwise; --bandwidth is a GPU's memory bandwidth in TB/s
# (H100 3.35, H200 4.8).
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
node=${NODE:-node}
export CARAVAN_ORT_LIBRARY=${CARAVAN_ORT_LIBRARY:-${CARAVAN_CARRY:-/opt/c}/ort/libonnxruntime.so.1.30.0}
export LD_LIBRARY_PATH=${CUDA_LIB:-/usr/local/cuda/lib64}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
shared=${SHARED:-}
for folder in shared ../shared; do [ -n "$shared" ] || [ ! -d "$folder/models" ] || shared=$folder; done
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)
gpus=$(nvidia-smi -L | wc -l)
bandwidth=3.35
case $name in *H200*) bandwidth=4.8 ;; *A100*) bandwidth=2.0 ;; esac
echo "$gpus × $name, $bandwidth TB/s, node $("$node" --version)"
nvidia-smi --query-gpu=index,memory.total,memory.used,driver_version --format=csv
exec "$node" dist/test/bench/gpu.js --gpus "$gpus" --bandwidth "$bandwidth" --shared "${shared:-../shared}" \
  --out "${OUT:-gpu-results}" "$@"
