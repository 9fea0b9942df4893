# The engine without embedded servers: it is given a Redis and a PostgreSQL by URL.
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md ./
COPY sale ./sale
COPY loadtest ./loadtest
COPY config/unions.toml ./config/unions.toml
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --disable-pip-version-check /wheels/*.whl \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin sale
WORKDIR /home/sale
USER 10001:10001
# Inside a container the addresses are the container's own; 127.0.0.1 would reach nobody.
ENV PYTHONUNBUFFERED=1 \
    SALE_LISTEN=0.0.0.0:8080 \
    SALE_METRICS_LISTEN=0.0.0.0:9108
EXPOSE 8080 9108
STOPSIGNAL SIGTERM
ENTRYPOINT ["sale"]
CMD ["--help"]
