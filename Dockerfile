# The agent in a virtual environment on any Debian-like image with python3 (3.11 to 3.13) and venv.
# Where pip needs a configuration or a CA file to reach its index, they are given as secrets, which
# leave nothing behind: --secret id=pip.conf,src=… and, named in it as `cert = /run/secrets/ca.pem`,
# --secret id=ca.pem,src=….
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS dependencies
ENV PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# What the base lacks: on a read-only root, a library without bytecode is compiled at every start.
# /build/root becomes / of the image; a base that has its bytecode adds nothing to it. -B, and
# before any other use of Python: what is there already is not compiled again.
RUN mkdir root \
    && touch since \
    && library="$(python3 -B -c 'import os; print(os.path.dirname(os.path.realpath(os.__file__)))')" \
    && python3 -B -m compileall -q --invalidation-mode unchecked-hash "$library" \
       -x '/(test|tests|idlelib|lib2to3|tkinter|turtledemo|ensurepip|(site|dist)-packages)/' \
    && find "$library" -name '*.pyc' -newer since -exec cp --parents -t root {} +
RUN python3 -m venv tools && python3 -m venv --without-pip /opt/vgpu-agent
COPY requirements/run.txt requirements/
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    tools/bin/python -m pip --python /opt/vgpu-agent/bin/python install -q --no-compile --no-deps \
        --only-binary :all: --require-hashes --no-warn-script-location -r requirements/run.txt \
    && find /opt/vgpu-agent/bin -type f -delete \
    && tools/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/vgpu-agent/lib

FROM dependencies AS agent
COPY requirements/build.txt requirements/
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    tools/bin/python -m pip install -q --only-binary :all: --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY vgpu_agent/ vgpu_agent/
# Only the agent's own files, at their place below /build/agent: a layer apart from the libraries'.
RUN tools/bin/python -m hatchling build -t wheel -d wheels \
    && tools/bin/python -m pip --python /opt/vgpu-agent/bin/python install -q --no-compile --no-deps \
        --no-index --find-links wheels --root /build/agent --no-warn-script-location vgpu-agent \
    && tools/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        -s /build/agent -p / /build/agent

FROM ${BASE_IMAGE}
ARG VERSION=0.2.0
COPY --from=dependencies /build/root/ /
COPY --from=dependencies /opt/vgpu-agent/ /opt/vgpu-agent/
COPY --from=agent /build/agent/ /
# Each thread has an arena of its own in glibc, which keeps what it once needed: two are enough.
ENV MALLOC_ARENA_MAX=2
ENV PATH=/opt/vgpu-agent/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
LABEL org.opencontainers.image.title="vgpu-agent" \
      org.opencontainers.image.description="Kubernetes node agent that shares each NVIDIA GPU as many virtual GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
USER 0:0
WORKDIR /
ENTRYPOINT ["vgpu-agent"]
CMD ["run"]
