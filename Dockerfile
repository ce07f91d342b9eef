# docker build -t cellserve .                               the CPU flavour, with the example models
# docker build -t cellserve --build-arg EXAMPLES=none .     without models: mount yours at /artifacts
# docker build -t cellserve --build-arg EXAMPLES=folder .   with the models of artifacts/
# docker build -t cellserve --build-arg RUNTIME=gpu .       with onnxruntime-gpu (untested on a GPU); run it with --gpus all
# docker run -v cells:/sessions -p 8000:8000 cellserve      sessions are kept in the volume
ARG BASE=python:3.12-slim
ARG EXAMPLES

FROM ${BASE} AS uv
RUN python3 -m venv /uv && /uv/bin/pip install --no-cache-dir -q 'uv>=0.9,<1' && python3 -m venv --without-pip /venv
ENV PATH=/uv/bin:$PATH VIRTUAL_ENV=/venv UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1
WORKDIR /build
COPY requirements requirements

# Trains the example networks and exports them: TensorFlow stays in this stage.
FROM uv AS models-train
RUN uv pip install -q -r requirements/all.txt
COPY . .
RUN uv pip install -q --no-deps .
RUN /venv/bin/cellserve examples --models /artifacts

FROM ${BASE} AS models-folder
COPY artifacts /artifacts

FROM ${BASE} AS models-none
RUN mkdir /artifacts

# The default stands here: podman 4 looks for the stage before it reads the default of an ARG.
FROM models-${EXAMPLES:-train} AS models

# The service with one flavour of ONNX Runtime, and what `adopt` needs.
FROM uv AS install
ARG RUNTIME=cpu
RUN uv pip install -q -r requirements/${RUNTIME}.txt
COPY . .
RUN uv pip install -q --no-deps .

FROM ${BASE}
# A new volume at /sessions takes its owner from here. There is no VOLUME: it would make one for each container.
RUN useradd --uid 10001 --no-create-home cellserve && install -d -m 700 -o 10001 -g 10001 /sessions
# The official image has no bytecode of the standard library: each start and each health check would compile it again.
RUN python3 -c "import compileall, re, sysconfig; \
    compileall.compile_dir(sysconfig.get_path('stdlib'), rx=re.compile('-packages'), quiet=2)"
COPY --from=install /venv /venv
COPY --from=models /artifacts /artifacts
COPY deploy/entrypoint.sh /entrypoint.sh
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1 \
    CELLSERVE_MODELS=/artifacts CELLSERVE_HOST=0.0.0.0
LABEL org.opencontainers.image.title="cellserve" \
    org.opencontainers.image.description="Serves stateful recurrent models: Keras cells, exported to fast and exact ONNX, stepped in sessions." \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="0.1.0"
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python3", "-m", "cellserve.service.cli.healthcheck"]
ENTRYPOINT ["/entrypoint.sh"]
CMD ["serve"]
