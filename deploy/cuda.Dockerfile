# Caravan for NVIDIA GPUs: the image for CPUs with ONNX Runtime's CUDA provider. Build from the repository's root:
#   docker build -f deploy/Dockerfile -t caravan .
#   docker build -f deploy/cuda.Dockerfile --build-arg CARAVAN=caravan -t caravan-cuda .
# The driver comes from the node (NVIDIA's container toolkit), CUDA and cuDNN from NVIDIA's image, the provider from
# Microsoft's own package. A private registry of packages: --secret id=pip,src=$HOME/.config/pip/pip.conf
ARG CARAVAN=caravan
ARG PYTHON=python:3.12-slim-bookworm
ARG CUDA=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

FROM ${CARAVAN} AS caravan

FROM ${PYTHON} AS provider
# The version of the onnxruntime-node in package.json: both speak the same C API.
ARG ONNXRUNTIME=1.30.0
WORKDIR /provider
RUN --mount=type=secret,id=pip,target=/root/.config/pip/pip.conf \
  pip download --quiet --no-cache-dir --no-deps --only-binary=:all: \
    --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    "onnxruntime-gpu==${ONNXRUNTIME}" \
  && python3 -m zipfile -e onnxruntime_gpu-*.whl . && rm ./*.whl \
  && mkdir lib && mv onnxruntime/capi/libonnxruntime.so.* onnxruntime/capi/libonnxruntime_providers_cuda.so \
    onnxruntime/capi/libonnxruntime_providers_shared.so lib/ \
  && mv lib/libonnxruntime.so.* lib/libonnxruntime.so

FROM ${CUDA}
RUN command -v tini >/dev/null || { apt-get update -qq \
  && apt-get install -y -qq --no-install-recommends tini && rm -rf /var/lib/apt/lists/*; }
ENV NODE_ENV=production HOME=/tmp \
  CARAVAN_ORT_LIBRARY=/opt/onnxruntime/libonnxruntime.so \
  NVIDIA_DRIVER_CAPABILITIES=compute,utility \
  CARAVAN_WEIGHT_CACHE=off
WORKDIR /caravan
COPY --from=caravan /usr/local/bin/node /usr/local/bin/node
COPY --from=provider /provider/lib /opt/onnxruntime
COPY --from=caravan /caravan /caravan
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["node", "deploy/healthcheck.mjs"]
ENTRYPOINT ["tini", "--", "node"]
CMD ["dist/coordinator/cli/main.js", "--help"]
