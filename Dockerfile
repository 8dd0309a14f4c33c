# The images of Millrace, one target each: gateway, steps, worker, worker-cpu. docs/containers.md explains them.
#
#   docker build --target gateway --tag millrace/gateway .
#
# Needs BuildKit. Where packages come from and who signs that place is told by secrets, and is in no image:
#   --secret id=pip,src=pip.conf --secret id=ca,src=ca.pem     (pip.conf: cert = /run/secrets/ca)

# Debian or alike with Python 3.11 or newer; pin it by digest for images that can be built again.
ARG BASE_IMAGE=python:3.11-slim
# The same Python with pip.
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
WORKDIR /src
# No pip inside: what is copied from here installs nothing more.
RUN python3 -m venv --without-pip /opt/millrace

# Our own code, in a layer of its own: a change of it sends megabytes, not the gigabytes of torch.
FROM build AS code
COPY requirements/build.txt requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    python3 -m venv --without-pip /opt/build \
    && python3 -m pip --python /opt/build/bin/python install --quiet --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY agents agents
COPY gateway gateway
COPY loadtest loadtest
COPY millrace millrace
RUN mkdir /wheel \
    && /opt/build/bin/python -c 'from setuptools import build_meta; build_meta.build_wheel("/wheel")' \
    && python3 -m pip --python /opt/millrace/bin/python install --quiet --no-index --no-deps /wheel/*.whl

FROM build AS gateway-packages
COPY requirements/gateway.txt requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    python3 -m pip --python /opt/millrace/bin/python install --quiet --require-hashes -r requirements/gateway.txt

FROM build AS steps-packages
COPY requirements/steps.txt requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    python3 -m pip --python /opt/millrace/bin/python install --quiet --require-hashes -r requirements/steps.txt

FROM build AS worker-packages
COPY requirements/worker.txt requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    python3 -m pip --python /opt/millrace/bin/python install --quiet --require-hashes -r requirements/worker.txt

# By default the packages of `worker`, CUDA included: PyPI has no other torch for Linux on x86-64.
# With an index that has one: make requirements TORCH_INDEX=URL, then give both arguments.
FROM build AS worker-cpu-packages
ARG TORCH_INDEX=
ARG WORKER_CPU_REQUIREMENTS=requirements/worker.txt
COPY requirements/worker*.txt requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    python3 -m pip --python /opt/millrace/bin/python install --quiet --require-hashes \
    ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -r "${WORKER_CPU_REQUIREMENTS}"

# What all images share. Nothing below writes outside /tmp and /var/lib/millrace, so the root may be read-only.
FROM ${BASE_IMAGE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.vendor="Millrace" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The pip of the base image goes: a pod installs nothing.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/ensurepip \
        /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/site-packages/setuptools* \
        /usr/local/lib/python3*/site-packages/wheel* /usr/local/lib/python3*/site-packages/pkg_resources \
    && echo 'millrace:x:10001:10001:Millrace:/tmp:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'millrace:x:10001:' >> /etc/group \
    && install --directory --owner 10001 --group 10001 --mode 0770 /var/lib/millrace
ENV PATH=/opt/millrace/bin:${PATH} \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MILLRACE_DATA_DIR=/var/lib/millrace \
    MILLRACE_WORKER_HOST=0.0.0.0 \
    MILLRACE_WORKER_PORT=8041
WORKDIR /var/lib/millrace
# By number, so that `runAsNonRoot` can check it.
USER 10001:10001

FROM runtime AS gateway
LABEL org.opencontainers.image.title="millrace/gateway" \
      org.opencontainers.image.description="The HTTP API: uploads, results, search, telemetry, operations"
COPY --from=gateway-packages /opt/millrace /opt/millrace
COPY --from=code /opt/millrace /opt/millrace
EXPOSE 8040
CMD ["python", "-m", "gateway"]

FROM runtime AS steps
LABEL org.opencontainers.image.title="millrace/steps" \
      org.opencontainers.image.description="The steps archive, store, record and notify, and the millrace command"
# Of NVIDIA's container runtime: `millrace collect` reads NVML.
ENV NVIDIA_DRIVER_CAPABILITIES=utility
COPY --from=steps-packages /opt/millrace /opt/millrace
COPY --from=code /opt/millrace /opt/millrace
EXPOSE 8041
CMD ["millrace", "--help"]

FROM runtime AS worker
LABEL org.opencontainers.image.title="millrace/worker" \
      org.opencontainers.image.description="The steps predict and watch, with CUDA"
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=worker-packages /opt/millrace /opt/millrace
COPY --from=code /opt/millrace /opt/millrace
EXPOSE 8041
CMD ["python", "-m", "agents", "predict"]

FROM runtime AS worker-cpu
LABEL org.opencontainers.image.title="millrace/worker-cpu" \
      org.opencontainers.image.description="The steps predict and watch, on CPUs"
ENV MILLRACE_DEVICE=cpu
COPY --from=worker-cpu-packages /opt/millrace /opt/millrace
COPY --from=code /opt/millrace /opt/millrace
EXPOSE 8041
CMD ["python", "-m", "agents", "predict"]
