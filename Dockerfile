# mixora on a host with an NVIDIA GPU and its container toolkit:
#
#   docker build --build-arg VERSION=0.1.0 --tag mixora .
#   docker run --gpus all --volume "$PWD:/runs" --user "$(id -u):$(id -g)" mixora train run.yaml
#
# Nobody has built it yet; tests check what it names.
# torch from the package index brings CUDA's libraries of its own; of the host it needs the driver alone.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# Triton compiles its launcher with a C compiler
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv gcc \
 && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/mixora/bin:$PATH HOME=/home/mixora PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/mixora && useradd --create-home --home-dir /home/mixora --uid 10001 mixora \
 && chmod 1777 /home/mixora

# the pinned dependencies first: a change of the source does not install them again
WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt "torch==2.13.0"
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# without .git there is no tag to read the version from
ARG VERSION=0.1.0.dev0
RUN SETUPTOOLS_SCM_PRETEND_VERSION_FOR_MIXORA=$VERSION pip install --constraint constraints.txt ".[serve,quantised]"

USER 10001
WORKDIR /runs
# `mixora serve` listens at loopback; with --host 0.0.0.0 and a key it is reached at this port
EXPOSE 8000
ENTRYPOINT ["mixora"]
CMD ["--help"]
