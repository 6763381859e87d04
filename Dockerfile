# Prediction from an exported file, without torch:
#   docker build -t fleetflow-runtime .
#   docker run --rm -v "$PWD:/work" fleetflow-runtime python -c 'import fleetflow; print(fleetflow.Session("net.onnx").about)'
FROM python:3.11-slim-bookworm

WORKDIR /opt/fleetflow
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir --constraint constraints.txt numpy onnxruntime pillow \
    && pip install --no-cache-dir --no-deps .

RUN useradd --create-home --uid 1000 runner
USER 1000
WORKDIR /work
CMD ["python"]
