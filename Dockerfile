# The engine without embedded servers: it is given a Redis and a PostgreSQL by URL. With the load
# generator, which `sale rehearse` needs. What is installed is locked by version and hash
# (config/deploy/requirements.lock, made by scripts/lock).
FROM python:3.12-slim AS build
WORKDIR /src
COPY config/deploy/requirements.lock ./
RUN python -m venv /opt/sale \
    && /opt/sale/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps \
        --require-hashes --only-binary :all: --requirement requirements.lock
COPY pyproject.toml README.md ./
COPY sale ./sale
COPY loadtest ./loadtest
COPY config/unions.toml ./config/unions.toml
# hatchling is in the lock too, so nothing is fetched to build.
RUN /opt/sale/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps \
        --no-build-isolation .

FROM python:3.12-slim
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin sale
COPY --from=build /opt/sale /opt/sale
WORKDIR /home/sale
USER 10001:10001
# Inside a container the addresses are the container's own; 127.0.0.1 would reach nobody.
ENV PATH=/opt/sale/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SALE_LISTEN=0.0.0.0:8080 \
    SALE_METRICS_LISTEN=0.0.0.0:9108
EXPOSE 8080 9108
STOPSIGNAL SIGTERM
ENTRYPOINT ["sale"]
CMD ["--help"]
