# The service: HTTP server and worker in one container.
#
# The service answers loopback addresses alone for now (it has no keys yet), and a container's loopback is its own:
# `docker run -p` reaches nothing. Run it in the host's network,
#     docker run --network host -v advisor-data:/data numerics-advisor
# and ask http://127.0.0.1:8000 on the host, or work inside it with `docker exec`.
FROM python:3.11-slim AS build

# On amd64 the default build of torch brings gigabytes of CUDA libraries. For an image without them:
#     docker build --build-arg PIP_EXTRA_INDEX_URL=<the index of torch's CPU builds> -t numerics-advisor .
ARG PIP_EXTRA_INDEX_URL=""

WORKDIR /src
COPY constraints.txt pyproject.toml README.md ./
COPY advisor advisor
COPY api api
COPY db db
COPY probes probes
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[demo]"

FROM python:3.11-slim

RUN useradd --system --uid 10001 --create-home advisor \
    && install --directory --owner=advisor --group=advisor /data
COPY --from=build /opt/venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/tmp/numba \
    ADVISOR_DATA_DIR=/data \
    ADVISOR_PORT=8000

USER advisor
WORKDIR /data
VOLUME /data
EXPOSE 8000

HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"ADVISOR_PORT\"]}/readyz', timeout=4)"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["advisor"]
CMD ["serve"]
