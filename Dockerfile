# One image for both programs: failover-agent run (or exec) and failover-agent serve. docs/container.md.
#
# The base is Debian's own: the digest pins it for every platform, the date shows its age. Python
# and tini are Debian's too, so an image that is built anew has their security updates. What comes from
# a package index is locked by version and hash; wheels only.
ARG BASE=debian:bookworm-20260918-slim@sha256:3783cc01769c7b2b1b83a5c5ad96c815348e28ed7da68e2e3687004faa906251

FROM ${BASE} AS build
# Debian removes superseded versions from its mirrors: pinned ones could not be installed for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements/build.txt requirements/image.txt requirements/
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes \
        --only-binary=:all: -r requirements/build.txt \
    && python3 -m venv --without-pip /opt/failover-agent \
    && /opt/build/bin/pip --python /opt/failover-agent/bin/python install --no-cache-dir \
        --no-deps --require-hashes --only-binary=:all: -r requirements/image.txt
COPY pyproject.toml README.md LICENSE ./
COPY agent agent
RUN /opt/build/bin/python -m hatchling build --target wheel --directory /wheel \
    && /opt/build/bin/pip --python /opt/failover-agent/bin/python install --no-cache-dir \
        --no-deps --no-index /wheel/*.whl

FROM ${BASE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="failover-agent" \
      org.opencontainers.image.description="Client failover: exactly one active copy of a program in a group of hosts" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
    && groupadd --gid 10001 failover-agent \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home \
        --home-dir /var/lib/failover-agent --shell /usr/sbin/nologin failover-agent \
    && install --directory --owner=failover-agent --group=failover-agent \
        /run/failover-agent /var/lib/failover-agent
COPY --from=build /opt/failover-agent /opt/failover-agent
# The directories as systemd would name them. A coordinator in a container is there for others.
ENV PATH=/opt/failover-agent/bin:/usr/local/bin:/usr/bin:/bin \
    RUNTIME_DIRECTORY=/run/failover-agent \
    STATE_DIRECTORY=/var/lib/failover-agent \
    FAILOVER_COORDINATOR_LISTEN=0.0.0.0:5470
# All that is ever written, so that the root file system can be read-only.
VOLUME ["/run/failover-agent", "/var/lib/failover-agent"]
# By number: only then can an orchestrator see that it is not root.
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["failover-agent", "healthcheck"]
# tini is process 1: it reaps what hooks leave behind, and the guard can stop and kill the agent, which
# it could not if the agent were process 1 itself. Signals go to the agent alone.
ENTRYPOINT ["/usr/bin/tini", "--", "failover-agent"]
CMD ["--help"]
