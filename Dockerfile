# The image of a relay: docs/containers.md says how to run it.
FROM debian:bookworm-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /build
WORKDIR /source
# What we need comes first: it is not downloaded again when only our source has changed.
COPY pyproject.toml tools/requirements.py ./
RUN python3 requirements.py build > build.txt \
    && python3 requirements.py run > run.txt \
    && /build/bin/pip install --no-cache-dir -r build.txt \
    && /build/bin/pip wheel --no-cache-dir -w /wheels -r run.txt
COPY . .
RUN /build/bin/pip wheel --no-build-isolation --no-deps -w /wheels . \
    && python3 -m venv --without-pip /opt/relaymta \
    && /build/bin/pip --python /opt/relaymta/bin/python install --no-index --find-links /wheels relaymta

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="relaymta" \
      org.opencontainers.image.description="A relay MTA" \
      org.opencontainers.image.licenses="Apache-2.0"
# A volume that is empty gets the owner and the mode that its folder has here.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10025 relaymta \
    && useradd --uid 10025 --gid 10025 --no-log-init --no-create-home --home-dir /var/lib/relaymta --shell /usr/sbin/nologin relaymta \
    && install -d -m 0700 -o 10025 -g 10025 /var/lib/relaymta
COPY --from=build /opt/relaymta /opt/relaymta
COPY config/container/relaymta.toml /etc/relaymta/relaymta.toml
ENV PATH=/opt/relaymta/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
USER 10025:10025
WORKDIR /var/lib/relaymta
VOLUME /var/lib/relaymta
EXPOSE 2525 2587 9125
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["/opt/relaymta/bin/python", "-I", "-c", "import http.client as http; c = http.HTTPConnection('127.0.0.1', 9125, timeout=4); c.request('GET', '/readyz'); r = c.getresponse(); print(r.read().decode()); raise SystemExit(r.status != 200)"]
ENTRYPOINT ["/opt/relaymta/bin/relaymta"]
CMD ["serve"]
