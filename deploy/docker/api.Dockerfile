# The API with the viewer, and, from the same image, the migrations and the reaper. No torch.
#
#   docker build -f deploy/docker/api.Dockerfile -t neural-mri-api .

FROM node:22.17.0-bookworm-slim AS viewer
WORKDIR /viewer
COPY web/package.json web/package-lock.json ./
RUN npm ci --no-fund --no-audit
COPY web ./
RUN npm run build

FROM python:3.12.11-slim-bookworm AS packages
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY neural_mri neural_mri
# Editable: the code runs from its tree, where it finds the migrations beside it.
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --disable-pip-version-check \
        --constraint constraints.txt --editable '.[api,postgresql,s3,traces]'

FROM python:3.12.11-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin nmri \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
WORKDIR /app
COPY --from=packages /venv /venv
COPY pyproject.toml README.md LICENSE ./
COPY neural_mri neural_mri
COPY api api
COPY worker/__init__.py worker/reaper.py worker/
COPY migrations migrations
COPY --from=viewer /viewer/dist web/dist
# Nobody may write here later, and each start would compile it again.
RUN /venv/bin/python -m compileall -q neural_mri api worker migrations
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    NEURAL_MRI_DATA_DIR=/data \
    NEURAL_MRI_VIEWER_DIR=/app/web/dist
USER 10001:10001
EXPOSE 8642
CMD ["python", "-m", "api"]
