# The project in a container. Not run by the authors: the machines it was developed on have no Docker.
#   docker build -t ddim .
#   docker run --rm --gpus all --ipc=host -v "$PWD/outputs:/ddim/outputs" -v "$PWD/data:/ddim/data" ddim \
#       python scripts/train.py experiment=cifar10
# torch's wheels bring CUDA; the host needs NVIDIA's driver and its container toolkit. With its C compiler (not in the slim image)
# compute.compile, trainer.compile and winograd work.
FROM python:3.11
WORKDIR /ddim
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e '.[efficientnet,lsun,launchers]'
CMD ["python", "scripts/train.py", "--help"]
